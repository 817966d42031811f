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
from typing import Any

import torch
from torch.nn import functional

from dagflow_tasks.kernels.session_cache import Reach, Span

ATTEND = "dagflow.attend.default"
# Of so many tokens a mask is made at a time, or of so many tokens times heads, where each head's scores
# are: so temporaries are of this many times the sequence's length, however long the pass.
_MOST_ROWS = 512


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
