"""Linear attention over whole sequences, as training computes it: see `kernels.whole_sequences`.

Shapes: B sequences of T tokens, H heads, K keys and V values a head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LIGHTNING = "dagflow.lightning_blocks.default"
MATRIX_MEMORY = "dagflow.matrix_memory.default"


def lightning_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rates: torch.Tensor,
    query_decay: torch.Tensor,
    key_decay: torch.Tensor,
    own_decay: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """MiniMax's lightning attention (arXiv 2501.08313, section 2.2.1), block by block.

    Parameters
    ----------
    query, key, value : Tensor (B, H, T, K)
    rates : Tensor (H, 1, 1)
        How fast each head forgets.
    query_decay, key_decay : Tensor (H, block, 1)
        What is left of a block's beginning at each of its tokens, and of each token at its end.
    own_decay : Tensor (1, H, block, block)
        What is left of each token of a block at each other.

    Returns
    -------
    Tensor (B, H, T, K)
    """
    batch, heads, length, width = query.shape
    state = torch.zeros(batch, heads, width, width, device=value.device, dtype=value.dtype)
    outputs = []
    for start in range(0, length, block):
        q, k, v = (t[:, :, start : start + block] for t in (query, key, value))
        count = q.shape[2]
        left = torch.exp(-rates * count)
        scores = torch.matmul(q, k.transpose(-1, -2)) * own_decay[:, :, :count, :count]
        own = torch.matmul(scores, v)
        before = torch.matmul(q * query_decay[:, :count], state)
        outputs.append(before + own)
        added = torch.matmul((k * key_decay[:, -count:]).transpose(-1, -2), v)
        state = state * left + added
    return torch.cat(outputs, dim=-2)


def matrix_memory(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    forget: torch.Tensor,
    epsilon: float,
    memory: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    most: torch.Tensor | None = None,
) -> torch.Tensor:
    """xLSTM's mLSTM (arXiv 2405.04517, equations 19 to 27), token by token, its memory in float32.

    Parameters
    ----------
    query, key : Tensor (B, H, T, K)
    value : Tensor (B, H, T, V)
    gate, forget : Tensor (B, H, T)
        Of the input, and of the memory, before their functions.
    memory : Tensor (B, H, K, V), optional
        What it begins with; `weights` (B, H, K) and `most` (B, H, 1), the largest gate, belong to it.

    Returns
    -------
    Tensor (B, H, T, V)
    """
    query, key, value, gate, forget = (t.contiguous() for t in (query, key, value, gate, forget))
    batch, heads, length, width = query.shape
    dtype = query.dtype
    shapes = (width, value.shape[-1]), (width,), (1,)
    memory, weights, most = (
        torch.zeros(batch, heads, *shape, device=query.device) if x is None else x.to(torch.float32)
        for x, shape in zip((memory, weights, most), shapes, strict=True)
    )
    outputs = []
    for t in range(length):
        q, k, v = query[:, :, t, :], key[:, :, t, :], value[:, :, t, :]
        new, sinking = gate[:, :, t, None], functional.logsigmoid(forget[:, :, t, None])
        before, most = most, torch.max(sinking + most, new)
        left, added = torch.exp(sinking + before - most), torch.exp(new - most)
        scaled = (q * width**-0.5)[:, :, None, :]
        pairs = k[:, :, :, None] @ v[:, :, None, :]
        memory = left[:, :, :, None] * memory.clone() + added[:, :, :, None] * pairs
        weights = left * weights.clone() + added * k
        read = (scaled @ memory.to(dtype)).squeeze(2).to(torch.float32)
        weight = (scaled @ weights[:, :, :, None].to(dtype)).squeeze(2)
        least = torch.exp(-most)
        bound = (torch.maximum(weight.abs(), least) + epsilon).to(torch.float32)
        outputs.append((read / bound).to(dtype))
        memory, weights, most = (x.to(torch.float32) for x in (memory, weights, most))
    return torch.stack(outputs, dim=-2)
