"""Numbers that a batch is summed up to, without parameters: every micro-batch is given the whole batch's.

How many tokens a mask leaves, the share of a class, the targets' mean: what a loss divides by or weighs
its rows with. A micro-batch's own would make another loss of it; the whole batch's are what the model
itself would have, and the loss is a sum over rows again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dagflow.errors import ResultsDiffer
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag, OperatorInfo
from dagflow.microbatches.loss_terms import LossReader
from dagflow.microbatches.parameterless import KnownValues, ReadBuffer, Sizes, Tensors
from dagflow_tasks.program.nodes import Node, dtype_of
from dagflow_tasks.program.operators import WHOLE
from dagflow_tasks.train.references import OF_BATCH

# They travel with each micro-batch, and are kept in the ledger.
_MOST_NUMBERS = 1024


class BatchNumbers:
    """Finds what to compute from whole batches, and computes it.

    Attributes
    ----------
    dag : OperatorDag
        Reads the numbers instead of computing them.
    reader : LossReader
        Of that DAG.
    """

    def __init__(self, dag: OperatorDag, read_buffer: ReadBuffer) -> None:
        analysis = DagAnalysis(dag)
        self._reader = LossReader(analysis)
        found = self._found()
        self._values = KnownValues(analysis, list(dict.fromkeys(found.values())), read_buffer)
        if not self._values.complete:
            found = {}
        self._names = tuple(dict.fromkeys(found.values()))
        self.dag = self._given(found) if found else dag
        self.reader = LossReader(DagAnalysis(self.dag)) if found else self._reader

    @property
    def need_values(self) -> bool:
        """Whether they depend on what is in the batch."""
        return bool(self._names) and bool(self._values.program.batch_inputs)

    def __call__(
        self,
        parts: Sequence[Tensors],
        sizes: Sequence[Sizes],
        whole: tuple[Tensors, Sizes] | None,
    ) -> dict[str, Any]:
        """Return a batch's numbers, by the values that hold them.

        Raises
        ------
        ResultsDiffer
            If the DAG isn't right for as many rows, and what it computes from parts doesn't add up.
        """
        if not self._names:
            return {}
        if len(parts) == 1:
            whole = parts[0], sizes[0]
        if whole is not None:
            values = self._values(*whole)
            return {_number(name): values[name].tolist() for name in self._names}
        for name in self._names:
            if not self._reader.adds_up(name):
                raise ResultsDiffer(
                    f"The loss uses {name!r}, which the whole batch is summed up to, and the model is "
                    "right for as many rows as a micro-batch has, and no more. What to do: train with "
                    "num_microbatches=1, or have the model take any number of rows."
                )
        found = [self._values(part, size) for part, size in zip(parts, sizes, strict=True)]
        sums = {n: torch.stack([values[n] for values in found]).sum(0) for n in self._names}
        return {_number(name): total.tolist() for name, total in sums.items()}

    def _found(self) -> dict[tuple[str, str], str]:
        """Return which operators on the way to the loss read numbers of the batch, and which.

        By operator and value the value that holds the number: in memory that is written in place it
        is the last writer's. What a buffer counts is left alone: it counts every micro-batch.
        """
        reader, analysis = self._reader, self._reader.analysis
        needed = analysis.needed_for([reader.dag.loss])
        numbers = {name for name in needed if self._is_number(name)}
        found: dict[tuple[str, str], str] = {}
        for name in needed:
            if name in numbers or analysis.storage[name].startswith("b."):
                continue
            for read in reader.by_name[name].references():
                last = next((w.name for w in reversed(analysis.companions(read))), read)
                is_later = analysis.position.get(last, -1) < analysis.position[name]
                if is_later and read in numbers and last in numbers:
                    found[name, read] = last
        return found

    def _is_number(self, name: str) -> bool:
        """Tell whether a value is a few numbers that come from rows and need no parameters."""
        outputs = self._reader.dag.info[name].outputs
        if len(outputs) != 1 or not (
            self._reader.is_statistic(name) and self._reader.is_known(name)
        ):
            return False
        ((dtype, shape),) = outputs
        few = all(isinstance(size, int) for size in shape) and math.prod(shape) <= _MOST_NUMBERS
        return few and not dtype_of(dtype).is_complex

    def _given(self, found: Mapping[tuple[str, str], str]) -> OperatorDag:
        dag = self._reader.dag
        nodes, info = [], dict(dag.info)
        for node in dag.nodes:
            read = {v: _given_name(last) for (name, v), last in found.items() if name == node.name}
            nodes.append(node.reading(read))
            if node.name in self._names:
                given = _given_node(node, *dag.info[node.name].outputs[0])
                nodes.append(given)
                info[given.name] = OperatorInfo(dag.info[node.name].outputs, 0, 0)
        numbers = (*dag.numbers, *map(_number, self._names))
        given_dag = replace(dag, nodes=tuple(nodes), info=info, numbers=numbers)
        return self._without_what_was_for(given_dag)

    def _without_what_was_for(self, given: OperatorDag) -> OperatorDag:
        """Drop the nodes that only computed the numbers."""
        before = set(self._reader.analysis.needed_for([given.loss]))
        others = [node.name for node in self._reader.dag.nodes if node.name not in before]
        kept = set(DagAnalysis(given).needed_for([given.loss, *others]))
        nodes = tuple(node for node in given.nodes if node.name in kept)
        return replace(given, nodes=nodes, info={n.name: given.info[n.name] for n in nodes})


def _given_name(value: str) -> str:
    return f"{value}.whole"


def _number(value: str) -> str:
    return OF_BATCH + _given_name(value)


def _given_node(node: Node, dtype: str, shape: tuple[Any, ...]) -> Node:
    """Return the node that stands for what another computes, with the whole batch's number."""
    arguments = ({"ref": _number(node.name)}, list(shape), {"dtype": dtype}, {"device": "stage"})
    return replace(node, name=_given_name(node.name), op=WHOLE, args=arguments, kwargs={})
