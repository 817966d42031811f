"""Cuts are those that a table over all pairs of places finds, without the table."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow.plan.cuts import Chain, can_be_cut, fewest_bytes, least_slowest

SLACK = 1.03
numbers = st.integers(0, 9)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Chain, list[int], list[float]]:
    """A short chain, micro-batches in flight, and memory limits, by stage."""
    num_parts = draw(st.integers(1, 8))
    num_stages = draw(st.integers(1, num_parts))

    def before(smallest: int = 0) -> np.ndarray:
        parts = draw(st.lists(st.integers(smallest, 9), min_size=num_parts, max_size=num_parts))
        return np.concatenate([[0.0], np.cumsum(parts, dtype=float)])

    crossing = draw(st.lists(numbers, min_size=num_parts - 1, max_size=num_parts - 1))
    chain = Chain(before(), before(), before(), np.array([0.0, *crossing, 0.0]))
    in_flight = [num_stages - stage for stage in range(num_stages)]
    limits = draw(st.lists(st.integers(1, 60), min_size=num_stages, max_size=num_stages))
    return chain, in_flight, [float(limit) for limit in limits]


def all_cuts(chain: Chain, in_flight: list[int], limits: list[float]) -> list[tuple[float, float]]:
    """Slowest stage and bytes across of every cut whose stages are not too large."""
    end = len(chain.seconds) - 1
    found = []
    for cuts in combinations(range(1, end), len(limits) - 1):
        bounds = list(pairwise([0, *cuts, end]))
        memory = [
            chain.state_bytes[j] - chain.state_bytes[i]
            + count * (chain.saved_bytes[j] - chain.saved_bytes[i])
            for (i, j), count in zip(bounds, in_flight, strict=True)
        ]  # fmt: skip
        if all(needed <= limit for needed, limit in zip(memory, limits, strict=True)):
            slowest = max(chain.seconds[j] - chain.seconds[i] for i, j in bounds)
            found.append((slowest, float(sum(chain.crossing_bytes[list(cuts)]))))
    return found


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_cut_is_better(problem: tuple[Chain, list[int], list[float]]) -> None:
    chain, in_flight, limits = problem
    known = all_cuts(*problem)
    ends = chain.within_memory(in_flight, limits)
    assert can_be_cut(ends) == bool(known)
    if not known:
        return
    best = min(slowest for slowest, _ in known)
    found = least_slowest(chain, ends)
    assert abs(found - best) <= 1e-6
    slowest = chain.within_seconds(SLACK * found)
    cuts = fewest_bytes(chain, [np.minimum(end, slowest) for end in ends])
    bounds = list(pairwise([0, *cuts, len(chain.seconds) - 1]))
    assert len(bounds) == len(limits)
    assert all(begin < end for begin, end in bounds)
    assert max(chain.seconds[j] - chain.seconds[i] for i, j in bounds) <= SLACK * best + 1e-6
    fewest = min(crossing for seconds, crossing in known if seconds <= SLACK * best)
    assert sum(chain.crossing_bytes[cuts]) == fewest


def test_what_is_kept_grows_with_places_times_stages() -> None:
    # A table over all pairs of places would take 64 * 4,000 ** 2 numbers.
    rng = np.random.default_rng(0)
    before = np.concatenate([[0.0], np.cumsum(rng.integers(1, 100, 4000), dtype=float)])
    chain = Chain(before, before, before, np.ones(4001))
    ends = chain.within_memory(list(range(64, 0, -1)), [np.inf] * 64)
    assert sum(end.nbytes for end in ends) <= 64 * 4001 * 8
    best = least_slowest(chain, ends)
    assert best >= before[-1] / 64
    assert len(fewest_bytes(chain, [np.minimum(e, chain.within_seconds(best)) for e in ends])) == 63
