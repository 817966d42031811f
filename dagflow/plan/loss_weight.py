"""How much each micro-batch counts in a step's loss, read off the operator DAG.

A mean over tokens that ignores padding isn't the mean of its micro-batches' means. Where the loss
is such a mean, the part of the DAG that prepares its targets is run on the batch, and micro-batches
are weighted by how many targets count. Otherwise they are weighted by rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dagflow.graph.dag import OperatorDag
from dagflow.plan.analysis import DagAnalysis
from dagflow_tasks.interpreter import Executable, RandomAddress
from dagflow_tasks.operators import Node
from dagflow_tasks.program import StageInput, StageOutput, StageProgram, ValueSpec

_MEAN_REDUCTION = 1
_IGNORE_INDEX = -100
# Operators that hand the loss on unchanged.
_PASSED_ON = ("aten.to.dtype", "aten.to.dtype_layout", "aten.clone.default")


@dataclass(frozen=True)
class TargetCount:
    """Counts the targets of a batch that the loss doesn't ignore."""

    executable: Executable
    target: str
    ignore_index: int

    def __call__(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> int:
        if self.target in tensors:
            target = tensors[self.target]
        else:
            names = {i.value.name for i in self.executable.program.inputs}
            values = {name: tensor for name, tensor in tensors.items() if name in names}
            target = self.executable.run(values, sizes, RandomAddress(0, 0, 0))[self.target]
        return int((target != self.ignore_index).sum())


def target_count(dag: OperatorDag) -> TargetCount | None:
    """Return the count for a mean cross-entropy over targets that come from the batch alone."""
    loss = _cross_entropy(dag)
    if loss is None:
        return None
    _, target, weight, reduction, ignored = _arguments(loss)
    if weight is not None or reduction != _MEAN_REDUCTION:
        return None
    analysis = DagAnalysis(dag)
    name = target["ref"]
    if name not in {spec.name for spec in dag.inputs} | analysis.free_of_parameters:
        return None
    program = _program(analysis, name)
    if program is None:
        return None
    return TargetCount(Executable(program, torch.device("cpu")), name, ignored)


def _cross_entropy(dag: OperatorDag) -> Node | None:
    by_name = {node.name: node for node in dag.nodes}
    node = by_name[dag.loss]
    while node.op in _PASSED_ON:
        source = next(node.references())
        if source not in by_name:
            return None
        node = by_name[source]
    known = ("aten.cross_entropy_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss.default")
    return node if node.op in known else None


def _arguments(node: Node) -> tuple[object, dict[str, str], object, int, int]:
    """Return (input, target, weight, reduction, ignore_index) with the defaults filled in."""
    names = ("self", "target", "weight", "reduction", "ignore_index")
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return (
        values["self"],
        values["target"],
        values.get("weight"),
        values.get("reduction", _MEAN_REDUCTION),
        values.get("ignore_index", _IGNORE_INDEX),
    )


def _program(analysis: DagAnalysis, name: str) -> StageProgram | None:
    """Return a program that computes one parameter-free value, or None if it needs buffers."""
    members: set[str] = set()
    wanted = [name]
    while wanted:
        value = wanted.pop()
        if value in members or value not in analysis.position:
            continue
        members.add(value)
        wanted += analysis.dag.nodes[analysis.position[value]].references()
        wanted += [node.name for node in analysis.companions(value)]
    nodes = [node for node in analysis.dag.nodes if node.name in members]
    return _around(analysis.dag, nodes, name)


def _around(dag: OperatorDag, nodes: Sequence[Node], name: str) -> StageProgram | None:
    references = {reference for node in nodes for reference in node.references()} | {name}
    if any(reference.startswith("b.") for reference in references):
        return None
    return StageProgram(
        stage=0,
        num_stages=1,
        symbols=tuple(symbol.name for symbol in dag.symbols),
        inputs=tuple(StageInput(spec) for spec in dag.inputs if spec.name in references),
        outputs=(StageOutput(ValueSpec(name, "int64", ()), (), differentiable=False),),
        parameters=(),
        buffers=(),
        constants=tuple(c for c in dag.constants if c.name in references),
        nodes=tuple(nodes),
    )
