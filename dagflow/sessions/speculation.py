"""Guesses of tokens to come, to be verified in one traversal of the stages."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_MOST_GUESSES = 12


class NgramGuesses:
    """Guesses that a text goes on as it did the last time it came by here.

    Looks the latest tokens up among those before (prompt look-up decoding). How many it guesses
    follows from how many were right.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._count = 4

    def guess(self, tokens: Sequence[int]) -> list[int]:
        """Return tokens that may follow."""
        found: list[int] = []
        for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            place = self._places.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if place is not None:
                found = list(tokens[place : place + self._count])
                break
        self._learn(tokens)
        return found

    def were_right(self, count: int, of: int) -> None:
        """Hear how many guesses were right."""
        if count == of:
            self._count = min(2 * self._count, _MOST_GUESSES)
        else:
            self._count = max(2, (self._count + count) // 2)

    def _learn(self, tokens: Sequence[int]) -> None:
        for end in range(max(self._known, _SHORTEST_MATCH), len(tokens) + 1):
            for length in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, end) + 1):
                self._places[tuple(tokens[end - length : end])] = end
        self._known = len(tokens)
