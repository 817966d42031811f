"""Captures what recurrent layers compute over whole sequences as one operator each, for training.

transformers' reference functions are loops over tokens or chunks. A trace unrolls them: it takes minutes,
and fixes the sequence's length. See `dagflow_tasks.kernels.whole_sequences`.
"""
# ruff: noqa: N803

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from dagflow.graph.recurrent import kinds_of, replaced_functions, replaced_methods
from dagflow_tasks.kernels import linear_attention
from dagflow_tasks.kernels import whole_sequences as computing


@contextmanager
def whole_sequences(model: torch.nn.Module) -> Iterator[None]:
    """Have a model's recurrent functions captured whole while it is traced for training."""
    with ExitStack() as stack:
        for owner, name, ours in [
            *replaced_functions(model, _FUNCTIONS),
            *replaced_methods(model, _METHODS),
        ]:
            stack.enter_context(patch.object(owner, name, ours))
        for code in {sys.modules[kind.__module__] for kind in kinds_of(model)}:
            if hasattr(code, "SqrtBoundDerivative"):
                stack.enter_context(patch.object(code, "SqrtBoundDerivative", _BoundedSquareRoot))
        yield


class _BoundedSquareRoot:
    """Stands for RecurrentGemma's square root whose derivative is bounded, near zero a large number.

    Written in operators, so that its backward is the one that the model's code has, to the bit.
    """

    @staticmethod
    def apply(x: torch.Tensor) -> torch.Tensor:
        fixed = x.detach()
        bounded = torch.clip(4.0 * fixed, min=1 / _MOST_DERIVATIVE**2).sqrt()
        return fixed.sqrt() + (x - fixed) / bounded


# transformers' _MAX_SQRT_GRADIENT.
_MOST_DERIVATIVE = 1000.0


def _operator(
    function: Callable[..., torch.Tensor], result: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Make an operator of torch's out of what workers run, with the same name and arguments.

    All arguments must be given: torch drops those that equal a default, and knows no infinite one.

    Parameters
    ----------
    result
        Returns a tensor of the result's shape and dtype for the same arguments.
    """
    schema = re.sub(r"=[^,)]+", "", torch.library.infer_schema(function, mutates_args=()))
    name = f"dagflow::{function.__name__}"
    operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    operator.register_fake(result)
    return operator


def _like_scanned(
    inputs: torch.Tensor,
    step: torch.Tensor,
    rates: torch.Tensor,
    key: torch.Tensor,
    query: torch.Tensor,
    skip: torch.Tensor | None,
    gate: torch.Tensor | None,
    *_: Any,
) -> torch.Tensor:
    dtype = inputs.dtype
    for other in (skip, gate):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return inputs.new_empty(inputs.shape, dtype=dtype)


def _like_inputs(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(inputs)


def _like_inputs_in_fp32(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
    return inputs.new_empty(inputs.shape, dtype=torch.float32)


def _like_value(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> torch.Tensor:
    return query.new_empty(value.shape)


def _like_key(decay: torch.Tensor, own: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(key)


_selective_scan = _operator(computing.selective_scan, _like_scanned)
_state_space_chunks = _operator(computing.state_space_chunks, _like_inputs_in_fp32)
_delta_rule_chunks = _operator(computing.delta_rule_chunks, _like_value)
_kimi_delta_chunks = _operator(computing.kimi_delta_chunks, _like_value)
_linear_recurrence = _operator(computing.linear_recurrence, _like_inputs)
_weighted_sums = _operator(computing.weighted_sums, _like_key)
_lightning_blocks = _operator(linear_attention.lightning_blocks, _like_value)
_matrix_memory = _operator(linear_attention.matrix_memory, _like_value)


def _mamba(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    found = _selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
    return (found, _no_state(hidden_states, A)) if return_last_state else found


def _mamba2(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    least, most = map(float, dt_limit)
    found = _state_space_chunks(
        hidden_states, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus, least, most
    )
    return (found, _no_state(hidden_states[:, 0], B[0, 0, 0])) if return_final_states else found


def _delta_rule(chunks: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Return a gated delta rule as transformers' modules call it, around the operator that runs it."""

    def whole(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        use_qk_l2norm_in_kernel: bool = False,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = chunks(query, key, value, g, beta, chunk_size, use_qk_l2norm_in_kernel)
        return found, _no_state(value[:, 0], key[0, 0, 0]) if output_final_state else None

    return whole


def _rwkv(
    time_decay: torch.Tensor, time_first: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, None]:
    return _weighted_sums(time_decay, time_first, key, value), None


def _rg_lru(
    module: Any,
    hidden_states: torch.Tensor,
    recurrent_gate: torch.Tensor,
    reset: torch.Tensor,
    recurrent_states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _linear_recurrence(hidden_states, recurrent_gate * ~reset, recurrent_states)
    return found, found[:, -1].float()


def _lightning_attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    attention_mask: torch.Tensor | None,
    past_key_values: Any = None,
) -> tuple[torch.Tensor, None]:
    """MiniMax's, which takes no notice of positions; a cache is made of the state by nobody here."""
    mixed = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None and attention_mask.dim() == 2:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    shape = (*hidden_states.shape[:2], module.num_attention_heads, 3 * module.head_dim)
    query, key, value = torch.split(mixed.reshape(shape), module.head_dim, dim=3)
    found = _lightning_blocks(
        *(t.transpose(1, 2) for t in (query, key, value)),
        module.slope_rate,
        module.query_decay,
        module.key_decay,
        module.diagonal_decay,
        module.block_size,
    )
    found = module.norm(found.transpose(1, 2).reshape(*hidden_states.shape[:2], -1))
    found = functional.sigmoid(module.output_gate(hidden_states)) * found
    return module.out_proj(found), None


def _mlstm(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c_initial: torch.Tensor | None = None,
    n_initial: torch.Tensor | None = None,
    m_initial: torch.Tensor | None = None,
) -> Any:
    """xLSTM's, of texts that are shorter than a chunk: those that aren't go another way, as there."""
    config, states = module.config, (c_initial, n_initial, m_initial)
    is_short = config.mode == "inference" and query.shape[2] < config.chunk_size
    if is_short and config.inference_state_dtype == "float32":
        found = _matrix_memory(query, key, value, igate, fgate, config.eps, *states)
        memory = _no_state(value[:, :, 0], key[0, 0, 0])
        return found, (memory, memory[..., 0], memory[..., 0, :1])
    way = module._inference_fn if config.mode == "inference" else module._train_fn
    options = (
        {} if config.mode == "inference" else {"return_last_states": config.return_last_states}
    )
    given = dict(zip(("c_initial", "n_initial", "m_initial"), states, strict=True)) | options
    return way(query=query, key=key, value=value, igate=igate, fgate=fgate, **given)


def _no_state(values: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Stand for the state after the last token, which a cache gets and nobody reads in training.

    Whoever did would get NaN.
    """
    return values.new_full((*values.shape[:2], *keys.shape[-1:], *values.shape[2:]), torch.nan)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": _mamba,
    "mamba2_chunk_scan": _mamba2,
    "torch_chunk_gated_delta_rule": _delta_rule(_delta_rule_chunks),
    "chunk_kimi_delta_attention": _delta_rule(_kimi_delta_chunks),
    "rwkv_linear_attention": _rwkv,
}
_METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("RecurrentGemmaRglru", "_rnn_scan"): _rg_lru,
    ("MiniMaxLightningAttention", "forward"): _lightning_attention,
    ("xLSTMBackend", "forward"): _mlstm,
}
# By the names that they have in transformers' modeling modules.
