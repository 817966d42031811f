"""transformers' functions over whole sequences that recurrent mixers call, by operators with states.

Names of arguments are theirs: mixers pass them by name.
"""
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from dagflow.graph.recurrent_operators import States

# RWKV's logarithm of nothing.
_LEAST = -1e38


def causal_conv1d(
    states: States,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Convolve (1, C, N) along the tokens, each channel by its own weights (C, k)."""
    found = states.convolution(hidden_states.transpose(1, 2).to(weight.dtype), weight)
    if bias is not None:
        found = found + bias.float()
    if activation is not None:
        from transformers.activations import ACT2FN

        found = ACT2FN[activation](found)
    return found.to(hidden_states.dtype).transpose(1, 2)


def selective_scan(
    states: States,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """Mamba's: hidden_states, dt and z (1, H, N), A (H, K), B and C (1, K, N)."""
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = (functional.softplus(dt) if delta_softplus else dt).transpose(1, 2).float()
    inputs = hidden_states.transpose(1, 2)
    keys, queries = B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None]
    value = (dt * inputs.float())[..., None]
    found = states.scan(queries, keys, value, dt, rates=A.float())[..., 0]
    if D is not None:
        found = found + inputs * D
    found = found.transpose(1, 2)
    return found if z is None else found * functional.silu(z)


def chunk_scan(
    states: States,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """Mamba 2's: hidden_states (1, N, H, V), dt (1, N, H), A (H,), B and C (1, N, G, K)."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    inputs = hidden_states.float()
    found = states.scan(C, B, inputs * dt[..., None], dt * A.float())
    return found if D is None else found + D[..., None] * inputs


def gated_delta_rule(
    states: States,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, None]:
    """Query and key (1, N, G, K), value (1, N, H, V), beta (1, N, H), g (1, N, H) or, KDA's, by key."""
    queries, keys = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        queries, keys = _normalised(queries), _normalised(keys)
    found = states.scan(queries * query.shape[-1] ** -0.5, keys, value, g, beta=beta)
    return found.to(query.dtype), None


def _normalised(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)


def rwkv_attention(
    states: States,
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """RWKV's wkv (arXiv 2305.13048): key and value (1, N, C), times (C,).

    Sums of values by exp(key), and of these weights, both divided by the exponential of the largest so
    far; the token's own key weighs otherwise in its output than later.
    """
    keys, values = key.float(), value.float()
    sinking = -torch.exp(time_decay.float()).expand_as(keys)
    most = states.running_max(keys, sinking, _LEAST)
    most_before = states.previous(most, _LEAST)
    weights = torch.exp(keys - most)
    one = torch.ones_like(keys[:, :, :1, None])
    pairs = torch.stack([values * weights, weights], -1)
    sums = states.scan(one, one, pairs, most_before + sinking - most)
    before, of_before = states.previous(sums).unbind(-1)
    own = keys + time_first
    most = torch.maximum(most_before, own)
    past, now = torch.exp(most_before - most), torch.exp(own - most)
    found = (past * before + now * values) / (past * of_before + now)
    return found.to(key.dtype), None


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "mamba_selective_scan": selective_scan,
    "mamba2_chunk_scan": chunk_scan,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "rwkv_linear_attention": rwkv_attention,
}
"""By the name that they have in transformers' modeling modules."""
