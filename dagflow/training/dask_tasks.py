"""A step's tasks as dask takes them: their arguments, their places, and which goes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from dagflow.plan.schedule import BACKWARD, FORWARD, WEIGHTS, Pipeline
from dagflow.swarm.dask_internals import StepTask, Task, TaskRef
from dagflow_tasks.train import call as calling
from dagflow_tasks.train.arguments import Arguments

Key = tuple[str | int, ...]

_AT_ONCE = frozenset({"lend", "batch", "copy", "save", "recall", "restore", "progress"})
_ACTIONS = {"forward": FORWARD, "backward": BACKWARD, "weights": WEIGHTS}


def attempt_of(key: Key) -> str:
    """Return the prefix of the graph that a key is of, see `StepGraph`."""
    return str(key[0]).rpartition("-")[2]


def task(key: Key, function: Callable[..., Any], *args: Any, after: Sequence[Key] = ()) -> Task:
    """Return a dask task whose arguments may hold `TaskRef`s inside lists and `Arguments`.

    dask would make a task of every list; a step has tens of thousands of tasks, so references are
    passed side by side instead, and put back into place on the worker.
    """
    references: list[TaskRef] = []

    def template(argument: Any) -> Any:
        if isinstance(argument, TaskRef):
            references.append(argument)
            return calling.result_slot(len(references) - 1)
        if isinstance(argument, list):
            return tuple(template(item) for item in argument)
        if isinstance(argument, Arguments):
            return argument.map(template)
        return argument

    layout = tuple(template(argument) for argument in args)
    waited_for = [TaskRef(name) for name in after]
    return StepTask(key, calling.call, function, layout, *references, *waited_for)


class Priorities:
    """Gives every key its place in the schedule, as dask understands it: higher goes first.

    Travels with every graph, and is called on the scheduler: so it is what the schedule follows from,
    and the scheduler makes the schedule itself, once for each plan.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._starts: Mapping[Key, float] = {}
        self._span = 0.0

    def __reduce__(self) -> Any:
        return Priorities, (self._pipeline,)

    def __call__(self, key: Key) -> float:
        if not self._starts:
            self._starts, self._span = _starts(self._pipeline)
        kind, step, stage, *more = key
        name = str(kind).partition("-")[0]
        if name in _ACTIONS:
            start = self._starts[(_ACTIONS[name], stage, more[0])]
        elif name == "select":
            start = -1.0  # a message, hardly any work: at once
        else:
            start = -1.0 if name in _AT_ONCE else self._span - 3
        return -(int(str(step)) * self._span + start)


@lru_cache(maxsize=4)
def _starts(pipeline: Pipeline) -> tuple[Mapping[Key, float], float]:
    """Return when each action of a step starts, and how far apart two steps are."""
    schedule = pipeline.schedule()
    starts: dict[Key, float] = {
        (action.kind, action.stage, action.microbatch): start
        for action, start in schedule.starts.items()
    }
    return starts, schedule.length + 4


class Places:
    """Gives every key the address of its stage's worker."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)

    def __call__(self, key: Key) -> list[str]:
        return [self._addresses[int(str(key[2]))]]
