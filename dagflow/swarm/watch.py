"""Watches the swarm from inside the scheduler: which workers have stalled, by the rule of `health`.

A worker is slow by its own measure and its peers': every stage's tasks take about as long as they took
before. Slow or frozen, a worker that has work and doesn't finish it has stalled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dagflow.swarm.health import is_frozen, slow_after

TOPIC = "dagflow"
_REMEMBERED = 16
# Snapshots are written beside the stage's tasks; rebuilding takes as long as there are steps.
_BESIDE = frozenset({"save"})
_AS_LONG_AS_IT_TAKES = frozenset({"restore", "progress", "copy"})

Kind = tuple[str, Any]  # what a task does, and its stage


@dataclass
class _Busy:
    """What one worker has been given and not given back."""

    since: float
    keys: dict[Any, Kind] = field(default_factory=dict)
    stalled: bool = False
    silent: bool = False


@dataclass
class StallWatch:
    """Decides who is stalled, from what happens to tasks; knows no dask.

    Attributes
    ----------
    tell : callable
        Called with a message for whoever drives a run.
    clock : callable
        Seconds.
    """

    tell: Callable[[Mapping[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    busy: dict[str, _Busy] = field(default_factory=dict)
    longest: dict[Kind, deque[float]] = field(default_factory=dict)

    def given(self, worker: str, key: Any) -> None:
        """A worker was given a task."""
        if kind_of(key)[0] in _BESIDE:
            return
        state = self.busy.setdefault(worker, _Busy(self.clock()))
        if not state.keys:
            state.since = self.clock()
        state.keys[key] = kind_of(key)

    def back(self, worker: str, key: Any, seconds: float | None) -> None:
        """A worker is done with a task, or rid of it; `seconds` if it has computed it."""
        state = self.busy.get(worker)
        if state is None or key not in state.keys:
            return
        kind = state.keys.pop(key)
        state.since = self.clock()
        if seconds is not None:
            self.longest.setdefault(kind, deque(maxlen=_REMEMBERED)).append(seconds)
        if state.stalled and seconds is not None:
            state.stalled = state.silent = False
            self.tell({"action": "recovered", "worker": worker})

    def gone(self, worker: str) -> None:
        """A worker has left."""
        self.busy.pop(worker, None)

    def look(self, silence: Callable[[str], float], running: Callable[[str], float]) -> None:
        """Tell of workers that have stalled, or are heard of again.

        Parameters
        ----------
        silence
            Seconds since a worker was last heard of.
        running
            Seconds for which a worker has been running what it runs, by its own last account. One
            that waits for a frozen worker's results isn't slow itself.
        """
        now = self.clock()
        for worker, state in self.busy.items():
            quiet = silence(worker)
            if state.stalled and not state.keys and not is_frozen(quiet, owes_answer=True):
                state.stalled = state.silent = False
                self.tell({"action": "recovered", "worker": worker})
            if state.stalled and state.silent:
                continue
            seconds = now - state.since if state.keys else 0.0
            limit = self.limit(state)
            silent = is_frozen(quiet, owes_answer=seconds > limit)
            stalled = silent or min(seconds, running(worker)) > limit
            if (stalled and not state.stalled) or (silent and not state.silent):
                state.stalled, state.silent = True, silent
                message = {"action": "stalled", "worker": worker, "seconds": seconds}
                self.tell({**message, "silent": silent})

    def limit(self, state: _Busy) -> float:
        """Return how long a worker may be busy with what it has before it is stalled."""
        longest = []
        for kind in state.keys.values():
            known = self.longest.get(kind)
            if known is None or kind[0] in _AS_LONG_AS_IT_TAKES:
                return float("inf")
            longest.append(max(known))
        return slow_after(longest)


def kind_of(key: Any) -> Kind:
    """Return what a task's duration depends on: ``("forward", 2)``.

    The key's prefix ends in the attempt's number, which says nothing about how long it takes.
    """
    return str(key[0]).partition("-")[0], key[2]


def is_ours(key: Any) -> bool:
    """Tell whether a key is one of a step graph's."""
    return type(key) is tuple and len(key) >= 3 and "-" in str(key[0]) and type(key[1]) is int
