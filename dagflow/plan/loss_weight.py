"""How a batch's loss is made of its micro-batches' losses, read off the operator DAG.

A mean over tokens that ignores padding isn't the mean of its micro-batches' means, and a sum is no
mean at all. From the loss backwards, through operators that are linear, this finds what divides it:
rows, targets that count, their classes' weights, a mask's sum, or nothing. What divides is computed
from each micro-batch and from the whole batch, and a micro-batch counts for the ratio of the two.
Where the DAG says nothing, micro-batches count by rows; `dagflow.plan.check` finds out if that is
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dagflow.errors import BatchInvalid
from dagflow.graph.dag import OperatorDag, buffer_value
from dagflow.graph.flops import is_view
from dagflow.plan.analysis import DagAnalysis
from dagflow_tasks.interpreter import Executable, RandomAddress
from dagflow_tasks.operators import Node, dtype_of, schema_of
from dagflow_tasks.program import BufferUse, StageInput, StageOutput, StageProgram, ValueSpec
from dagflow_tasks.sizes import evaluate_size

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]

_MEAN, _SUM = 1, 2
_IGNORE_INDEX = -100
# Terms of a loss are weighed alike if their weights differ by rounding only.
_SAME_WEIGHT = 1e-6

_CROSS_ENTROPIES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"})
# What hands a loss on, but for a constant factor.
# fmt: off
_PASSED_ON = frozenset([
    "to", "_to_copy", "clone", "alias", "detach", "neg", "view", "reshape", "squeeze", "unsqueeze",
    "contiguous", "flatten", "stack", "cat",
])
# fmt: on
_PADDING = frozenset({"pad", "constant_pad_nd", "clone", "lift_fresh_copy", "detach"})


@dataclass(frozen=True)
class Rows:
    """A mean over rows, or over elements of which each row has as many."""


@dataclass(frozen=True)
class Size:
    """A number that follows from the batch's sizes."""

    expression: Any


@dataclass(frozen=True)
class Value:
    """A scalar that the DAG computes from the batch without parameters: a mask's sum."""

    name: str


@dataclass(frozen=True)
class Targets:
    """Targets that aren't ignored, each by its class's weight if classes have weights."""

    target: str
    ignore_index: int
    class_weight: str | None = None


Factor = Rows | Size | Value | Targets
Term = tuple[tuple[Factor, int], ...]
"""Factors, with their exponents 1 or -1, of what divides a part of the loss. A sum has none."""


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
    """

    def __init__(
        self,
        dag: OperatorDag,
        read_buffer: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> None:
        self._dag = dag
        self._analysis = DagAnalysis(dag)
        self.terms = _Reader(self._analysis).loss()
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
        return all(is_view(node.op) or _short(node.op) in _PADDING for node in nodes)

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
        """
        divisors = [self._divisors(part, size) for part, size in zip(parts, sizes, strict=True)]
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
    counted = target != factor.ignore_index
    if factor.class_weight is None:
        return float(counted.sum())
    return float(values[factor.class_weight].double()[target[counted]].sum())


class _Reader:
    """Walks from the loss backwards, and finds what divides it."""

    def __init__(self, analysis: DagAnalysis) -> None:
        self.analysis = analysis
        self.dag = analysis.dag
        self.by_name = {node.name: node for node in self.dag.nodes}
        self.given = {spec.name for spec in self.dag.inputs} | {c.name for c in self.dag.constants}
        self.given |= {buffer_value(b.name) for b in self.dag.buffers if not b.mutated}
        self.rows = {symbol.name for symbol in self.dag.symbols if symbol.dim == 0}
        self.from_batch = {spec.name for spec in self.dag.inputs}
        for node in self.dag.nodes:
            if not self.from_batch.isdisjoint(node.references()):
                self.from_batch.add(node.name)

    def loss(self) -> tuple[Term, ...]:
        # Without parts that are the same for every batch (a penalty on weights): those want weights
        # that add up to 1, which only a mean's do.
        fixed: Term = ()
        found = list(dict.fromkeys(self._terms(self.dag.loss)))
        terms = [term for term in found if term is not None]
        if not terms or (None in found and fixed in terms):
            return (((Rows(), 1),),)
        return tuple(terms)

    def _terms(self, name: str) -> list[Term | None]:
        """Return the terms of a value that holds part of the loss; None for one without a batch."""
        node = self.by_name.get(name)
        if name not in self.from_batch:
            return [None]
        unknown: list[Term | None] = [((Rows(), 1),)]
        if node is None:
            return unknown
        op, tensors = _short(node.op), list(node.references())
        reduction = _argument(node, "reduction")
        if op in _CROSS_ENTROPIES:
            return self._cross_entropy(node) or unknown
        if reduction in (_MEAN, _SUM):
            return unknown if reduction == _MEAN else [()]
        if op in ("sum", "mean", "nansum"):
            if self._has_rows(tensors[0]):
                if self._has_rows(name):
                    return unknown
                return [()] if op != "mean" else unknown
            return self._terms(tensors[0])
        if op in _PASSED_ON or (op == "select" and not self._has_rows(tensors[0])):
            return [term for tensor in tensors for term in self._terms(tensor)]
        if op in ("add", "sub", "rsub"):
            return [term for tensor in tensors for term in self._terms(tensor)]
        if op in ("mul", "div"):
            return self._product(node, -1 if op == "mul" else 1) or unknown
        return unknown

    def _cross_entropy(self, node: Node) -> list[Term | None] | None:
        target, weight = _argument(node, "target"), _argument(node, "weight")
        reduction = _argument(node, "reduction", _MEAN)
        if reduction == _SUM:
            return [()]
        if reduction != _MEAN or self._dtype(target["ref"]).is_floating_point:
            return None
        names = [target["ref"], *([weight["ref"]] if weight is not None else [])]
        if not all(self._is_known(name) for name in names):
            return None
        ignored = _argument(node, "ignore_index", _IGNORE_INDEX)
        factor = Targets(names[0], int(ignored), names[1] if len(names) > 1 else None)
        return [((factor, 1),)]

    def _product(self, node: Node, power: int) -> list[Term | None] | None:
        """Return the terms of a quotient by, or a product with, what isn't part of the loss."""
        first, second = node.args[0], node.args[1]
        if "rounding_mode" in node.kwargs:
            return None
        if power < 0 and not self._holds_loss(first):
            first, second = second, first  # a * b is b * a
        if not self._holds_loss(first) or self._holds_loss(second):
            return None
        terms = self._terms(first["ref"])
        if not isinstance(second, Mapping):
            return terms
        factor: Factor
        if "size" in second:
            factor = Size(_hashable(second["size"]))
        elif second.get("ref") not in self.from_batch:
            return terms
        elif self._is_known(second["ref"]) and not self._shape(second["ref"]):
            factor = Value(second["ref"])
        else:
            return None
        return [term if term is None else (*term, (factor, power)) for term in terms]

    def _holds_loss(self, argument: Any) -> bool:
        """Tell whether an argument depends on the batch and on parameters."""
        name = argument.get("ref") if isinstance(argument, Mapping) else None
        return name in self.from_batch and name in self.by_name and not self._is_known(name)

    def _is_known(self, name: str) -> bool:
        """Tell whether a value can be computed from the batch alone."""
        return name in self.analysis.free_of_parameters or name in self.given

    def _dtype(self, name: str) -> torch.dtype:
        if name in self.by_name:
            return dtype_of(self.dag.info[name].outputs[0][0])
        return next((dtype_of(s.dtype) for s in self.dag.inputs if s.name == name), torch.int64)

    def _shape(self, name: str) -> tuple[Any, ...]:
        if name in self.by_name:
            return self.dag.info[name].outputs[0][1]
        return next((spec.shape for spec in self.dag.inputs if spec.name == name), ())

    def _has_rows(self, name: str) -> bool:
        """Tell whether a value grows with the batch; a scalar doesn't."""
        shape = self._shape(name)
        return bool(shape) and (not self.rows or any(_mentions(size, self.rows) for size in shape))


def _short(op: str) -> str:
    return op.split(".")[1] if "." in op else op


def _hashable(expression: Any) -> Any:
    return tuple(map(_hashable, expression)) if isinstance(expression, list) else expression


def _mentions(size: Any, symbols: set[str]) -> bool:
    if isinstance(size, (list, tuple)):
        return any(_mentions(part, symbols) for part in size[1:])
    return size in symbols


def _argument(node: Node, name: str, default: Any = None) -> Any:
    """Return an operator's argument by its formal name."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = schema_of(node.op)
    for position, formal in enumerate(schema.arguments if schema is not None else ()):
        if formal.name == name:
            return node.args[position] if position < len(node.args) else formal.default_value
    return default


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
