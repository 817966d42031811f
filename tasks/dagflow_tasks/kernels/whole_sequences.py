"""Recurrent layers over whole sequences, as training computes them: loops that a trace would unroll.

Unrolled, a loop over tokens or chunks fixes how many there are, and takes a trace minutes. As one
operator it takes sequences of any length. Each runs the operators of transformers' reference
implementation of the same function in their order, so that bits and gradients (autograd's, through the
loop) are the same as eager's.

Shapes: B sequences of T tokens, H heads, K keys and V values a head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

SELECTIVE_SCAN = "dagflow.selective_scan.default"
STATE_SPACE = "dagflow.state_space_chunks.default"
DELTA_RULE = "dagflow.delta_rule_chunks.default"
KIMI_DELTA = "dagflow.kimi_delta_chunks.default"
LINEAR_RECURRENCE = "dagflow.linear_recurrence.default"
WEIGHTED_SUMS = "dagflow.weighted_sums.default"


def selective_scan(
    inputs: torch.Tensor,
    step: torch.Tensor,
    rates: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    skip: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    step_bias: torch.Tensor | None = None,
    softplus: bool = False,
) -> torch.Tensor:
    """Mamba's selective state space (arXiv 2312.00752), token by token.

    Parameters
    ----------
    inputs, step, gate : Tensor (B, H, T)
    rates : Tensor (H, K)
    key, query : Tensor (B, K, T)
    skip, step_bias : Tensor (H,)
    softplus : bool
        Of the step.

    Returns
    -------
    Tensor (B, H, T)
    """
    if step_bias is not None:
        step = step + step_bias.to(step.dtype)[..., None]
    if softplus:
        step = functional.softplus(step)
    key, query = key.transpose(1, 2), query.transpose(1, 2)
    decay = torch.exp(rates[None, :, None, :] * step[:, :, :, None])
    added = step[:, :, :, None] * key[:, None, :, :].float() * inputs[:, :, :, None].float()
    state = torch.zeros(
        *inputs.shape[:2], rates.shape[-1], dtype=inputs.dtype, device=inputs.device
    )
    outputs = []
    for t in range(inputs.shape[2]):
        state = decay[:, :, t] * state + added[:, :, t]
        outputs.append(torch.matmul(state.to(inputs.dtype), query[:, t, :].unsqueeze(-1))[:, :, 0])
    output = torch.stack(outputs, dim=-1)
    if skip is not None:
        output = output + inputs * skip[None, :, None]
    return output if gate is None else output * functional.silu(gate)


def state_space_chunks(
    inputs: torch.Tensor,
    step: torch.Tensor,
    rates: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    chunk: int,
    skip: torch.Tensor | None = None,
    step_bias: torch.Tensor | None = None,
    softplus: bool = False,
    least_step: float = 0.0,
    most_step: float = float("inf"),
) -> torch.Tensor:
    """Mamba 2's state space dual (arXiv 2405.21060, section 6), chunk by chunk.

    Parameters
    ----------
    inputs : Tensor (B, T, H, V)
    step : Tensor (B, T, H)
    rates, skip, step_bias : Tensor (H,)
    key, query : Tensor (B, T, G, K)
    chunk : int
        Tokens in one.

    Returns
    -------
    Tensor (B, T, H, V)
    """
    batch, length, heads, width = inputs.shape
    if step_bias is not None:
        step = step + step_bias.to(step.dtype)
    if softplus:
        step = functional.softplus(step)
    step = torch.clamp(step, min=least_step, max=most_step)
    inputs = inputs.float()
    shared = heads // key.shape[2]
    key, query = (t.float().repeat_interleave(shared, 2, output_size=heads) for t in (key, query))
    pad = -length % chunk
    skipped = skip[..., None] * _padded(inputs, pad) if skip is not None else None
    inputs = inputs * step[..., None].float()
    logs = rates.to(inputs.dtype) * step.float()
    inputs, logs, key, query = (
        _chunked(_padded(t, pad), 1, chunk) for t in (inputs, logs, key, query)
    )
    logs = logs.permute(0, 3, 1, 2)
    sums = torch.cumsum(logs, dim=-1)
    left = torch.exp(_sums_between(logs))
    scores = torch.einsum("bclhn,bcshn->bclsh", query, key)
    within = torch.einsum("bclsh,bcshp->bclhp", scores * left.permute(0, 2, 3, 4, 1), inputs)
    to_end = key * torch.exp(sums[:, :, :, -1:] - sums).permute(0, -2, -1, 1)[..., None]
    states = torch.einsum("bclhn,bclhp->bchpn", to_end, inputs)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(_sums_between(functional.pad(sums[:, :, :, -1], (1, 0)))).transpose(1, 3)
    states = torch.einsum("bzch,bzhpn->bchpn", between, states)[:, :-1]
    before = torch.einsum("bclhn,bchpn->bclhp", query, states)
    output = (within + before * torch.exp(sums).permute(0, 2, 3, 1)[..., None]).contiguous()
    output = output.reshape(batch, -1, heads, width)
    if skipped is not None:
        output = output + skipped
    return output[:, :length] if pad else output


def _padded(rows: torch.Tensor, pad: int) -> torch.Tensor:
    return functional.pad(rows, (*(0, 0) * (rows.dim() - 2), 0, pad), mode="constant", value=0)


def _chunked(rows: torch.Tensor, dim: int, chunk: int) -> torch.Tensor:
    """Divide a dimension of tokens into chunks."""
    return rows.reshape(*rows.shape[:dim], -1, chunk, *rows.shape[dim + 1 :])


def _sums_between(logs: torch.Tensor) -> torch.Tensor:
    """Return the sums of logarithms (..., T) from each token, exclusive, to each later one."""
    count = logs.size(-1)
    rows = logs[..., None].expand(*logs.size(), count)
    ones = torch.ones(count, count, device=logs.device, dtype=torch.bool)
    sums = torch.cumsum(rows.masked_fill(~torch.tril(ones, diagonal=-1), 0), dim=-2)
    return sums.masked_fill(~torch.tril(ones, diagonal=0), -torch.inf)


def delta_rule_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    chunk: int,
    normalised: bool = False,
) -> torch.Tensor:
    """Gated delta rule (arXiv 2412.06464, section 3.3), chunk by chunk.

    Parameters
    ----------
    query, key : Tensor (B, T, G, K)
    value : Tensor (B, T, H, V)
    log_decay, beta : Tensor (B, T, H)
    chunk : int
        Tokens in one.
    normalised : bool
        Whether queries and keys are divided by their lengths.

    Returns
    -------
    Tensor (B, T, H, V)
    """
    dtype, length, heads = query.dtype, query.shape[1], value.shape[2]
    if key.shape[2] != heads:
        query = query.repeat_interleave(heads // key.shape[2], dim=2)
        key = key.repeat_interleave(heads // key.shape[2], dim=2)
    query, key, value, beta, log_decay = (
        t.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        for t in (query, key, value, beta, log_decay)
    )
    if normalised:
        query = query * torch.rsqrt((query * query).sum(dim=-1, keepdim=True) + 1e-6)
        key = key * torch.rsqrt((key * key).sum(dim=-1, keepdim=True) + 1e-6)
    query = query * query.shape[-1] ** -0.5
    pad = -length % chunk
    query, key, value = (functional.pad(t, (0, 0, 0, pad)) for t in (query, key, value))
    beta, log_decay = (functional.pad(t, (0, pad)) for t in (beta, log_decay))
    value_beta, key_beta = value * beta.unsqueeze(-1), key * beta.unsqueeze(-1)
    query, key, key_beta, value_beta = (
        _chunked(t, 2, chunk) for t in (query, key, key_beta, value_beta)
    )
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    sums = _chunked(log_decay, 2, chunk).cumsum(dim=3)
    left = sums.unsqueeze(4) - sums.unsqueeze(3)
    left = left.masked_fill(later, float("-inf")).exp()
    system = (key_beta @ key.transpose(-1, -2)) * left
    scores = (query @ key.transpose(-1, -2)) * left
    read = key_beta * sums.exp().unsqueeze(-1)
    new = torch.linalg.solve_triangular(system, value_beta, upper=False, unitriangular=True)
    read = torch.linalg.solve_triangular(system, read, upper=False, unitriangular=True)
    state = torch.zeros(
        *key.shape[:2], key.shape[-1], value.shape[-1], dtype=new.dtype, device=new.device
    )
    output = torch.zeros_like(new)
    query = query * sums.exp().unsqueeze(-1)
    key = key * (sums[..., -1:] - sums).exp().unsqueeze(-1)
    decay = sums[..., -1].exp()[..., None, None]
    for i in range(new.shape[2]):
        corrected = new[:, :, i] - read[:, :, i] @ state
        before = query[:, :, i] @ state
        output[:, :, i] = before + scores[:, :, i] @ corrected
        state = state * decay[:, :, i] + key[:, :, i].transpose(-1, -2) @ corrected
    output = output.flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def kimi_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    chunk: int,
    normalised: bool = False,
) -> torch.Tensor:
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay for each key.

    Parameters are those of `delta_rule_chunks`, but for query, key, log_decay : Tensor (B, T, H, K).
    """
    dtype, length = query.dtype, query.shape[1]
    query, key, value, beta, log_decay = (
        t.transpose(1, 2).contiguous().to(torch.float32)
        for t in (query, key, value, beta, log_decay)
    )
    if normalised:
        query = query / torch.sqrt((query * query).sum(dim=-1, keepdim=True) + 1e-6)
        key = key / torch.sqrt((key * key).sum(dim=-1, keepdim=True) + 1e-6)
    pad = -length % chunk
    query = functional.pad(query, (0, 0, 0, pad)) * (1 / (query.shape[-1] ** 0.5))
    key, value, log_decay = (functional.pad(t, (0, 0, 0, pad)) for t in (key, value, log_decay))
    beta = functional.pad(beta, (0, pad))
    value_beta, key_beta = value * beta.unsqueeze(-1), key * beta.unsqueeze(-1)
    query, key, log_decay, key_beta, value_beta = (
        _chunked(t, 2, chunk) for t in (query, key, log_decay, key_beta, value_beta)
    )
    sums = log_decay.cumsum(dim=-2)
    ones = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device)
    not_before, later = torch.triu(ones, diagonal=0), torch.triu(ones, diagonal=1)
    left = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(later[..., None], float("-inf"))
    left = left.exp().float()
    system = -(key_beta.unsqueeze(-2) * key.unsqueeze(-3) * left).sum(dim=-1)
    system = system.masked_fill(not_before, 0)
    for i in range(1, chunk):
        row, above = system[..., i, :i].clone(), system[..., :i, :i].clone()
        system[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    system = system + torch.eye(chunk, dtype=system.dtype, device=system.device)
    new, read = system @ value_beta, system @ (key_beta * sums.exp())
    state = torch.zeros(
        *key.shape[:2], key.shape[-1], value.shape[-1], dtype=new.dtype, device=new.device
    )
    output = torch.zeros_like(new)
    for i in range(new.shape[2]):
        own_query, own_key, own_sums = query[:, :, i], key[:, :, i], sums[:, :, i]
        before = (own_query * own_sums.exp()) @ state
        scores = (own_query.unsqueeze(-2) * own_key.unsqueeze(-3) * left[:, :, i]).sum(dim=-1)
        corrected = new[:, :, i] - read[:, :, i] @ state
        output[:, :, i] = before + scores.masked_fill(later, 0) @ corrected
        to_end = own_key * (own_sums[:, :, -1:] - own_sums).exp()
        state = state * own_sums[:, :, -1].exp().unsqueeze(-1)
        state = state + to_end.transpose(-1, -2) @ corrected
    output = output.flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).contiguous().to(dtype)


def linear_recurrence(
    inputs: torch.Tensor, gate: torch.Tensor, state: torch.Tensor | None = None
) -> torch.Tensor:
    """RG-LRU's sum that forgets (arXiv 2402.19427, equation 4), token by token, in float32.

    Parameters
    ----------
    inputs, gate : Tensor (B, T, C)
        What is added, and by what the sum before is multiplied.
    state : Tensor (B, C), optional
        The sum before the first token.

    Returns
    -------
    Tensor (B, T, C)
    """
    sums = inputs.new_zeros(inputs[:, 0].shape, dtype=torch.float32) if state is None else state
    output = torch.zeros_like(inputs)
    for t in range(inputs.shape[1]):
        sums = gate[:, t].type(torch.float32) * sums
        sums = sums + inputs[:, t].type(torch.float32)
        output[:, t] = sums.type(inputs.dtype)
    return output


def weighted_sums(
    decay: torch.Tensor, own: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """RWKV's attention (arXiv 2305.13048, equation 16 and appendix D), token by token.

    Parameters
    ----------
    decay, own : Tensor (C,)
        Logarithm of how fast what is past loses weight, and what a token's own key weighs more.
    key, value : Tensor (B, T, C)

    Returns
    -------
    Tensor (B, T, C)
    """
    output = torch.zeros_like(key)
    sums = torch.zeros_like(key[:, 0], dtype=torch.float32)
    weights = torch.zeros_like(key[:, 0], dtype=torch.float32)
    most = torch.zeros_like(key[:, 0], dtype=torch.float32) - 1e38
    decay = -torch.exp(decay)
    for t in range(key.shape[1]):
        now, new = key[:, t].float(), value[:, t]
        top = torch.maximum(most, now + own)
        past, present = torch.exp(most - top), torch.exp(now + own - top)
        numerator, denominator = past * sums + present * new, past * weights + present
        output[:, t] = (numerator / denominator).to(output.dtype)
        top = torch.maximum(most + decay, now)
        past, present = torch.exp(most + decay - top), torch.exp(now - top)
        sums, weights, most = past * sums + present * new, past * weights + present, top
    return output
