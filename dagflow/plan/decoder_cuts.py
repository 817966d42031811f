"""Where a decoder is cut into stages."""

from __future__ import annotations

from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import Partition, partition
from dagflow_tasks.kernels.attention import ATTEND
from dagflow_tasks.kernels.recurrence import RECURRENT


def cut_at_layers(dag: OperatorDag, num_stages: int) -> Partition:
    """Cut a decoder between its layers, evenly."""
    layers: list[str] = []
    for node in dag.nodes:
        if node.op == ATTEND or node.op in RECURRENT:
            layer = _layer_of(node.module)
            layers += [layer] if layer not in layers else []
    count = max(1, min(num_stages, len(layers)))
    points = [layers[len(layers) * stage // count] for stage in range(1, count)]
    return partition(dag, split_points=points) if points else partition(dag, 1)


def _layer_of(module: str) -> str:
    """Return the path of the layer that a module is in.

    >>> _layer_of("model.layers.3.self_attn")
    'model.layers.3'
    """
    parts = module.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])
