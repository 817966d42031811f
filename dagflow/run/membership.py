"""Who is in the swarm, as the scheduler tells it, and who of them runs which stage."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

_TOPIC = "all"  # where the scheduler tells of workers that come and go


@dataclass
class Membership:
    """The workers that are present, kept up to date by the scheduler's own events.

    Attributes
    ----------
    present : set of str
        Addresses.
    excluded : dict
        Why a worker that is present gets no stage, by address.
    """

    client: Client
    present: set[str] = field(default_factory=set)
    excluded: dict[str, str] = field(default_factory=dict)
    _news: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Membership:
        self.client.subscribe_topic(_TOPIC, self._heard)
        self.refresh()
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.unsubscribe_topic(_TOPIC)

    def refresh(self) -> None:
        """Ask the scheduler who is there: events can get lost with a connection."""
        self.present = set(self.client.scheduler_info()["workers"])

    def usable(self) -> list[str]:
        """Return the workers that may get a stage, in a fixed order."""
        return sorted(self.present - self.excluded.keys())

    def exclude(self, address: str, why: str) -> None:
        """Give a worker no stage any more, for as long as it stays connected."""
        self.excluded[address] = why

    def forgive(self) -> None:
        """Let excluded workers take part again: without them there is nobody."""
        self.excluded.clear()

    def wait(self, future: Future | None, seconds: float) -> None:
        """Return when the future is done, somebody has come or gone, or time is up."""
        if future is not None:
            future.add_done_callback(lambda _: self._news.set())
            if future.done():
                return
        self._news.wait(seconds)
        self._news.clear()

    def _heard(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if not isinstance(message, Mapping):
            return
        action, worker = message.get("action"), message.get("worker")
        if action == "add-worker" and worker:
            self.excluded.pop(worker, None)
            self.present = self.present | {worker}
        elif action == "remove-worker" and worker:
            self.present = self.present - {worker}
        else:
            return
        self._news.set()


def place_again(
    addresses: Sequence[str], lost: Iterable[int], usable: Sequence[str], warm: Mapping[int, str]
) -> list[str]:
    """Return the stages' workers after some stages have lost theirs.

    A stage goes to a spare, one that has its weights at hand if there is one, or to the worker with
    the fewest stages. Stages whose workers are well stay where they are.

    Parameters
    ----------
    addresses
        The worker of each stage so far.
    lost
        Stages to be placed.
    usable
        Workers that may get a stage; at least one.
    warm
        By stage a worker that keeps its weights at hand.

    >>> place_again(["a", "b", "c"], [1], ["a", "c", "d", "e"], {1: "e"})
    ['a', 'e', 'c']
    >>> place_again(["a", "b", "c"], [1, 2], ["a"], {})
    ['a', 'a', 'a']
    """
    found = list(addresses)
    waiting = sorted(lost)
    load = dict.fromkeys(usable, 0)
    for stage, address in enumerate(addresses):
        if address in load and stage not in waiting:
            load[address] += 1
    for stage in waiting:
        least = min(load.values())
        free = [address for address in usable if load[address] == least]
        chosen = warm[stage] if warm.get(stage) in free else free[0]
        load[chosen] += 1
        found[stage] = chosen
    return found
