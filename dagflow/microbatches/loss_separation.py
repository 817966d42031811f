"""Gives each part of a loss a weight of its own, where parts are divided by different things.

Cross entropy over the targets that aren't ignored and a penalty over all tokens: no one number makes
micro-batches' losses add up to the batch's, but one for each part does. So the DAG multiplies the parts
where they part, by numbers that come with every micro-batch; below that nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dagflow.graph.dag import OperatorDag, OperatorInfo, buffer_value
from dagflow.microbatches.loss_parts import FIXED, ROWS, Term, Whole, described, times
from dagflow.microbatches.loss_terms import LossReader
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import WEIGHTED
from dagflow_tasks.train.references import WEIGHT


def separated(reader: LossReader) -> tuple[OperatorDag, tuple[Term, ...]]:
    """Return the DAG, and the terms whose weights it takes: one of them if that is right for all.

    Where parts can't be told apart, the reader has an obstacle then.
    """
    terms = reader.loss()
    real = [term for term in terms if term != FIXED]
    if not real:
        return reader.dag, (ROWS,)
    # What is the same for every batch wants weights that add up to 1: those of a mean.
    if len(real) == 1 and (len(terms) == 1 or adds_up(real[0])):
        return reader.dag, (real[0],)
    separation = _Separation(reader, terms)
    separation.descend(reader.dag.loss, ())
    return (reader.dag if reader.obstacle else separation.dag()), terms


def adds_up(term: Term) -> bool:
    """Tell whether what divides the batch is the sum of what divides its micro-batches."""
    counts = [factor for factor in term if not isinstance(factor[0], Whole)]
    return len(counts) == 1 and counts[0][1] == 1 and counts[0][0].adds_up


class _Separation:
    def __init__(self, reader: LossReader, terms: Sequence[Term]) -> None:
        self.reader = reader
        self.terms = terms
        self._above: dict[str, Term] = {}
        # Where to multiply: what an operator reads, or what it has made.
        self._read: dict[tuple[str, str], Term] = {}
        self._made: dict[str, Term] = {}

    def descend(self, value: str, above: Term) -> None:
        """Find where the parts of a value part, which is divided by something above already."""
        if value in self._above:
            if self._above[value] != above:
                self._refuse(value)
            return
        self._above[value] = above
        for part in self.reader.parts(value):
            term = times(part.term, above)
            if part.of is None:  # in memory that more is added to in place
                self._note(self._made, part.node, term, value)
                continue
            below = {times(each, term) for each in self.reader.terms(part.of)}
            if len(below) == 1:
                self._note(self._read, (part.node, part.of), below.pop(), value)
            else:
                self.descend(part.of, term)

    def _note(self, places: dict[Any, Term], place: Any, term: Term, value: str) -> None:
        if places.setdefault(place, term) != term or term not in self.terms:
            self._refuse(value)

    def _refuse(self, value: str) -> None:
        self.reader.refuse(
            self.reader.by_name[value],
            f"adds up parts that are weighed differently ({', '.join(map(described, self.terms))}) "
            "and are divided once more on the way",
        )

    def dag(self) -> OperatorDag:
        """Return the DAG that multiplies each part by its weight."""
        dag = self.reader.dag
        nodes: list[Node] = []
        info: dict[str, OperatorInfo] = dict(dag.info)
        renamed: dict[str, str] = {}

        def multiply(value: str, term: Term, reader: Node) -> str:
            weight = f"{WEIGHT}{self.terms.index(term)}"
            name = f"{reader.name}.{weight}.{value}"
            arguments = ({"ref": renamed.get(value, value)}, {"ref": weight})
            nodes.append(replace(reader, name=name, op=WEIGHTED, args=arguments, kwargs={}))
            info[name] = OperatorInfo((_form(dag, value),), 0, 0)
            return name

        for node in dag.nodes:
            reads = {of: term for (name, of), term in self._read.items() if name == node.name}
            weighed = {of: multiply(of, term, node) for of, term in reads.items()}
            nodes.append(node.reading({**renamed, **weighed}))
            if node.name in self._made:
                renamed[node.name] = multiply(node.name, self._made[node.name], node)
        return replace(
            dag,
            nodes=tuple(nodes),
            info=info,
            loss=renamed.get(dag.loss, dag.loss),
            numbers=(*dag.numbers, *(f"{WEIGHT}{k}" for k in range(len(self.terms)))),
        )


def _form(dag: OperatorDag, value: str) -> tuple[str, tuple[Any, ...]]:
    """Return a value's dtype and shape."""
    if value in dag.info:
        return dag.info[value].outputs[0]
    forms = {use: (p.dtype, p.shape) for p in dag.parameters for use in p.uses}
    forms |= {buffer_value(b.name): (b.dtype, b.shape) for b in dag.buffers}
    forms |= {spec.name: (spec.dtype, spec.shape) for spec in dag.inputs}
    forms |= {constant.name: (constant.dtype, constant.shape) for constant in dag.constants}
    return forms[value]
