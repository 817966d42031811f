"""Who is in the swarm, as the scheduler tells it, and who of them runs which stage."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Client, Future

from dagflow.errors import SchedulerLost
from dagflow.swarm.clusters import in_background, scheduler_info
from dagflow.swarm.health import usable
from dagflow.swarm.interrupts import TICK_SECONDS
from dagflow.swarm.watch import TOPIC

_REFRESH_SECONDS = 10.0
_FRUITLESS_TICKS = 10


class ResultGone(Exception):
    """A task was done, but its result can't be had any more."""


@dataclass(eq=False)
class Membership:
    """The workers that are present, kept up to date by the scheduler's own events.

    Attributes
    ----------
    present : set of str
        Addresses.
    names : dict
        How the workers that have been heard of are called, by address.
    limits : dict
        Memory in bytes of those that say how much they have, by address.
    excluded : dict
        Why a worker that is present isn't used, by address; of those who ask `usable`.
    stalled : dict
        What the scheduler's watch says of workers that have stalled, by address.
    failures : deque of (key, address)
        Tasks that failed lately, and where.
    told : deque of mappings
        What tasks have told their driver, see `dagflow_tasks.train.cache.WorkerCache.tell`.
    """

    client: Client
    present: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    stalled: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: deque[tuple[tuple[str, ...], str]] = field(
        default_factory=partial(deque, maxlen=1024)
    )
    told: deque[Mapping[str, Any]] = field(default_factory=partial(deque, maxlen=1024))
    _scheduler: str = ""
    _refreshed: float = 0.0
    _news: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _heard: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Membership:
        # A client has one handler a topic, and may drive several runs at once.
        listeners = _LISTENERS.setdefault(self.client, [])
        listeners.append(self)
        # Also if others listen already: the scheduler may be another than when they came.
        self.client.subscribe_topic(TOPIC, partial(_tell_all, listeners))
        self.refresh()
        return self

    def __exit__(self, *_: Any) -> None:
        listeners = _LISTENERS[self.client]
        listeners[:] = [listener for listener in listeners if listener is not self]
        if not listeners:
            self.client.unsubscribe_topic(TOPIC)

    def refresh(self) -> None:
        """Ask the scheduler who is there: events can get lost with a connection.

        Raises
        ------
        SchedulerLost
            If it isn't the one that was asked before: dask's client connects to whoever answers at
            the address, without a word, and this one tells us of nothing.
        """
        with self._lock:
            self._heard.clear()
        found = scheduler_info(self.client)
        if self._scheduler not in ("", found["id"]):
            raise SchedulerLost(f"There is a new scheduler at {self.client.scheduler.address}.")
        self._scheduler = found["id"]
        with self._lock:
            self.present = set(found["workers"])
            for worker, facts in found["workers"].items():
                self._learn(worker, facts)
            for action, worker in self._heard:  # since it was asked, and maybe since it answered
                self._come_or_gone(action, worker)
        self._refreshed = time.monotonic()

    def refresh_if_old(self) -> None:
        """Ask the scheduler again if it hasn't been asked for long; raises what `refresh` does.

        A worker that left between the first question and the beginning of our subscription would
        otherwise be waited for for ever.
        """
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self.refresh()

    def usable(self) -> list[str]:
        """Return the workers that may get a stage, in a fixed order."""
        frozen = {address for address, news in self.stalled.items() if news["silent"]}
        return usable(self.present, self.excluded, frozen)

    def exclude(self, address: str, why: str) -> None:
        """Use a worker no more, for as long as it stays connected."""
        self.excluded[address] = why

    def seen(self) -> tuple[Collection[str], Mapping[str, Mapping[str, Any]]]:
        """Return who is present, and what is said of those who have stalled, at one moment."""
        with self._lock:
            return self.present, self.stalled

    def name(self, address: str) -> str:
        """Return how a worker is called, also one that has left; its address if that isn't known."""
        return self.names.get(address, address)

    def where_failed(self, key: Iterable[Any]) -> str | None:
        """Return the worker on which a task has failed last; None if that wasn't heard of."""
        named = tuple(map(str, key))
        failures = reversed(list(self.failures))
        return next((address for failed, address in failures if failed == named), None)

    def result_of(self, future: Future, look_around: Callable[[], None]) -> Any:
        """Wait for a task, and fetch its result; raises what the task has raised.

        Parameters
        ----------
        look_around
            Called meanwhile; what it raises ends the wait.

        Raises
        ------
        ResultGone
            If the worker that had the result left before it was fetched. dask would have it
            computed again by the same worker, and wait for that for ever.
        """
        future.add_done_callback(lambda _: self._news.set())
        while not future.done():
            look_around()
            self.wait(TICK_SECONDS)
        fetching = in_background(self.client, self.client.gather(future, asynchronous=True))
        try:
            for _ in range(_FRUITLESS_TICKS):
                if wait([fetching], TICK_SECONDS).done:
                    return fetching.result()
                look_around()
        finally:
            fetching.cancel()
            del fetching  # it may hold an error, whose traceback would hold it
        raise ResultGone(f"The result of {future.key} went with its worker.")

    def wait(self, seconds: float) -> None:
        """Return when there is news, such as somebody who has come or gone, or time is up."""
        self._news.wait(seconds)
        self._news.clear()

    def hear(self, event: tuple[float, Any]) -> None:
        """Take in what the scheduler's watch tells."""
        message = event[1]
        if not isinstance(message, Mapping):
            return
        action, worker = message.get("action"), message.get("worker")
        if action in ("add-worker", "remove-worker") and worker:
            with self._lock:
                self._heard.append((action, worker))
                if action == "add-worker":
                    self._learn(worker, message)
                self._come_or_gone(action, worker)
        elif action == "stalled":
            with self._lock:
                self.stalled = {**self.stalled, str(worker): message}
        elif action == "recovered":
            with self._lock:
                self.stalled = {w: m for w, m in self.stalled.items() if w != worker}
        elif action == "erred":
            self.failures.append((tuple(message["key"]), str(worker)))
        elif action == "restored":
            self.told.append(message)
        else:
            return
        self._news.set()

    def _learn(self, worker: str, facts: Mapping[str, Any]) -> None:
        self.names[worker] = str(facts.get("name", worker))
        if limit := facts.get("memory_limit"):
            self.limits[worker] = limit

    def _come_or_gone(self, action: str, worker: str) -> None:
        if action == "add-worker":
            self.excluded.pop(worker, None)
            self.present = self.present | {worker}
        else:
            self.present = self.present - {worker}
            self.stalled = {w: m for w, m in self.stalled.items() if w != worker}


_LISTENERS: WeakKeyDictionary[Client, list[Membership]] = WeakKeyDictionary()


def _tell_all(listeners: Sequence[Membership], event: tuple[float, Any]) -> None:
    for listener in listeners:
        listener.hear(event)
