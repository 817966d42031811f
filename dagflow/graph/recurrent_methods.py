"""Methods of transformers' mixers that go through the tokens themselves, by operators with states.

Each takes the states, the module, and what the method is given that decides its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from dagflow.graph.recurrent_operators import States


def lightning_attention(
    states: States, module: Any, hidden_states: torch.Tensor, position_embeddings: Any
) -> tuple[torch.Tensor, None]:
    """MiniMax's (arXiv 2501.08313): linear attention whose heads forget at rates of their own.

    Positions don't matter to it.
    """
    shape = (*hidden_states.shape[:2], module.num_attention_heads, 3 * module.head_dim)
    mixed = module.act_fn(module.qkv_proj(hidden_states)).reshape(shape)
    query, key, value = torch.split(mixed, module.head_dim, dim=3)
    decay = -module.slope_rate.reshape(1, 1, -1).expand(value.shape[:3])
    found = states.scan(query, key, value, decay).to(hidden_states.dtype)
    found = module.norm(found.flatten(2))
    found = functional.sigmoid(module.output_gate(hidden_states)) * found
    return module.out_proj(found), None


def recurrent_block(
    states: States,
    module: Any,
    input_states: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: Any,
) -> tuple[torch.Tensor, None]:
    """RecurrentGemma's convolution and RG-LRU (arXiv 2402.19427); the mask is for other layers."""
    gate = module.act_fn(module.linear_y(input_states))
    weight, bias = module.conv_1d.weight.squeeze(1), module.conv_1d.bias
    mixed = states.convolution(module.linear_x(input_states), weight) + bias.float()
    found = module.rg_lru(mixed.to(input_states.dtype), position_ids)
    return module.linear_out(found * gate), None


def rg_lru_scan(
    states: States,
    module: Any,
    hidden_states: torch.Tensor,
    recurrent_gate: torch.Tensor,
    reset: torch.Tensor,
    recurrent_states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each channel is a head of one key and one value (1, N, C). A session begins without a state."""
    one = torch.ones_like(hidden_states[:, :, :1, None])
    decay = torch.log(recurrent_gate.float())
    found = states.scan(one, one, hidden_states[..., None], decay)[..., 0]
    return found.to(hidden_states.dtype), recurrent_states


def mlstm(
    states: States,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """xLSTM's matrix memory (arXiv 2405.04517, equations 19 to 27): query (1, H, N, K), gates (1, H, N).

    The normaliser is summed as one more column of the values.
    """
    gate, sinking = (
        igate.transpose(1, 2).float(),
        functional.logsigmoid(fgate.transpose(1, 2).float()),
    )
    most = states.running_max(gate, sinking, 0.0)
    decay = sinking + states.previous(most) - most
    values = value.transpose(1, 2).float()
    columns = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    weighted = columns * torch.exp(gate - most)[..., None]
    queries = query.transpose(1, 2).float() * query.shape[-1] ** -0.5
    found = states.scan(queries, key.transpose(1, 2), weighted, decay)
    numerator, normaliser = found[..., :-1], found[..., -1:]
    least = torch.exp(-most)[..., None]
    found = numerator / (torch.maximum(normaliser.abs(), least) + module.config.eps)
    return found.to(query.dtype).transpose(1, 2), None


def compressed_attention(
    states: States, module: Any, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ZAYA's queries, keys and values (arXiv 2510.04476): convolved twice, and half of them delayed."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    groups = module.num_key_value_groups
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    shared = keys.view(shape).repeat_interleave(groups, 2)
    query_residual = (queries.view(shape) + shared) * 0.5
    key_residual = query_residual.unflatten(2, (-1, groups)).mean(dim=-2)
    windows = states.window(torch.cat([queries, keys], -1), module.conv_kernel_size + 1)
    # A row of windows: what is before the first token goes through the first convolution, too.
    mixed = module.conv_qk_grouped(module.conv_qk_depthwise(windows[0].transpose(1, 2)))
    query, key = mixed[None, :, :, 0].split([queries.shape[-1], keys.shape[-1]], -1)
    delayed = module.v_proj_delayed(states.previous(hidden_states))
    value = torch.cat([module.v_proj_current(hidden_states), delayed], -1).view(shape)
    return query.view(shape) + query_residual, key.view(shape) + key_residual, value


def dynamic_convolution(
    states: States, module: Any, hidden_states: torch.Tensor, dynamic_input: torch.Tensor
) -> torch.Tensor:
    """Inkling 2's: weights of each token's own, shared within a head."""
    size, heads = module.conv_kernel_size, module.num_heads
    shape = (*hidden_states.shape[:2], heads, -1, size)
    dynamic = module.weight_proj(dynamic_input).float().reshape(*shape[:3], 1, size)
    weights = module.static_weight.float().T.reshape(heads, -1, size) + dynamic
    values = hidden_states.float()
    windows = states.window(values, size).flip(2).transpose(2, 3).reshape(shape)
    found: torch.Tensor = (windows * weights).sum(-1).flatten(2) + values
    return (found / math.sqrt(2 * size + 1)).to(hidden_states.dtype)


def ngram_embedding(states: States, module: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Qwen 4's embedding of the n-grams that end at each token, by their hashes."""
    fill = float(module.eos_token_id)
    rows = states.window(input_ids.long(), module.ngram_size, fill)[0]
    shifted = [
        module._shift_right_ignore_eos(rows, shift)[:, -1] * module.layer_multipliers[shift]
        for shift in range(module.ngram_size)
    ]
    blocks, mixed = [], shifted[0]
    for position, own in enumerate(shifted[1:]):
        mixed = torch.bitwise_xor(mixed, own)
        heads = slice(position * module.heads_per_ngram, (position + 1) * module.heads_per_ngram)
        hashed = torch.remainder(mixed[:, None], module.ngram_heads_vocab_sizes[heads])
        blocks.append(hashed + module.ngram_heads_offsets[heads])
    found: torch.Tensor = module.ngram_embedding(torch.cat(blocks, -1)).flatten(-2)[None]
    return found


def dilated_convolution(states: States, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Qwen 4's convolution over tokens that are n apart."""
    windows = states.window(hidden_states, module.short_conv_state_len + 1)
    apart = windows[:, :, :: module.conv1d.dilation[0]]
    found = (apart.float() * module.conv1d.weight.squeeze(1).float().t()).sum(2)
    return functional.silu(found.to(hidden_states.dtype))


METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("MiniMaxLightningAttention", "forward"): lightning_attention,
    ("RecurrentGemmaRecurrentBlock", "forward"): recurrent_block,
    ("RecurrentGemmaRglru", "_rnn_scan"): rg_lru_scan,
    ("xLSTMBackend", "forward"): mlstm,
    ("ZayaCCAProjection", "forward"): compressed_attention,
    ("Inkling2DynamicShortConvolution", "forward"): dynamic_convolution,
    ("Qwen4ExpTextNGramEmbedding", "forward"): ngram_embedding,
    ("Qwen4ExpTextPLELayer", "_short_conv"): dilated_convolution,
}
"""By the names that their classes and they have in transformers' modeling modules."""
