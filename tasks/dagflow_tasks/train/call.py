"""A task as dask carries it: a function of this package, and arguments that other tasks' results fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dagflow_tasks.train.arguments import Arguments
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import StageRef


@dataclass(frozen=True)
class ResultSlot:
    """Stands for another task's result in the layout of a call."""

    index: int


@cache
def result_slot(index: int) -> ResultSlot:
    """Return the slot of an index, the same object each time: graphs hold very many."""
    return ResultSlot(index)


def call(function: Callable[..., Any], layout: tuple[Any, ...], *results: Any) -> Any:
    """Call a function with other tasks' results in their places.

    Results that no slot asks for are those of tasks that only had to be done before.
    """

    filled = [_filled(argument, results) for argument in layout]
    first = filled[0] if filled else None
    ref = first.ref if isinstance(first, Arguments) else first
    if type(ref) is not StageRef:
        return function(*filled)
    with CACHE.stage_lock(ref):
        return function(*filled)


def _filled(argument: Any, results: tuple[Any, ...]) -> Any:
    # Not a function inside `call`: one that calls itself is a reference cycle, and would keep the
    # results, gradients as large as the weights among them, until the garbage collector comes by.
    if type(argument) is ResultSlot:
        return results[argument.index]
    if type(argument) is tuple:
        return tuple(_filled(item, results) for item in argument)
    if isinstance(argument, Arguments):
        return argument.map(lambda item: _filled(item, results))
    return argument
