"""How a batch's loss is made of its micro-batches' losses, read off the operator DAG.

A mean over tokens that ignores padding isn't the mean of its micro-batches' means, and a sum is no
mean at all. `dagflow.plan.loss_terms` finds what divides it. That is computed from each micro-batch
and from the whole batch, and a micro-batch counts for the ratio of the two. Parts of a loss that are
divided by different things are weighed one by one, see `dagflow.plan.loss_separation`. Where the DAG
says nothing, micro-batches count by rows; `dagflow.plan.check_batch` finds out if that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dagflow.errors import ResultsDiffer
from dagflow.graph.dag import OperatorDag, buffer_value
from dagflow.graph.flops import is_view
from dagflow.plan.analysis import DagAnalysis
from dagflow.plan.loss_parts import (
    ROWS,
    Factor,
    Fixed,
    Rows,
    Size,
    Targets,
    Term,
    Value,
    described,
)
from dagflow.plan.loss_separation import adds_up, separated
from dagflow.plan.loss_terms import LossReader, short_name
from dagflow_tasks.interpreter import Executable, RandomAddress
from dagflow_tasks.program import BufferUse, StageInput, StageOutput, StageProgram, ValueSpec
from dagflow_tasks.sizes import evaluate_size

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]

_PADDING = frozenset({"pad", "constant_pad_nd", "clone", "lift_fresh_copy", "detach"})


@dataclass(frozen=True)
class Share:
    """How a micro-batch's loss counts in its batch's.

    Attributes
    ----------
    weight : float
        The factor of its loss; 0 if nothing of it counts.
    terms : tuple of (value, float)
        The factors of its terms, in a DAG that takes them; `weight` is 1 then, or 0.
    """

    weight: float
    terms: tuple[tuple[str, float], ...] = ()


class LossWeights:
    """Weighs the micro-batches of a batch.

    Parameters
    ----------
    dag : OperatorDag
    read_buffer : callable, optional
        Returns a buffer that the forward pass doesn't write by name, or None if there is no value.

    Attributes
    ----------
    dag : OperatorDag
        What is to be run on the micro-batches.
    terms : tuple of Term
        What divides the parts that the loss adds up: several where these are weighed one by one.
    obstacle : str
        Why no weights of micro-batches would be right, as a sentence; empty if some are.
    """

    def __init__(
        self,
        dag: OperatorDag,
        read_buffer: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> None:
        analysis = DagAnalysis(dag)
        reader = LossReader(analysis)
        self.dag, self.terms = separated(reader)
        self.obstacle = reader.obstacle
        names = {name for term in self.terms for factor, _ in term for name in _needed(factor)}
        program = _program(analysis, sorted(names))
        buffers = {use.value: read_buffer(use.buffer) for use in program.buffers}
        self._buffers = {name: t for name, t in buffers.items() if t is not None}
        if len(self._buffers) < len(buffers):  # of a model without weights
            self.dag, self.terms = dag, (ROWS,)
        self._executable = Executable(program, torch.device("cpu"))

    @cached_property
    def need_values(self) -> bool:
        """Whether weights depend on what is in the batch, not only on its shape.

        Targets that are only moved and padded all count: a batch of tokens ignores none.
        """
        return any(
            isinstance(factor, Value)
            or (isinstance(factor, Targets) and not self._moves_only(factor))
            for term in self.terms
            for factor, _ in term
        )

    def _moves_only(self, factor: Targets) -> bool:
        if factor.class_weight is not None:
            return False
        nodes = self._executable.program.nodes
        return all(is_view(node.op) or short_name(node.op) in _PADDING for node in nodes)

    def __call__(
        self,
        parts: Sequence[Tensors],
        sizes: Sequence[Sizes],
        whole: tuple[Tensors, Sizes] | None,
    ) -> list[Share]:
        """Return how each micro-batch's loss counts in the batch's.

        Parameters
        ----------
        parts, sizes
            Tensors, by value name, and sizes of each micro-batch.
        whole
            Those of the batch; None if the DAG isn't right for as many rows.

        Raises
        ------
        ResultsDiffer
            If no weights make it the sum of its micro-batches' losses.
        """
        if self.obstacle and len(parts) > 1:
            raise ResultsDiffer(self.obstacle)
        divisors = [self._divisors(part, size) for part, size in zip(parts, sizes, strict=True)]
        if len(parts) == 1:
            weights = [[float(bool(divisor)) for divisor in divisors[0]]]
        else:
            totals = self._totals(divisors, whole)
            weights = [
                [d / total if total else 0.0 for d, total in zip(divisor, totals, strict=True)]
                for divisor in divisors
            ]
        return self._shares(weights)

    def _totals(
        self, divisors: Sequence[Sequence[float]], whole: tuple[Tensors, Sizes] | None
    ) -> Sequence[float]:
        """Return what each term of the batch is divided by."""
        if all(map(adds_up, self.terms)):
            return [math.fsum(column) for column in zip(*divisors, strict=True)]
        if whole is not None:
            return self._divisors(*whole)
        # Then all micro-batches have the same sizes.
        totals = []
        for term, column in zip(self.terms, zip(*divisors, strict=True), strict=True):
            counted = tuple(factor for factor in term if not isinstance(factor[0], Size))
            if counted and not adds_up(counted):
                raise ResultsDiffer(
                    f"The loss has a part that is {described(term)}, which can't be told of a whole "
                    "batch: the model is right for as many rows as a micro-batch has, and no more. "
                    "What to do: train with num_microbatches=1, or have the model take any number "
                    "of rows."
                )
            totals.append(math.fsum(column) if counted else column[0])
        return totals

    def _shares(self, weights: Sequence[Sequence[float]]) -> list[Share]:
        names = self.dag.term_weights
        if not names:
            return [Share(weight) for (weight,) in weights]
        # What is the same for every batch makes no batch count.
        counting = [k for k, term in enumerate(self.terms) if not _is_fixed(term)]
        of_batch = any(row[k] for row in weights for k in counting)
        return [
            Share(float(of_batch and any(row)), tuple(zip(names, row, strict=True)))
            for row in weights
        ]

    def _divisors(self, tensors: Tensors, sizes: Sizes) -> list[float]:
        """Return what each term is divided by."""
        values = {**tensors, **self._buffers, **self._executable.constants}
        names = {i.value.name for i in self._executable.program.inputs} | self._buffers.keys()
        given = {name: value for name, value in values.items() if name in names}
        with torch.no_grad():
            values |= self._executable.run(given, sizes, RandomAddress(0, 0, 0))
            return [
                math.prod(_power(_evaluate(factor, values, sizes), p) for factor, p in term)
                for term in self.terms
            ]


def _is_fixed(term: Term) -> bool:
    return any(isinstance(factor, Fixed) for factor, _ in term)


def _power(value: float, exponent: int) -> float:
    return value if exponent > 0 else (1 / value if value else math.inf)


def _needed(factor: Factor) -> list[str]:
    """Return the values that a factor is computed from."""
    if isinstance(factor, Value):
        return [factor.name]
    if isinstance(factor, Targets):
        return [factor.target, *([factor.class_weight] if factor.class_weight else [])]
    return []


def _evaluate(factor: Factor, values: Tensors, sizes: Sizes) -> float:
    if isinstance(factor, Rows | Fixed):
        return float(
            next(iter(t.shape[0] for n, t in values.items() if n[:3] == "in." and t.dim()))
        )
    if isinstance(factor, Size):
        return float(evaluate_size(factor.expression, sizes))
    if isinstance(factor, Value):
        return float(values[factor.name])
    target = values[factor.target]
    counted = target != evaluate_size(factor.ignore_index, sizes)
    if factor.class_weight is None:
        return float(counted.sum())
    return float(values[factor.class_weight].double()[target[counted]].sum())


def _program(analysis: DagAnalysis, names: Sequence[str]) -> StageProgram:
    """Return a program that computes values without parameters."""
    members = set(analysis.needed_for(names))
    dag = analysis.dag
    nodes = tuple(node for node in dag.nodes if node.name in members)
    references = {reference for node in nodes for reference in node.references()} | {*names}
    return StageProgram(
        stage=0,
        num_stages=1,
        symbols=tuple(symbol.name for symbol in dag.symbols),
        inputs=tuple(StageInput(spec) for spec in dag.inputs if spec.name in references),
        outputs=tuple(
            StageOutput(ValueSpec(name, "int64", ()), (), differentiable=False)
            for name in names
            if name in members
        ),
        parameters=(),
        buffers=tuple(
            BufferUse(buffer_value(b.name), b.name, b.dtype, b.shape, False, 0)
            for b in dag.buffers
            if buffer_value(b.name) in references
        ),
        constants=tuple(c for c in dag.constants if c.name in references),
        nodes=nodes,
    )
