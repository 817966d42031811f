"""Sessions that have ended: their room is free again when all stages have forgotten them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

Place = tuple[int, str]  # a stage, and the address of the worker that has it


@dataclass
class _Ended:
    num_tokens: int
    places: set[Place]


class Forgetting:
    """Which stages haven't said yet that they have forgotten a session.

    Parameters
    ----------
    freed : callable
        Gets how many tokens' room is free when all have.
    """

    def __init__(self, freed: Callable[[int], None]) -> None:
        self._freed = freed
        self._ended: dict[str, _Ended] = {}

    def begin(self, name: str, num_tokens: int, places: set[Place]) -> None:
        """A session has ended; what is told to the stages comes next."""
        self._ended[name] = _Ended(num_tokens, places)

    def heard(self, name: str, *places: Place) -> None:
        """Stages have forgotten a session; with none, look whether all have."""
        ended = self._ended.get(name)
        if ended is not None:
            ended.places.difference_update(places)
            if not ended.places:
                del self._ended[name]
                self._freed(ended.num_tokens)

    def left(self, address: str, stages: Collection[int] | None) -> None:
        """A worker is gone with all it had, or stages are from it."""
        for name, ended in list(self._ended.items()):
            gone = [
                (stage, other)
                for stage, other in ended.places
                if other == address and (stages is None or stage in stages)
            ]
            self.heard(name, *gone)
