"""What a loss consists of: parts that are added up, and what each is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dagflow_tasks.program.sizes import size_text


@dataclass(frozen=True)
class Rows:
    """A mean over rows, or over elements of which each row has as many."""

    adds_up: ClassVar[bool] = True


@dataclass(frozen=True)
class Fixed:
    """What is the same for every batch, a penalty on weights say: counted as a mean over rows is."""

    adds_up: ClassVar[bool] = True


@dataclass(frozen=True)
class Size:
    """A number that follows from the batch's sizes."""

    expression: Any
    adds_up: ClassVar[bool] = False


@dataclass(frozen=True)
class Whole:
    """A scalar that the whole batch has been summed up to: a mask's sum. Micro-batches are given it.

    It changes no weight, unless it is 0: then nothing counts.
    """

    name: str
    adds_up: ClassVar[bool] = False


@dataclass(frozen=True)
class Targets:
    """Targets that aren't ignored, each by its class's weight if classes have weights."""

    target: str
    ignore_index: Any  # a number, or a size
    class_weight: str | None = None
    adds_up: ClassVar[bool] = True


Factor = Rows | Fixed | Size | Whole | Targets
Term = tuple[tuple[Factor, int], ...]
"""Factors, with their exponents 1 or -1, of what divides a part of the loss. A sum has none."""

ROWS: Term = ((Rows(), 1),)
FIXED: Term = ((Fixed(), 1),)


@dataclass(frozen=True)
class Part:
    """A part of the loss in a value.

    Attributes
    ----------
    node : str
        The operator that puts it there.
    of : str or None
        The value that it has it from; None if the part begins here.
    term : Term
        What it is divided by here.
    """

    node: str
    of: str | None
    term: Term = ()


def times(one: Term, other: Term) -> Term:
    """Return what divides a part that is divided by both."""
    return tuple(sorted((*one, *other), key=str))


def described(term: Term) -> str:
    """Say what a part of a loss is, for people."""
    if not term:
        return "a sum"
    words = []
    for factor, power in term:
        if isinstance(factor, Rows):
            words.append("a mean over rows")
        elif isinstance(factor, Fixed):
            words.append("what is the same for every batch")
        elif isinstance(factor, Targets):
            words.append(f"a mean over the targets {factor.target!r} that count")
        else:
            what = size_text(factor.expression) if isinstance(factor, Size) else repr(factor.name)
            words.append(f"{'divided by' if power > 0 else 'times'} {what}")
    return " ".join(words)
