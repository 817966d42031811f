"""Operators with states compute the same however a session's tokens come, and go back exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dagflow_tasks.kernels.attention import attending
from dagflow_tasks.kernels.recurrence import running_max, scan, window
from dagflow_tasks.kernels.session_cache import SessionCache, Span
from dagflow_tasks.kernels.states import REACH_TOKENS

LENGTH = 3 * REACH_TOKENS + 7
HEADS, GROUPS, KEY, VALUE = 4, 2, 8, 9

Operator = Callable[[slice], torch.Tensor]


def _gated(delta: bool, by_key: bool) -> Operator:
    query, key = torch.randn(2, 1, LENGTH, GROUPS, KEY) * KEY**-0.5
    value = torch.randn(1, LENGTH, HEADS, VALUE)
    decay = -torch.rand(1, LENGTH, HEADS, *([KEY] if by_key else []))
    beta = torch.rand(1, LENGTH, HEADS)

    def run(at: slice) -> torch.Tensor:
        own = (tensor[:, at] for tensor in (query, key, value, decay))
        return scan(*own, 0, beta=beta[:, at] if delta else None)

    return run


def _selective() -> Operator:
    query, key = torch.randn(2, 1, LENGTH, 1, KEY)
    value, step = torch.randn(1, LENGTH, HEADS, 1), torch.rand(1, LENGTH, HEADS)
    rates = -torch.rand(HEADS, KEY)
    return lambda at: scan(*(t[:, at] for t in (query, key, value, step)), 0, rates=rates)


def _window() -> Operator:
    values = torch.randn(1, LENGTH, 6)
    return lambda at: window(values[:, at], 4, 0, 0.5)


def _largest() -> Operator:
    values, sinking = torch.randn(1, LENGTH, 6), -torch.rand(1, LENGTH, 6)
    return lambda at: running_max(values[:, at], sinking[:, at], 0, -1.0)


KINDS: dict[str, Callable[[], Operator]] = {
    "linear attention": lambda: _gated(delta=False, by_key=False),
    "delta rule": lambda: _gated(delta=True, by_key=False),
    "delta rule by key": lambda: _gated(delta=True, by_key=True),
    "selective": _selective,
    "window": _window,
    "running max": _largest,
}


def _fed(run: Operator, cache: SessionCache, start: int, end: int) -> torch.Tensor:
    with attending([Span(cache, start, end - start)]):
        return run(slice(start, end))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[LENGTH], [40, 1, LENGTH - 41], [1] * LENGTH])
def test_a_sequence_in_pieces_equals_the_whole(kind: str, cuts: list[int]) -> None:
    run = KINDS[kind]()
    cache, found, start = SessionCache(), [], 0
    for count in cuts:
        found.append(_fed(run, cache, start, start + count))
        start += count
    assert all(output.is_contiguous() for output in found)
    torch.testing.assert_close(torch.cat(found, 1), run(slice(None)))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("by_key", [False, True])
def test_a_scan_is_the_recurrence_in_its_definition(delta: bool, by_key: bool) -> None:
    query, key = torch.randn(2, 1, 9, GROUPS, KEY) * KEY**-0.5
    value, beta = torch.randn(1, 9, HEADS, VALUE), torch.rand(1, 9, HEADS)
    decay = -torch.rand(1, 9, HEADS, *([KEY] if by_key else []))
    decay[0, 4], decay[0, 6] = -200.0, -torch.inf  # what is past is over
    found = scan(query, key, value, decay, 0, beta=beta if delta else None)
    for head in range(HEADS):
        state = torch.zeros(KEY, VALUE)
        for t in range(9):
            k, q = (some[0, t, head * GROUPS // HEADS] for some in (key, query))
            state = decay[0, t, head].exp().reshape(-1, 1) * state
            new = value[0, t, head]
            new = (new - state.T @ k) * beta[0, t, head] if delta else new
            state = state + torch.outer(k, new)
            torch.testing.assert_close(found[0, t, head], state.T @ q)


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_one_pass_have_states_of_their_own(kind: str) -> None:
    run = KINDS[kind]()
    first, second = SessionCache(), SessionCache()
    _fed(run, first, 0, 10)
    spans = [Span(first, 10, 5), Span(second, 0, 10), Span(None, 0, 20)]
    with attending(spans):
        found = run(slice(10, 45))
    alone = [run(slice(0, 15))[:, 10:], run(slice(15, 25)), run(slice(25, 45))]
    torch.testing.assert_close(found, torch.cat(alone, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 17, LENGTH])
def test_any_of_the_last_tokens_can_be_gone_back_to(kind: str, step: int) -> None:
    run = KINDS[kind]()
    cache, wanted = SessionCache(), run(slice(None))
    for start in range(0, LENGTH, step):
        _fed(run, cache, start, min(start + step, LENGTH))
    assert all(cache.reaches(at) for at in range(LENGTH - REACH_TOKENS, LENGTH + 1))
    assert cache.reaches(0)
    assert not cache.reaches(LENGTH // 4)
    for back in (0, 1, 7, 7, REACH_TOKENS):
        cache.rewind(LENGTH - back)
        found = _fed(run, cache, LENGTH - back, LENGTH) if back else wanted[:, :0]
        torch.testing.assert_close(found, wanted[:, LENGTH - back :])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_come_twice_change_nothing(kind: str) -> None:
    run = KINDS[kind]()
    cache, wanted = SessionCache(), run(slice(None))
    _fed(run, cache, 0, 60)
    torch.testing.assert_close(_fed(run, cache, 50, 58), wanted[:, 50:58])
    torch.testing.assert_close(_fed(run, cache, 0, 30), wanted[:, :30])
    torch.testing.assert_close(_fed(run, cache, 55, 70), wanted[:, 55:70])
    torch.testing.assert_close(_fed(run, cache, 70, LENGTH), wanted[:, 70:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_by_itself(kind: str) -> None:
    run = KINDS[kind]()
    cache, fork, wanted = SessionCache(), SessionCache(), run(slice(None))
    _fed(run, cache, 0, 60)
    fork.copy(cache, 0, 50)
    torch.testing.assert_close(_fed(run, fork, 50, 90), wanted[:, 50:90])
    torch.testing.assert_close(_fed(run, cache, 60, 90), wanted[:, 60:90])


def test_a_state_does_not_grow_with_its_session() -> None:
    run = _gated(delta=True, by_key=False)
    cache, most = SessionCache(), 0
    for start in range(3 * REACH_TOKENS):
        _fed(run, cache, start, start + 1)
        most = max(most, cache.num_state_bytes)
    for start in range(3 * REACH_TOKENS, LENGTH):
        _fed(run, cache, start, start + 1)
        assert cache.num_state_bytes <= most
