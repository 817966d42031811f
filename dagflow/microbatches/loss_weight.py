"""How a batch's loss is made of its micro-batches' losses, read off the operator DAG.

A mean over tokens that ignores padding isn't the mean of its micro-batches' means, and a sum is no
mean at all. `dagflow.microbatches.loss_terms` finds what divides it. That is computed from each micro-batch
and from the whole batch, and a micro-batch counts for the ratio of the two. Parts of a loss that are
divided by different things are weighed one by one, see `dagflow.microbatches.loss_separation`. Where the DAG
says nothing, micro-batches count by rows; `dagflow.check.whole_batch` finds out if that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dagflow.errors import ResultsDiffer
from dagflow.graph.dag import OperatorDag
from dagflow.graph.flops import is_view
from dagflow.microbatches.batch_numbers import BatchNumbers
from dagflow.microbatches.loss_parts import (
    ROWS,
    Factor,
    Fixed,
    Rows,
    Size,
    Targets,
    Term,
    Whole,
    described,
)
from dagflow.microbatches.loss_separation import adds_up, separated
from dagflow.microbatches.loss_terms import short_name
from dagflow.microbatches.parameterless import KnownValues, ReadBuffer, Sizes, Tensors
from dagflow_tasks.program.sizes import evaluate_size
from dagflow_tasks.train.references import OF_BATCH, WEIGHT, Numbers

_PADDING = frozenset({"pad", "constant_pad_nd", "clone", "lift_fresh_copy", "detach"})


@dataclass(frozen=True)
class Share:
    """How a micro-batch's loss counts in its batch's.

    Attributes
    ----------
    weight : float
        The factor of its loss; 0 if nothing of it counts.
    numbers : tuple of (value, number or numbers)
        What the DAG reads of it besides, see `dagflow_tasks.train.references.Microbatch`.
    """

    weight: float
    numbers: tuple[tuple[str, Numbers], ...] = ()


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
        read_buffer: ReadBuffer = lambda name: None,
    ) -> None:
        self._numbers = BatchNumbers(dag, read_buffer)
        reader = self._numbers.reader
        self.dag, self.terms = separated(reader)
        self.obstacle = reader.obstacle
        names = {name for term in self.terms for factor, _ in term for name in _needed(factor)}
        self._values = KnownValues(reader.analysis, sorted(names), read_buffer)
        if not self._values.complete:
            self.dag, self.terms = self._numbers.dag, (ROWS,)

    def applied_to(self, dag: OperatorDag) -> OperatorDag:
        """Return `dag` as it is to be run on micro-batches, for another set of sizes if need be."""
        ours = self.dag
        return replace(dag, nodes=ours.nodes, info=ours.info, loss=ours.loss, numbers=ours.numbers)

    @cached_property
    def need_values(self) -> bool:
        """Whether weights depend on what is in the batch, not only on its shape.

        Targets that are only moved and padded all count: a batch of tokens ignores none.
        """
        return self._numbers.need_values or any(
            isinstance(factor, Targets) and not self._moves_only(factor)
            for term in self.terms
            for factor, _ in term
        )

    def _moves_only(self, factor: Targets) -> bool:
        if factor.class_weight is not None:
            return False
        nodes = self._values.program.nodes
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
        numbers = self._numbers(parts, sizes, whole)
        divisors = [self._divisors(p, size, numbers) for p, size in zip(parts, sizes, strict=True)]
        if len(parts) == 1:
            weights = [[float(bool(divisor)) for divisor in divisors[0]]]
        else:
            totals = self._totals(divisors, whole, numbers)
            weights = [
                [d / total if total else 0.0 for d, total in zip(divisor, totals, strict=True)]
                for divisor in divisors
            ]
        return self._shares(weights, tuple(numbers.items()))

    def _totals(
        self,
        divisors: Sequence[Sequence[float]],
        whole: tuple[Tensors, Sizes] | None,
        numbers: Mapping[str, Any],
    ) -> Sequence[float]:
        """Return what each term of the batch is divided by."""
        if all(map(adds_up, self.terms)):
            return [math.fsum(column) for column in zip(*divisors, strict=True)]
        if whole is not None:
            return self._divisors(*whole, numbers)
        # Then all micro-batches have the same sizes.
        totals = []
        for term, column in zip(self.terms, zip(*divisors, strict=True), strict=True):
            counted = tuple(each for each in term if not isinstance(each[0], Size | Whole))
            if counted and not adds_up(counted):
                raise ResultsDiffer(
                    f"The loss has a part that is {described(term)}, which can't be told of a whole "
                    "batch: the model is right for as many rows as a micro-batch has, and no more. "
                    "What to do: train with num_microbatches=1, or have the model take any number "
                    "of rows."
                )
            totals.append(math.fsum(column) if counted else column[0])
        return totals

    def _shares(
        self, weights: Sequence[Sequence[float]], numbers: tuple[tuple[str, Numbers], ...]
    ) -> list[Share]:
        names = [name for name in self.dag.numbers if name.startswith(WEIGHT)]
        if not names:
            return [Share(weight, numbers) for (weight,) in weights]
        # What is the same for every batch makes no batch count.
        counting = [k for k, term in enumerate(self.terms) if not _is_fixed(term)]
        of_batch = any(row[k] for row in weights for k in counting)
        return [
            Share(float(of_batch and any(row)), (*numbers, *zip(names, row, strict=True)))
            for row in weights
        ]

    def _divisors(self, tensors: Tensors, sizes: Sizes, numbers: Mapping[str, Any]) -> list[float]:
        """Return what each term is divided by."""
        values = self._values(tensors, sizes, numbers)
        return [
            math.prod(_evaluate(factor, power, values, sizes, numbers) for factor, power in term)
            for term in self.terms
        ]


def _is_fixed(term: Term) -> bool:
    return any(isinstance(factor, Fixed) for factor, _ in term)


def _needed(factor: Factor) -> list[str]:
    """Return the values that a factor is computed from."""
    if isinstance(factor, Targets):
        return [factor.target, *([factor.class_weight] if factor.class_weight else [])]
    return []


def _evaluate(
    factor: Factor, power: int, values: Tensors, sizes: Sizes, numbers: Mapping[str, Any]
) -> float:
    if isinstance(factor, Whole):
        number = numbers[OF_BATCH + factor.name]
        # 0 / 0 and 0 * (1 / 0): a mean over nothing.
        return float(number != 0 if power > 0 else not math.isinf(number))
    if isinstance(factor, Rows | Fixed):
        value: float = next(
            iter(t.shape[0] for n, t in values.items() if n[:3] == "in." and t.dim())
        )
    elif isinstance(factor, Size):
        value = evaluate_size(factor.expression, sizes)
    else:
        value = _counted(factor, values, sizes)
    return float(value) if power > 0 else (1 / value if value else 0.0)


def _counted(factor: Targets, values: Tensors, sizes: Sizes) -> float:
    target = values[factor.target]
    counted = target != evaluate_size(factor.ignore_index, sizes)
    if factor.class_weight is None:
        return float(counted.sum())
    return float(values[factor.class_weight].double()[target[counted]].sum())
