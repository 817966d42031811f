"""What recovery is told of the swarm, and what everybody is: who is there, who has stalled, who has what."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from dagflow.swarm.events import (
    EventStream,
    StagePlaced,
    StageRestored,
    WorkerExcluded,
    WorkerJoined,
    WorkerLeft,
    WorkerRecovered,
    WorkerStalled,
)
from dagflow.swarm.membership import Membership
from dagflow.training.recovery_protocol import Roster, Stall

_RESTORED = ("stage", "step", "replayed", "seconds", "num_bytes")


class Lookout:
    """Makes rosters of what the scheduler says, and events of what has changed.

    Parameters
    ----------
    run_id : str
    membership
    memory : mapping
        Memory in bytes of the workers that were there when the run was planned, by address.
    owners
        The workers by stage, as they are.
    events : EventStream
        Is told what has changed since the roster before.
    """

    def __init__(
        self,
        run_id: str,
        membership: Membership,
        memory: Mapping[str, int],
        owners: Sequence[str],
        events: EventStream,
    ) -> None:
        self._run_id = run_id
        self._membership = membership
        self._planned_memory = memory
        self._owners = owners
        self._events = events
        self._told_of: Roster = Roster({})
        self._excluded: set[str] = set()

    def look(self) -> Roster:
        """Return who is there, asking the scheduler again if the last answer is old."""
        with contextlib.suppress(OSError):  # of a connection that is about to be noticed as lost
            self._membership.refresh_if_old()
        self._tell_restored()
        return self.roster()

    def look_now(self) -> Roster:
        """Return who is there, asking the scheduler."""
        self._membership.refresh()
        return self.roster()

    def roster(self) -> Roster:
        present, stalled = self._membership.seen()
        memory = {**self._membership.limits, **self._planned_memory}
        stalls = {a: Stall(news["seconds"], news["silent"]) for a, news in stalled.items()}
        found = Roster({address: memory.get(address) for address in present}, stalls)
        self._tell(self._told_of, found)
        self._told_of = found
        return found

    def _tell(self, before: Roster, now: Roster) -> None:
        """Tell what is different from one roster to the next."""
        for address in sorted(now.memory.keys() - before.memory.keys()):
            joined = WorkerJoined(address, self._membership.name(address), now.memory[address])
            self._events.tell(joined)
        for address in sorted(before.memory.keys() - now.memory.keys()):
            self._events.tell(
                WorkerLeft(address, self._membership.name(address), self._stages_of(address))
            )
        for address, stall in now.stalls.items():
            known = before.stalls.get(address)
            if known is None or known.silent != stall.silent:
                what = stall.seconds, stall.silent, self._stages_of(address)
                self._events.tell(WorkerStalled(address, self._membership.name(address), *what))
        for address in (before.stalls.keys() - now.stalls.keys()) & now.memory.keys():
            self._events.tell(WorkerRecovered(address, self._membership.name(address)))

    def tell_placed(self, before: Sequence[str], owners: Sequence[str]) -> None:
        """Tell which stages have another owner; "" is nobody."""
        self.roster()  # first who is there
        for stage, (old, new) in enumerate(zip(before, owners, strict=True)):
            if old != new:
                self._events.tell(StagePlaced(new, self._membership.name(new), stage, old))

    def tell_excluded(self, excluded: Mapping[str, str]) -> None:
        """Tell which workers get no stage any more, and why."""
        for address in excluded.keys() - self._excluded:
            self._events.tell(
                WorkerExcluded(address, self._membership.name(address), excluded[address])
            )
        self._excluded = set(excluded)

    def _tell_restored(self) -> None:
        """Tell which stages have got their weights, as their workers have said."""
        told = self._membership.told
        while told:
            message = told.popleft()
            if message["run"] == self._run_id:
                worker = message["worker"]
                what = {name: message[name] for name in _RESTORED}
                self._events.tell(StageRestored(worker, self._membership.name(worker), **what))

    def _stages_of(self, address: str) -> tuple[int, ...]:
        return tuple(stage for stage, owner in enumerate(self._owners) if owner == address)
