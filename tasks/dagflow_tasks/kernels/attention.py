"""Attention over sessions' caches: the one operator of a captured decoder that has a memory.

A decoder is captured on one row of tokens, whatever sequences they belong to: every operator of it
works on each token by itself, but attention, which is captured whole, as ``dagflow.attend``. Run
on a worker it appends the tokens' keys and values to the caches of their sessions, and lets each
token look back over its own session. So sequences of any lengths share a pass without padding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from dagflow_tasks.kernels.states import RecurrentState

ATTEND = "dagflow.attend.default"
# Caches grow by so many tokens: what is reserved for a session is what it takes, and all decode steps
# but one in so many copy nothing.
BLOCK_TOKENS = 32
# Layers with a window keep so many tokens more than it shows: a session can be rewound by these
# (wrong guesses) without anything being computed again.
KEPT_BEHIND_TOKENS = 2 * BLOCK_TOKENS
# Of so many tokens a mask is made at a time, or of so many tokens times heads, where each head's scores
# are: so temporaries are of this many times the sequence's length, however long the pass.
_MOST_ROWS = 512


def whole_blocks(num_tokens: int) -> int:
    """Return how many tokens a cache for so many has room for.

    >>> whole_blocks(0), whole_blocks(1), whole_blocks(32), whole_blocks(33)
    (0, 32, 32, 64)
    """
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True)
class Reach:
    """Which tokens one sees in a layer that doesn't see all of them.

    Attributes
    ----------
    window : int
        How many tokens back, itself included; 0 for all.
    chunk : int
        Those of its own chunk of so many tokens; 0 for no chunks.
    """

    window: int
    chunk: int

    def first(self, position: int) -> int:
        """Return the first position that a token sees.

        >>> Reach(4, 0).first(10), Reach(4, 0).first(2), Reach(0, 4).first(10)
        (7, 0, 8)
        """
        low = max(0, position - self.window + 1) if self.window else 0
        return max(low, position // self.chunk * self.chunk) if self.chunk else low

    def first_kept(self, end: int) -> int:
        """Return the first position that a cache keeps which reaches up to another, exclusive."""
        return max(0, self.first(end) - KEPT_BEHIND_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def most_tokens(self) -> int:
        """How many tokens a layer's cache has room for at most."""
        shown = min(size for size in (self.window, self.chunk) if size)
        return whole_blocks(shown - 1 + KEPT_BEHIND_TOKENS + BLOCK_TOKENS - 1)


def reach_of(arguments: Sequence[Any]) -> Reach | None:
    """Return the reach of a call of `attend` by its arguments; None if its tokens see all before."""
    window = arguments[5] if len(arguments) > 5 else 0
    chunk = arguments[9] if len(arguments) > 9 else 0
    return Reach(window, chunk) if window or chunk else None


def look_back_bytes(arguments: Sequence[Any]) -> int:
    """Return what a call of `attend` takes for each token it looks back at, besides its tensors.

    That is a mask, and what it is made of. Where there are scores they are float32, and up to five are
    there at a time: capped, biased, with sinks, and their softmax.
    """
    has_scores = any(arguments[index] for index in (6, 7, 8, 10) if len(arguments) > index)
    return (5 if has_scores else 2) * _MOST_ROWS * torch.float32.itemsize


@dataclass
class LayerCache:
    """Keys and values of one session in one layer.

    Attributes
    ----------
    keys, values : Tensor (H, C, D)
        By key head; the first tokens of the capacity C are in use.
    first : int
        Position of the first one.
    reach : Reach or None
        Of a layer that keeps no more than its window or chunk needs; None if it keeps everything.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int = 0
    reach: Reach | None = None

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass
class SessionCache:
    """What a stage remembers of one sequence.

    Attributes
    ----------
    length : int
        Tokens of the sequence so far.
    layers : dict
        By the layer's number in the model.
    states : dict
        Of recurrent operators, by their number in the model.
    num_bytes : int
        What keys and values take, used or not.
    """

    length: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    states: dict[int, RecurrentState] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def num_state_bytes(self) -> int:
        """What its states take."""
        return sum(state.num_bytes for state in list(self.states.values()))

    def reaches(self, position: int) -> bool:
        """Tell whether tokens from a position on can be computed."""
        if position == 0 or position > self.length:
            return position == 0
        windows = ((c.first, c.reach) for c in self.layers.values() if c.reach is not None)
        return all(state.reaches(position) for state in self.states.values()) and (
            position == self.length
            or all(first <= reach.first(position) for first, reach in windows)
        )

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on, which it must reach."""
        self.length = position
        self.states = {number: state.upto(position) for number, state in self.states.items()}

    def put(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put tokens at a position, and return all keys and values (H, L, D) up to them."""
        end = start + keys.shape[1]
        cache = self.layers.get(layer)
        if cache is None or cache.keys.shape[1] < end:
            self.num_bytes -= cache.num_bytes if cache is not None else 0
            cache = self._grown(cache, start, end, keys, values)
            self.num_bytes += cache.num_bytes
            self.layers[layer] = cache
        cache.keys[:, start:end] = keys
        cache.values[:, start:end] = values
        return cache.keys[:, :end], cache.values[:, :end]

    def put_within(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor, reach: Reach
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Put tokens at a position, and return the keys and values that these see.

        What no later token will see is dropped.

        Returns
        -------
        keys, values : Tensor (H, L, D)
        first : int
            Position of the first one.
        """
        end, low = start + keys.shape[1], reach.first(start)
        cache = self.layers.get(layer)
        if cache is None or low < cache.first:
            assert start == 0, "tokens that the window shows were dropped"
            cache = LayerCache(keys[:, :0], values[:, :0], 0, reach)
        begin, shown = start - cache.first, slice(low - cache.first, end - cache.first)
        if end - cache.first <= cache.keys.shape[1]:
            cache.keys[:, begin : shown.stop] = keys
            cache.values[:, begin : shown.stop] = values
            return cache.keys[:, shown], cache.values[:, shown], low
        kept = slice(max(cache.first, reach.first_kept(end)) - cache.first, begin)
        all_keys = torch.cat([cache.keys[:, :begin], keys], 1)
        all_values = torch.cat([cache.values[:, :begin], values], 1)
        self._replace(layer, all_keys, all_values, cache.first, kept.start, reach)
        return all_keys[:, shown], all_values[:, shown], low

    def _replace(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: int,
        skipped: int,
        reach: Reach,
    ) -> None:
        """Keep tokens from position `first` on, but for some at their beginning."""
        old, count = self.layers.get(layer), keys.shape[1] - skipped
        capacity = whole_blocks(count)
        new = LayerCache(
            keys.new_empty(keys.shape[0], capacity, keys.shape[2]),
            values.new_empty(values.shape[0], capacity, values.shape[2]),
            first + skipped,
            reach,
        )
        new.keys[:, :count] = keys[:, skipped:]
        new.values[:, :count] = values[:, skipped:]
        self.layers[layer] = new
        self.num_bytes += new.num_bytes - (old.num_bytes if old is not None else 0)

    def copy(self, other: SessionCache, begin: int, end: int) -> None:
        """Take over another's tokens up to `end`; those before `begin` are the same already."""
        for layer, cache in other.layers.items():
            if cache.reach is None:
                self.put(layer, begin, cache.keys[:, begin:end], cache.values[:, begin:end])
            else:
                self._copy_within(layer, cache, cache.reach, begin, end)
        self.states = {number: state.upto(end) for number, state in other.states.items()}
        self.length = end

    def _copy_within(
        self, layer: int, cache: LayerCache, reach: Reach, begin: int, end: int
    ) -> None:
        own, low = self.layers.get(layer), reach.first(begin)
        if own is not None and own.first <= low and cache.first <= begin:
            new = slice(begin - cache.first, end - cache.first)
            self.put_within(layer, begin, cache.keys[:, new], cache.values[:, new], reach)
            return
        count = end - cache.first
        skipped = max(0, reach.first_kept(end) - cache.first)
        keys, values = cache.keys[:, :count], cache.values[:, :count]
        self._replace(layer, keys, values, cache.first, skipped, reach)

    @staticmethod
    def _grown(
        cache: LayerCache | None, start: int, end: int, keys: torch.Tensor, values: torch.Tensor
    ) -> LayerCache:
        capacity = whole_blocks(end)
        new = LayerCache(
            keys.new_empty(keys.shape[0], capacity, keys.shape[2]),
            values.new_empty(values.shape[0], capacity, values.shape[2]),
        )
        if cache is not None and start:
            new.keys[:, :start] = cache.keys[:, :start]
            new.values[:, :start] = cache.values[:, :start]
        return new


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a pass that belong to one session.

    Attributes
    ----------
    cache : SessionCache or None
        None for a sequence that nobody goes on with: nothing is kept.
    start, count : int
        Position of the first token, and how many. The cache must reach as far as `start`; tokens
        that it has from there on are computed again.
    """

    cache: SessionCache | None
    start: int
    count: int


_PASS = threading.local()


def current_spans() -> Sequence[Span] | None:
    """Whose tokens the pass of this thread is made of; None if nobody has said."""
    spans: Sequence[Span] | None = getattr(_PASS, "spans", None)
    return spans


@contextmanager
def attending(spans: Sequence[Span]) -> Iterator[None]:
    """Say whose tokens the pass of this thread is made of, in their order."""
    before = current_spans()
    _PASS.spans = spans
    # Layers of a kind share their masks; those of a pass that is sent again, and may be of any length,
    # aren't kept.
    _PASS.masks = {} if sum(span.count for span in spans) <= _MOST_ROWS else None
    try:
        yield
    finally:
        _PASS.spans, _PASS.masks = before, None
    for span in spans:
        if span.cache is not None:
            span.cache.length = max(span.cache.length, span.start + span.count)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
    distances: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each token over its session, which it is appended to.

    Parameters
    ----------
    query : Tensor (1, H, N, D)
    key, value : Tensor (1, K, N, D)
        H is a multiple of K (grouped queries, arXiv 2305.13245).
    layer : int
    scale : float
    window : int
        How many tokens back a token sees, itself included; 0 for all.
    slopes : Tensor (H,), optional
        Of a bias that grows with the key's position (ALiBi, arXiv 2108.12409).
    softcap : float
        Scores go through ``softcap * tanh(score / softcap)``; 0 for not at all.
    sinks : Tensor (H,) or (1, H, N, 1), optional
        A score of each head, or of each head and token, that takes its share of the attention and
        adds nothing (arXiv 2309.17453).
    chunk : int
        Tokens see those of their own chunk of so many tokens only; 0 for no chunks.
    distances : Tensor (1, H, N, E), optional
        What is added to the scores of keys that are 0 to E - 1 tokens back; nothing to others'.

    Returns
    -------
    Tensor (1, N, H, D)
    """
    count = query.shape[2]
    if not (key.shape[2] == value.shape[2] == count and key.shape[:2] == value.shape[:2]):
        raise ValueError(
            f"queries, keys and values must be of the same tokens, not {list(query.shape)}, "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    spans = current_spans()
    if spans is None:
        spans = [Span(None, 0, count)]
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    has_scores = bool(softcap) or not (sinks is None and slopes is None and distances is None)
    most = max(1, _MOST_ROWS // query.shape[1]) if has_scores else _MOST_ROWS
    begin = 0
    for span in spans:
        end = begin + span.count
        keys, values, first = key[0, :, begin:end], value[0, :, begin:end], 0
        # A session's first tokens that come again see nothing else, and may be gone from its cache.
        again = span.cache is not None and span.start == 0 and span.count < span.cache.length
        if span.cache is not None and (window or chunk) and not again:
            reach = Reach(window, chunk)
            keys, values, first = span.cache.put_within(layer, span.start, keys, values, reach)
        elif span.cache is not None and not again:
            keys, values = span.cache.put(layer, span.start, keys, values)
        for low in range(begin, end, most):
            piece = slice(low, min(low + most, end))
            start, count = span.start + low - begin, piece.stop - low
            shown = start + count - first  # keys up to the piece's last token
            seen = (keys[:, :shown], values[:, :shown]) if piece.stop < end else (keys, values)
            mask = _mask(query, start, count, first, shown, window, slopes, chunk)
            if distances is not None:
                bias = _by_distance(distances[0, :, piece], start, first, shown)
                mask = bias if mask is None else mask + bias
            own = sinks if sinks is None or sinks.dim() == 1 else sinks[0, :, piece]
            if softcap or sinks is not None:
                looked = _by_scores(query[0, :, piece], *seen, scale, mask, softcap, own)
            else:
                looked = _look_back(query[0, :, piece], *seen, scale, mask)
            output[piece] = looked.transpose(0, 1)
        begin = end
    return output[None]


def _look_back(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one session's newest tokens (H, T, D) over its keys (K, L, D)."""
    heads, count, width = query.shape
    key_heads, length = keys.shape[:2]
    groups = heads // key_heads
    if heads * count <= _MOST_ROWS:
        # The heads that share a key are rows of one product, which reads the key once.
        rows = query.reshape(1, key_heads, groups * count, width)
        if mask is not None:
            mask = mask.expand(heads, count, length).reshape(1, key_heads, -1, length)
        looked = functional.scaled_dot_product_attention(
            rows, keys[None], values[None], mask, scale=scale
        )
        return looked.reshape(heads, count, values.shape[2])
    # Of many tokens the mask would be copied for each of these heads: here they share that, too.
    if mask is not None:
        mask = mask.reshape(-1, groups if len(mask) == heads else 1, count, length)
    looked = functional.scaled_dot_product_attention(
        query.reshape(key_heads, groups, count, width),
        keys[:, None].expand(-1, groups, -1, -1),
        values[:, None].expand(-1, groups, -1, -1),
        mask,
        scale=scale,
    )
    return looked.reshape(heads, count, values.shape[2])


def _mask(
    query: torch.Tensor,
    start: int,
    count: int,
    first: int,
    length: int,
    window: int,
    slopes: torch.Tensor | None,
    chunk: int,
) -> torch.Tensor | None:
    """What is added to the scores (H or 1, T, L); None if a single token sees everything.

    Tokens are those from position `start` on, keys those from position `first` on.
    """
    seen = window == 0 or length <= window
    if chunk:
        seen = seen and first >= (start + count - 1) // chunk * chunk
    if count == 1 and seen and slopes is None:
        return None
    made = (start, count, first, length, *((0, 0) if seen else (window, chunk)), query.dtype)
    kept: dict[tuple[Any, ...], torch.Tensor] | None = getattr(_PASS, "masks", None)
    bias = None if kept is None else kept.get(made)
    if bias is None:
        bias = _hiding(*made, query.device)
        if kept is not None:
            kept[made] = bias
    if slopes is None:
        return bias
    of = torch.arange(first, first + length, device=query.device)[None, :]
    return bias + slopes[:, None, None].to(query.dtype) * of.to(query.dtype)


def _hiding(
    start: int,
    count: int,
    first: int,
    length: int,
    window: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return minus infinity (1, T, L) where a token doesn't see a key, and zero elsewhere."""
    at = torch.arange(start, start + count, device=device)[:, None]
    of = torch.arange(first, first + length, device=device)[None, :]
    hidden = of > at
    if window:
        hidden |= of <= at - window
    if chunk:
        hidden |= of < at // chunk * chunk
    bias = torch.zeros(1, count, length, dtype=dtype, device=device)
    return bias.masked_fill_(hidden, float("-inf"))


def _by_distance(distances: torch.Tensor, start: int, first: int, length: int) -> torch.Tensor:
    """Return what is added to the scores (H, T, L) of tokens from position `start` on.

    Keys are those from position `first` on.
    """
    at = torch.arange(start, start + distances.shape[1], device=distances.device)[:, None]
    back = at - torch.arange(first, first + length, device=distances.device)[None, :]
    most = distances.shape[2] - 1
    index = back.clamp(0, most).expand(distances.shape[0], -1, -1)
    return distances.gather(2, index).masked_fill((back < 0) | (back > most), 0.0)


def _by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`_look_back` where scores are capped, or have a further one a head that has no value."""
    heads, count, width = query.shape
    key_heads, length = keys.shape[:2]
    rows = query.reshape(key_heads, -1, width)
    scores = torch.matmul(rows, keys.transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.reshape(heads, count, length)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks if sinks.dim() == 3 else sinks[:, None, None]
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(heads, count, 1)], -1)
    shares = torch.softmax(scores.float(), -1)[..., :length].to(query.dtype)
    looked = torch.matmul(shares.reshape(key_heads, -1, length), values)
    return looked.reshape(heads, count, values.shape[2])
