"""Rewrites a captured decoder so that its layers' linear operators read quantised weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from dagflow.errors import SettingsInvalid
from dagflow.graph.dag import OperatorDag, Parameter
from dagflow_tasks.kernels.quantised import (
    GROUP,
    LINEAR_INT4,
    LINEAR_INT8,
    quantise_int4,
    quantise_int8,
)
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import LINEAR, linear_weights

_IN_A_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Quantiser:
    """A way to hold the weights of linear layers.

    Attributes
    ----------
    op : str
        The operator that takes ``aten.linear``'s place.
    quantise : callable
        A weight (N, K) becomes two tensors: values, and scales.
    multiple : int
        K must be one of this number; layers of other widths stay as they are.
    """

    op: str
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    multiple: int = 1


QUANTISERS = {
    "int8": Quantiser(LINEAR_INT8, quantise_int8),
    "int4": Quantiser(LINEAR_INT4, quantise_int4, GROUP),
}


def scale_name(parameter: str) -> str:
    """Name of the parameter that holds a quantised one's scales."""
    return f"{parameter}.scale"


def quantised(dag: OperatorDag, quantiser: Quantiser) -> tuple[OperatorDag, frozenset[str]]:
    """Return an operator DAG whose layers' linear operators read quantised weights, and which.

    Embeddings, norms, biases and the head stay as they are, and so do weights that anything but
    linear operators reads.

    Raises
    ------
    SettingsInvalid
        If there is nothing to quantise.
    """
    linear = linear_weights(dag.nodes)
    chosen = {
        use: parameter.name
        for parameter in dag.parameters
        if _IN_A_LAYER.search(parameter.name)
        and len(parameter.shape) == 2
        and parameter.shape[1] % quantiser.multiple == 0
        and linear.issuperset(parameter.uses)
        for use in parameter.uses
    }
    if not chosen:
        raise SettingsInvalid(
            "This model has no linear layers whose weights can be quantised: GPT-2's, for one, are of "
            "another kind. Load it with weights='bf16' or 'fp32'."
        )
    parameters = tuple(
        new
        for parameter in dag.parameters
        for new in (
            _parameters(parameter, quantiser)
            if chosen.keys() & set(parameter.uses)
            else [parameter]
        )
    )
    nodes = tuple(_rewritten(node, chosen, quantiser.op) for node in dag.nodes)
    return replace(dag, parameters=parameters, nodes=nodes), frozenset(chosen.values())


def _parameters(parameter: Parameter, quantiser: Quantiser) -> list[Parameter]:
    values, scale = quantiser.quantise(torch.zeros(parameter.shape))
    return [
        replace(parameter, dtype="int8", shape=tuple(values.shape), trainable=False),
        Parameter(
            scale_name(parameter.name),
            parameter.dtype,
            tuple(scale.shape),
            False,
            tuple(scale_name(use) for use in parameter.uses),
        ),
    ]


def _rewritten(node: Node, chosen: Mapping[str, str], op: str) -> Node:
    if node.op != LINEAR or node.args[1].get("ref") not in chosen:
        return node
    x, weight, *bias = node.args
    return replace(node, op=op, args=(x, weight, {"ref": scale_name(weight["ref"])}, *bias))
