"""What recovery is told of the swarm: who is there, how much memory they have, who has stalled."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

from distributed import Client

from dagflow.swarm.clusters import scheduler_info
from dagflow.swarm.membership import Membership
from dagflow.training.recovery_protocol import Roster, Stall


class Lookout:
    """Makes rosters of what the scheduler says.

    Parameters
    ----------
    client
    membership
    memory : mapping
        Memory in bytes of the workers that were there when the run was planned, by address.
    """

    def __init__(self, client: Client, membership: Membership, memory: Mapping[str, int]) -> None:
        self._client = client
        self._membership = membership
        self._planned_memory = memory
        self._limits: dict[str, int] = {}
        self._asked_of: Collection[str] = ()

    def look(self) -> Roster:
        """Return who is there, asking the scheduler again if the last answer is old."""
        with contextlib.suppress(OSError):  # of a connection that is about to be noticed as lost
            self._membership.refresh_if_old()
        return self.roster()

    def look_now(self) -> Roster:
        """Return who is there, asking the scheduler."""
        self._membership.refresh()
        return self.roster()

    def roster(self) -> Roster:
        present, stalled = self._membership.seen()
        memory = self._memory(present)
        stalls = {a: Stall(news["seconds"], news["silent"]) for a, news in stalled.items()}
        return Roster({address: memory.get(address) for address in present}, stalls)

    def _memory(self, present: Collection[str]) -> dict[str, int]:
        """Return the memory of each worker that says how much it has."""
        if self._asked_of is not present:  # which is replaced, not changed
            self._asked_of = present
            workers = scheduler_info(self._client)["workers"]
            limits = {address: info.get("memory_limit") for address, info in workers.items()}
            self._limits = {address: limit for address, limit in limits.items() if limit}
        return {**self._limits, **self._planned_memory}
