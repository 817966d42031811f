"""How long passes take, and so what a guess costs: measured on the passes themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# A new measurement counts for one in so many; one that so many others have followed, for nothing.
_MEMORY = 16
_FORGOTTEN = 256
# However quick the stages are, a guess is some work for everybody on the way.
_LEAST_GUESS = 0.01
# What one more token takes is seen from passes of up to so many.
_SOME = 8


@dataclass
class _Average:
    """Of the latest measurements, mostly."""

    count: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    added_at: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.count = min(self.count + 1, _MEMORY)
        self.tokens += (tokens - self.tokens) / self.count
        self.seconds += (seconds - self.seconds) / self.count


class _Curve:
    """Seconds by number of tokens: averages by powers of two, straight lines between them.

    Beyond what was measured nothing is known, and nothing is charged: it will be tried, and measured. So is
    what was measured long ago.
    """

    def __init__(self) -> None:
        self._num_added = 0
        self._averages: dict[int, _Average] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        self._num_added += 1
        average = self._averages.setdefault(num_tokens.bit_length(), _Average())
        average.add(num_tokens, seconds)
        average.added_at = self._num_added
        oldest = self._num_added - _FORGOTTEN
        self._averages = {k: a for k, a in self._averages.items() if a.added_at > oldest}

    def at(self, num_tokens: float) -> float:
        """Return the seconds of so many tokens; 0 if nothing has been measured."""
        points = [self._averages[key] for key in sorted(self._averages)]
        for few, many in itertools.pairwise(points):
            if num_tokens <= many.tokens:
                share = max(0.0, num_tokens - few.tokens) / (many.tokens - few.tokens)
                return few.seconds + share * (many.seconds - few.seconds)
        return points[-1].seconds if points else 0.0

    def slope(self, num_tokens: int) -> float:
        """Return the seconds of one more token, on average up to so many; 0 if they aren't known."""
        few = min((average.tokens for average in self._averages.values()), default=num_tokens)
        if few >= num_tokens:
            return 0.0
        return max(0.0, self.at(num_tokens) - self.at(few)) / (num_tokens - few)


class Pace:
    """What traversals of a model's stages take.

    Whole traversals are timed by the driver, and only those of sessions that had nothing else under
    way: what waits behind its own guesses says nothing about the way. Computing is timed by the stages.
    """

    def __init__(self) -> None:
        self._traversal = _Curve()
        self._slowest = _Curve()

    def add_traversal(self, num_tokens: int, seconds: float) -> None:
        """Hear of a session's tokens that came through alone."""
        self._traversal.add(num_tokens, seconds)

    def add_computing(self, computed: Sequence[tuple[int, float]]) -> None:
        """Hear of a pass: its tokens and seconds at each stage."""
        if computed:
            self._slowest.add(*max(computed, key=lambda stage: stage[1]))

    @property
    def traversal_seconds(self) -> float:
        """What a token takes from the driver through all stages and back; 0 if that isn't known."""
        return self._traversal.at(1)

    @property
    def guess_seconds(self) -> float:
        """What a pass takes longer for one more token."""
        longer = max(self._traversal.slope(_SOME), self._slowest.slope(_SOME))
        return max(longer, _LEAST_GUESS * self.traversal_seconds)

    @property
    def pass_seconds(self) -> float:
        """What a pass of one token takes the slowest stage."""
        return self._slowest.at(1)

    def most_passes(self, num_tokens: int) -> int:
        """Return how many passes of so many tokens can be on their way without queueing."""
        busy = self._slowest.at(num_tokens)
        return max(1, int(self._traversal.at(num_tokens) / busy)) if busy else 1
