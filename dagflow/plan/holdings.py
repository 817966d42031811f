"""Who has which of a model's stages, and who can take one: decisions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dagflow.plan.serving_memory import Room, StageNeeds, WorkerMemory, fits, room_of, together


@dataclass(frozen=True)
class Holdings:
    """What there is at one moment.

    Attributes
    ----------
    addresses : sequence of str
        The worker of each stage; empty where nobody has it.
    needs : sequence of StageNeeds
        Of each stage.
    reading : collection of (int, str)
        Stages whose weights a worker has, or is reading, its own or not, with its address.
    opened : collection of (int, str)
        Those that it has.
    memory : mapping
        Of the workers that are there, by address.
    cache_bytes : int or None
        What sessions' caches may take on a worker; see `memory.cache_budget`.
    """

    addresses: Sequence[str]
    needs: Sequence[StageNeeds]
    reading: Collection[tuple[int, str]]
    opened: Collection[tuple[int, str]]
    memory: Mapping[str, WorkerMemory]
    cache_bytes: int | None

    def room(self) -> Room:
        """Return how many tokens all sessions together may have, where all stages are placed."""
        weights = {address: self.weights_on(address) for address in self.addresses}
        return room_of(self.addresses, self.needs, weights, self.memory, self.cache_bytes)

    def weights_on(self, address: str) -> int:
        """Return the bytes of weights that a worker has, or is reading."""
        return sum(self.needs[s].weight_bytes for s, a in self.reading if a == address)

    def can_hold(self, stage: int, address: str, besides: int = 0) -> bool:
        """Tell whether a worker has memory for one stage more, and for so many bytes besides."""
        needs = [self.needs[s] for s, a in enumerate(self.addresses) if a == address]
        needs.append(self.needs[stage])
        own = sum(need.weight_bytes for need in needs)
        weight_bytes = max(own, besides + self.needs[stage].weight_bytes)
        return fits(self.memory[address], weight_bytes, together(needs), self.cache_bytes)

    def must_shut(self, stage: int, address: str) -> bool:
        """Tell whether a worker has no memory for a stage beside all that it has read."""
        is_new = (stage, address) not in self.opened
        return is_new and not self.can_hold(stage, address, self.weights_on(address))

    def best_for(self, stage: int) -> str | None:
        """Return who should take a stage: whoever has the fewest, and its weights already."""
        used = Counter(self.addresses)
        return min(
            (address for address in self.memory if self.can_hold(stage, address)),
            key=lambda address: (used[address], (stage, address) not in self.opened, address),
            default=None,
        )

    def most_useful(self, spare: str) -> int | None:
        """Return which stage a spare should read next: one that the fewest others could replace."""
        if spare in self.addresses or spare not in self.memory:
            return None
        copies = Counter(s for s, address in self.reading if address not in self.addresses)
        held = self.weights_on(spare)

        def has_room(stage: int) -> bool:
            need = self.needs[stage]
            return fits(self.memory[spare], held + need.weight_bytes, need, self.cache_bytes)

        lacking = [s for s in range(len(self.needs)) if (s, spare) not in self.reading]
        return min(filter(has_room, lacking), key=lambda s: (copies[s], s), default=None)
