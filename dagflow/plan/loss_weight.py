"""How a batch's loss is made of its micro-batches' losses, read off the operator DAG.

A mean over tokens that ignores padding isn't the mean of its micro-batches' means, and a sum is no
mean at all. `dagflow.plan.loss_terms` finds what divides it. That is computed from each micro-batch
and from the whole batch, and a micro-batch counts for the ratio of the two. Where the DAG says
nothing, micro-batches count by rows; `dagflow.plan.check` finds out if that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from dagflow.errors import BatchInvalid, ResultsDiffer
from dagflow.graph.dag import OperatorDag, buffer_value
from dagflow.graph.flops import is_view
from dagflow.plan.analysis import DagAnalysis
from dagflow.plan.loss_terms import Factor, LossReader, Rows, Size, Targets, Term, Value, short_name
from dagflow_tasks.interpreter import Executable, RandomAddress
from dagflow_tasks.program import BufferUse, StageInput, StageOutput, StageProgram, ValueSpec
from dagflow_tasks.sizes import evaluate_size

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]

# Terms of a loss are weighed alike if their weights differ by rounding only.
_SAME_WEIGHT = 1e-6

_PADDING = frozenset({"pad", "constant_pad_nd", "clone", "lift_fresh_copy", "detach"})


class LossWeights:
    """Weighs the micro-batches of a batch.

    Parameters
    ----------
    dag : OperatorDag
    read_buffer : callable, optional
        Returns a buffer that the forward pass doesn't write by name, or None if there is no value.

    Attributes
    ----------
    terms : tuple of Term
        What divides the parts that the loss adds up; weights hold if all parts agree on them.
    obstacle : str
        Why no weights of micro-batches would be right, as a sentence; empty if some are.
    """

    def __init__(
        self,
        dag: OperatorDag,
        read_buffer: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> None:
        self._dag = dag
        self._analysis = DagAnalysis(dag)
        reader = LossReader(self._analysis)
        self.terms = reader.loss()
        self.obstacle = reader.obstacle
        names = {name for term in self.terms for factor, _ in term for name in _needed(factor)}
        program = _program(self._analysis, sorted(names))
        buffers = {use.value: read_buffer(use.buffer) for use in program.buffers}
        self._buffers = {name: t for name, t in buffers.items() if t is not None}
        if len(self._buffers) < len(buffers):  # of a model without weights
            self.terms = (((Rows(), 1),),)
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
        where: str,
    ) -> list[float]:
        """Return the factor with which each micro-batch's loss counts in the batch's.

        Where nothing of a micro-batch counts it is 0.

        Parameters
        ----------
        parts, sizes
            Tensors, by value name, and sizes of each micro-batch.
        whole
            Those of the batch; None if the DAG isn't right for as many rows.
        where : str
            What to call the batch in an error: "step 12".

        Raises
        ------
        BatchInvalid
            If the loss adds up parts that weigh the micro-batches differently.
        ResultsDiffer
            If no weights make it the sum of its micro-batches' losses.
        """
        if self.obstacle and len(parts) > 1:
            raise ResultsDiffer(self.obstacle)
        divisors = [self._divisors(part, size) for part, size in zip(parts, sizes, strict=True)]
        if len(parts) == 1:
            return [float(any(divisors[0]))]
        totals = [math.fsum(column) for column in zip(*divisors, strict=True)]
        if whole is not None and not all(map(_adds_up, self.terms)):
            totals = self._divisors(*whole)
        found = [
            [divisor[k] / total if total else 0.0 for divisor in divisors]
            for k, total in enumerate(totals)
        ]
        for other in found[1:]:
            if not all(map(_are_the_same, found[0], other)):
                raise BatchInvalid(
                    f"The loss adds up means over different things, and in {where} they weigh its "
                    f"{len(parts)} micro-batches differently: {_listed(found[0])} and "
                    f"{_listed(other)}. No one weight is right for both; train with "
                    "num_microbatches=1, or divide all parts of the loss by the same number."
                )
        return found[0]

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


def _adds_up(term: Term) -> bool:
    """Tell whether what divides the batch is the sum of what divides its micro-batches."""
    return len(term) == 1 and isinstance(term[0][0], Rows | Targets) and term[0][1] == 1


def _are_the_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME_WEIGHT)


def _listed(weights: Sequence[float]) -> str:
    shown = ", ".join(f"{weight:.4g}" for weight in weights[:8])
    return f"({shown}{', ...' if len(weights) > 8 else ''})"


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
    if isinstance(factor, Rows):
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
    members: set[str] = set()
    wanted = list(names)
    while wanted:
        value = wanted.pop()
        if value in members or value not in analysis.position:
            continue
        members.add(value)
        wanted += analysis.dag.nodes[analysis.position[value]].references()
        wanted += [node.name for node in analysis.companions(value)]
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
