"""What happens in a run or a deployment, as data: told to people, programs, the store and dask's dashboard.

An `Event` says one thing that has happened. An `EventStream` hands each to everybody who listens, in the
order in which they were told. Workers are named as `dagflow workers` names them, and by their addresses.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distributed import Client

from dagflow.swarm.clusters import in_background

# dask's topic: `client.get_events(EVENTS)`, `client.subscribe_topic(EVENTS, handler)`. The scheduler keeps
# the last thousand (dask's distributed.admin.low-level-log-length).
EVENTS = "dagflow-events"


@dataclass(frozen=True)
class Event:
    """Something that has happened."""

    @property
    def kind(self) -> str:
        """What has happened, in a word or two: ``"worker-left"``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()

    def text(self) -> str:
        """Return a sentence for people; empty where others say it."""
        return ""

    def to_json(self) -> dict[str, Any]:
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Noted(Event):
    """Something that only people need to know."""

    said: str

    def text(self) -> str:
        return self.said


@dataclass(frozen=True)
class WorkerEvent(Event):
    """Something that has happened to a worker.

    Attributes
    ----------
    worker : str
        Its address.
    name : str
        By which its owner calls it; its address where it has none.
    """

    worker: str
    name: str


@dataclass(frozen=True)
class WorkerJoined(WorkerEvent):
    """A worker is there.

    Attributes
    ----------
    memory_bytes : int or None
        What it offers.
    """

    memory_bytes: int | None = None


@dataclass(frozen=True)
class WorkerLeft(WorkerEvent):
    """A worker is gone, or can't be reached.

    Attributes
    ----------
    stages : tuple of int
        That it had.
    how : str
        In words; empty if it just went.
    """

    stages: tuple[int, ...] = ()
    how: str = ""

    def text(self) -> str:
        if not self.how:
            return ""
        return (
            f"The worker {self.worker} {self.how}, with stage {', '.join(map(str, self.stages))}."
        )


@dataclass(frozen=True)
class WorkerStalled(WorkerEvent):
    """A worker hasn't finished anything for several times as long as its tasks usually take.

    Attributes
    ----------
    seconds : float
        For which it hasn't.
    frozen : bool
        Whether it doesn't answer either; otherwise it is slow.
    stages : tuple of int
        That it has.
    """

    seconds: float
    frozen: bool
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class WorkerRecovered(WorkerEvent):
    """A worker that had stalled goes on."""


@dataclass(frozen=True)
class WorkerExcluded(WorkerEvent):
    """A worker is there, and gets no stage.

    Attributes
    ----------
    why : str
    """

    why: str


@dataclass(frozen=True)
class StagePlaced(WorkerEvent):
    """A stage is a worker's from now on.

    Attributes
    ----------
    stage : int
    before : str
        The address of the worker that had it; empty if nobody had.
    """

    stage: int
    before: str = ""


@dataclass(frozen=True)
class StageRestored(WorkerEvent):
    """A worker has a stage's weights: read from a snapshot, and brought on by a replay of the journal.

    Attributes
    ----------
    stage : int
    step : int
        Steps that the weights have taken.
    replayed : int
        Steps of these that were computed again.
    seconds : float
        That all of it took.
    num_bytes : int
        Of weights, buffers and the optimizer's moments.
    """

    stage: int
    step: int
    replayed: int
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class SnapshotCommitted(Event):
    """A snapshot is complete.

    Attributes
    ----------
    step : int
        Steps that its weights have taken.
    seconds : float
        Since the first of its tasks was handed out.
    num_bytes : int
        That it takes in the store, with what it shares with earlier ones.
    """

    step: int
    seconds: float
    num_bytes: int


class EventStream:
    """Hands events to everybody who listens. Safe to use from any thread.

    Parameters
    ----------
    listeners : callables
        Each is called with every event, one event at a time.
    """

    def __init__(self, *listeners: Callable[[Event], object]) -> None:
        self._listeners = list(listeners)
        self._lock = threading.RLock()

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Hand further events to one more."""
        self._listeners.append(listener)

    def leave(self, listener: Callable[[Event], object]) -> None:
        """Hand no more events to one."""
        self._listeners.remove(listener)

    def tell(self, event: Event) -> None:
        with self._lock:
            for listener in list(self._listeners):
                listener(event)

    def note(self, text: str) -> None:
        """Tell people something."""
        self.tell(Noted(text))


class Announcer:
    """A listener that logs events under dask's topic `EVENTS`; nobody waits for that.

    Parameters
    ----------
    client : Client
    facts : mapping
        Added to every message: of which run or deployment it is.
    """

    def __init__(self, client: Client, facts: Mapping[str, Any]) -> None:
        self._client = client
        self._facts = facts

    def __call__(self, event: Event) -> None:
        if self._client.status != "running":
            return
        message = {**self._facts, "time": time.time(), "event": event.kind, **event.to_json()}
        in_background(self._client, self._client.scheduler.log_event(topic=EVENTS, msg=message))
