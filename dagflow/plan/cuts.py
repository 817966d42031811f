"""Where to cut a chain of operators: least slowest stage, then fewest bytes across. Exact.

What a stage costs, and what it needs, is a difference of prefix sums, so a stage that begins at some
place may end anywhere up to a farthest one, which doesn't move back as the beginning moves on. So a
row of numbers a stage is enough, where a table has one for every pair of places: for P places and S
stages the memory is O(S P) instead of O(S P^2), the time O(S P log P).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

# Costs are nominal, so the least is found to this relative precision.
_PRECISION = 1e-9


@dataclass(frozen=True)
class Chain:
    """The places where operators may be cut apart, their beginning and their end included.

    Attributes
    ----------
    seconds, state_bytes, saved_bytes : (P,)
        Of all operators before each place: cost, what their weights take, and what a micro-batch
        leaves for its backward.
    crossing_bytes : (P,)
        Bytes that cross each place; 0 at both ends.
    """

    seconds: Floats
    state_bytes: Floats
    saved_bytes: Floats
    crossing_bytes: Floats

    def within_memory(self, in_flight: Sequence[int], limits: Sequence[float]) -> list[Places]:
        """Return the farthest end of each stage by its beginning, for limits in bytes by stage."""
        return [
            _farthest(self.state_bytes + count * self.saved_bytes, limit)
            for count, limit in zip(in_flight, limits, strict=True)
        ]

    def within_seconds(self, limit: float) -> Places:
        """Return the farthest end of any stage by its beginning."""
        return _farthest(self.seconds, limit)


def _farthest(before: Floats, limit: float) -> Places:
    return np.searchsorted(before, before + limit, side="right") - 1


def can_be_cut(ends: Sequence[Places]) -> bool:
    """Tell whether stages that end at most so far cover the chain; none of them is empty."""
    places = np.arange(len(ends[0]))
    is_reached = places == 0
    for end in ends:
        # Of the beginnings before a place, the nearest is the one that lets a stage end farthest.
        nearest = np.maximum.accumulate(np.where(is_reached, places, -1))
        nearest = np.concatenate([[-1], nearest[:-1]])
        is_reached = (nearest >= 0) & (end[nearest] >= places)
    return bool(is_reached[-1])


def least(limit_is_enough: Callable[[float], bool], low: float, high: float) -> float:
    """Return the least limit that is enough, not below `low`; `high` must be."""
    if limit_is_enough(low):
        return low
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if limit_is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def least_slowest(chain: Chain, ends: Sequence[Places]) -> float:
    """Return the least possible cost of the slowest of stages that end at most so far."""

    def is_enough(limit: float) -> bool:
        end = chain.within_seconds(limit)
        return can_be_cut([np.minimum(end, farthest) for farthest in ends])

    total = float(chain.seconds[-1])
    return least(is_enough, total / len(ends), total)


def fewest_bytes(chain: Chain, ends: Sequence[Places]) -> list[int]:
    """Return the places where stages that end at most so far begin, the first aside.

    Of all such cuts, those that the fewest bytes cross, by dynamic programming. There must be one.
    """
    places = np.arange(len(chain.seconds))
    total = np.where(places == 0, 0.0, np.inf)
    chosen = []
    for end in ends:
        first = np.searchsorted(end, places, side="left")
        begin = _argmin_between(total, first, places - 1)
        chosen.append(begin)
        total = np.where(first < places, total[begin] + chain.crossing_bytes, np.inf)
    position, cuts = len(places) - 1, []
    for begin in reversed(chosen):
        position = int(begin[position])
        cuts.append(position)
    return cuts[-2::-1]


def _argmin_between(values: Floats, first: Places, last: Places) -> NDArray[Any]:
    """Return for each pair where the values from `first` to `last` are least, leftmost.

    Of an empty range it is anything. By a sparse table: the least of every 2, 4, 8, ... neighbours.
    """
    table = [np.arange(len(values))]
    while (width := 1 << len(table)) <= len(values):
        left, right = table[-1][: len(values) - width + 1], table[-1][width // 2 :]
        right = right[: len(left)]
        table.append(np.where(values[left] <= values[right], left, right))
    lengths = np.maximum(last - first + 1, 1)
    levels = np.floor(np.log2(lengths)).astype(int)
    rows = np.zeros((len(table), len(values)), int)
    for level, row in enumerate(table):
        rows[level, : len(row)] = row
    left = rows[levels, np.minimum(first, len(values) - 1)]
    right = rows[levels, np.maximum(last - (1 << levels) + 1, 0)]
    least: NDArray[Any] = np.where(values[left] <= values[right], left, right)
    return least
