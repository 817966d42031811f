"""Attention over sessions' caches equals attention over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dagflow_tasks.kernels.attention import attend, attending
from dagflow_tasks.kernels.session_cache import (
    BLOCK_TOKENS,
    KEPT_BEHIND_TOKENS,
    Reach,
    SessionCache,
    Span,
    whole_blocks,
)

HEADS, WIDTH, LENGTH = 4, 8, 23
SCALE = WIDTH**-0.5


def _qkv(key_heads: int = 2, length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(1, HEADS, length, WIDTH),
        torch.randn(1, key_heads, length, WIDTH),
        torch.randn(1, key_heads, length, WIDTH),
    )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int = 0,
    slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> torch.Tensor:
    """Score by score, on the whole sequence (1, T, H, D)."""
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(query.shape[2])
    if slopes is not None:
        scores = scores + slopes[:, None, None] * at
    hidden = at[None, :] > at[:, None]
    if window:
        hidden |= at[None, :] <= at[:, None] - window
    if chunk:
        hidden |= at[None, :] // chunk != at[:, None] // chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        shares = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        shares = torch.softmax(scores, -1)
    return (shares @ value).transpose(1, 2)


KINDS = {
    "plain": {},
    "window": {"window": 5},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "softcap": {"softcap": 2.0},
    "windowed softcap": {"window": 5, "softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "windowed sinks and softcap": {
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "window": 5,
        "softcap": 2.0,
    },
    "chunks": {"chunk": 5},
}


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[LENGTH], [10, 13], [7, 1, 9, 6], [1] * LENGTH])
def test_a_sequence_in_pieces_equals_the_whole(kind: str, key_heads: int, cuts: list[int]) -> None:
    query, key, value = _qkv(key_heads)
    cache, found, start = SessionCache(), [], 0
    for count in cuts:
        piece = slice(start, start + count)
        with attending([Span(cache, start, count)]):
            given = (t[:, :, piece] for t in (query, key, value))
            found.append(attend(*given, 0, SCALE, **KINDS[kind]))
        start += count
    assert cache.length == LENGTH
    wanted = _reference(query, key, value, **KINDS[kind])
    torch.testing.assert_close(torch.cat(found, 1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_of_one_pass_see_only_themselves(kind: str) -> None:
    first, second, third = _qkv(length=9), _qkv(length=1), _qkv(length=14)
    cache = SessionCache()
    with attending([Span(cache, 0, 6)]):
        attend(*(t[:, :, :6] for t in first), 0, SCALE, **KINDS[kind])
    tails = [tuple(t[:, :, 6:] for t in first), second, third]
    row = [torch.cat([some[i] for some in tails], 2) for i in range(3)]
    spans = [Span(cache, 6, 3), Span(None, 0, 1), Span(SessionCache(), 0, 14)]
    with attending(spans):
        found = attend(*row, 0, SCALE, **KINDS[kind])
    wanted = [_reference(*some, **KINDS[kind]) for some in (first, second, third)]
    torch.testing.assert_close(found, torch.cat([wanted[0][:, 6:], *wanted[1:]], 1))


def test_caches_keep_everything_while_they_grow() -> None:
    cache = SessionCache()
    keys = torch.randn(2, 200, WIDTH)
    for position in range(200):
        found, _ = cache.put(3, position, keys[:, position : position + 1], keys[:, :1])
    assert torch.equal(found, keys)
    assert cache.layers[3].keys.shape[1] == whole_blocks(200) < 200 + BLOCK_TOKENS
    assert cache.num_bytes == 2 * 2 * whole_blocks(200) * WIDTH * 4
    fork = SessionCache()
    fork.copy(cache, 0, 40)
    assert fork.num_bytes == 2 * 2 * whole_blocks(40) * WIDTH * 4


@pytest.mark.parametrize("cuts", [[LENGTH], [10, 13], [1] * LENGTH])
@pytest.mark.parametrize("window", [0, 5])
def test_biases_by_distance_and_sinks_of_tokens_in_pieces_equal_the_whole(
    window: int, cuts: list[int]
) -> None:
    query, key, value = _qkv(2)
    distances, sinks = torch.randn(1, HEADS, LENGTH, 7), torch.randn(1, HEADS, LENGTH, 1)
    cache, found, start = SessionCache(), [], 0
    for count in cuts:
        piece = slice(start, start + count)
        with attending([Span(cache, start, count)]):
            given = (t[:, :, piece] for t in (query, key, value))
            more = {"sinks": sinks[:, :, piece], "distances": distances[:, :, piece]}
            found.append(attend(*given, 0, SCALE, window, **more))
        start += count
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    bias = torch.zeros(1, HEADS, LENGTH, LENGTH)
    for distance in range(7):
        bias = torch.where(back == distance, distances[..., distance, None], bias)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * SCALE + bias
    hidden = (back < 0) | (back >= (window or LENGTH))
    scores = torch.cat([scores.masked_fill(hidden, -torch.inf), sinks], -1)
    wanted = torch.softmax(scores, -1)[..., :-1] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(torch.cat(found, 1), wanted.transpose(1, 2))


SHORT_SIGHTED = {"window": {"window": 40}, "chunks": {"chunk": 40}}


def _feed(
    cache: SessionCache, given: tuple[torch.Tensor, ...], start: int, end: int, **kind: int
) -> torch.Tensor:
    with attending([Span(cache, start, end - start)]):
        return attend(*(t[:, :, start:end] for t in given), 0, SCALE, **kind)


@pytest.mark.parametrize("kind", SHORT_SIGHTED)
def test_layers_with_windows_keep_no_more_than_these_need(kind: str) -> None:
    given, cache, start, found, most = _qkv(length=400), SessionCache(), 0, [], 0
    for count in [7, 150, *[1] * 100, 90, *[1] * 53]:
        found.append(_feed(cache, given, start, start + count, **SHORT_SIGHTED[kind]))
        start += count
        most = max(most, cache.layers[0].keys.shape[1])
    wanted = _reference(*given, **SHORT_SIGHTED[kind])
    torch.testing.assert_close(torch.cat(found, 1), wanted)
    reach = cache.layers[0].reach
    assert reach is not None
    assert most <= reach.most_tokens < 40 + KEPT_BEHIND_TOKENS + 3 * BLOCK_TOKENS
    assert cache.num_bytes == cache.layers[0].num_bytes


@pytest.mark.parametrize("kind", SHORT_SIGHTED)
def test_what_windows_show_is_there_after_a_rewind_or_it_is_said_that_it_is_not(kind: str) -> None:
    given, cache = _qkv(length=300), SessionCache()
    _feed(cache, given, 0, 299, **SHORT_SIGHTED[kind])
    wanted = _reference(*given, **SHORT_SIGHTED[kind])
    reached = [position for position in range(300) if cache.reaches(position)]
    assert {*range(299 - KEPT_BEHIND_TOKENS, 300)} <= {*reached}
    assert 100 not in reached
    for position in reached[0], reached[-1] - 3:
        again = _feed(cache, given, position, position + 2, **SHORT_SIGHTED[kind])
        torch.testing.assert_close(again, wanted[:, position : position + 2])
    # From its first token on any session can be computed again.
    again = _feed(cache, given, 0, 300, **SHORT_SIGHTED[kind])
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("shared", [0, 150, 290])
def test_copies_take_over_what_windows_show(shared: int) -> None:
    given, kind = _qkv(length=300), SHORT_SIGHTED["window"]
    origin, copy = SessionCache(), SessionCache()
    _feed(origin, given, 0, 299, **kind)
    if shared:
        _feed(copy, given, 0, shared, **kind)
    copy.copy(origin, shared, 299)
    found = _feed(copy, given, 299, 300, **kind)
    torch.testing.assert_close(found, _reference(*given, **kind)[:, 299:])
    assert copy.num_bytes == copy.layers[0].num_bytes
    assert copy.layers[0].keys.shape[1] <= Reach(40, 0).most_tokens


def test_a_fork_is_independent_of_its_origin() -> None:
    cache = SessionCache()
    keys, others = torch.randn(2, 8, WIDTH), torch.randn(2, 8, WIDTH)
    cache.put(0, 0, keys, keys)
    fork = SessionCache()
    fork.copy(cache, 0, 5)
    assert fork.length == 5
    found, _ = fork.put(0, 5, others[:, 5:], others[:, 5:])
    assert torch.equal(found, torch.cat([keys[:, :5], others[:, 5:]], 1))
    assert torch.equal(cache.layers[0].keys[:, :8], keys)


class _Temporaries(TorchDispatchMode):
    """Watches how many bytes operators' results take at once, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        found = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(found) if torch.is_tensor(t)):
            if storage.data_ptr() not in given:
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        self._made = {ref: size for ref, size in self._made.items() if not ref.expired()}
        self.most_bytes = max(self.most_bytes, sum(self._made.values()))
        return found


@pytest.mark.parametrize("window", [0, 900])
@pytest.mark.parametrize("count", [200, 1500])
def test_long_prompts_with_grouped_queries_share_one_mask(count: int, window: int) -> None:
    """Of 32 heads it was copied for each: 537 MB for 512 tokens that follow on 8 thousand."""
    heads, length, rows = 32, 2000, min(count, 512)
    query, key, value = torch.randn(1, heads, length, 4), *torch.randn(2, 1, 2, length, 4)
    cache, start = SessionCache(), length - count
    before, given = (
        [t[:, :, s] for t in (query, key, value)] for s in (slice(start), slice(start, None))
    )
    with attending([Span(cache, 0, start)]):
        for layer in range(2):
            attend(*before, layer, SCALE, window)
    with attending([Span(cache, start, count)]), _Temporaries() as temporaries:
        found = [attend(*given, layer, SCALE, window) for layer in range(2)]
    taken = 2 * found[0].nbytes + 2 * query[0, :, :rows].nbytes + cache.num_bytes
    assert temporaries.most_bytes < 2 * rows * length * 4 + taken
    keys, values = key.repeat_interleave(16, 1), value.repeat_interleave(16, 1)
    back = torch.arange(start, length)[:, None] - torch.arange(length)
    hidden = (back < 0) | (back >= (window or length))
    scores = (given[0] @ keys.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf)
    wanted = (torch.softmax(scores, -1) @ values).transpose(1, 2)
    for one in found:
        torch.testing.assert_close(one, wanted)


def test_tokens_that_come_twice_take_nothing_from_the_cache() -> None:
    query, key, value = _qkv()
    cache = SessionCache()
    with attending([Span(cache, 0, LENGTH)]):
        attend(query, key, value, 0, SCALE)
    with attending([Span(cache, 3, 4)]):
        again = attend(*(t[:, :, 3:7] for t in (query, key, value)), 0, SCALE)
    assert cache.length == LENGTH
    torch.testing.assert_close(again, _reference(query, key, value)[:, 3:7])


def test_a_pass_that_fails_leaves_the_length_as_it_was() -> None:
    cache = SessionCache(4)
    with pytest.raises(RuntimeError), attending([Span(cache, 4, 3)]):
        raise RuntimeError
    assert cache.length == 4
