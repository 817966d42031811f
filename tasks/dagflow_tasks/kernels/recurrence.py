"""Recurrent layers over sessions' states: what a captured decoder remembers besides keys and values.

Convolutions, state spaces and linear attention look at other tokens in two ways only: they see the
few tokens before (`window`), or a sum over all of them that forgets (`scan`, `running_max`). These
operators are captured whole, as attention is, and know on the worker whose tokens they are given.
A state has the same size however long its session is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dagflow_tasks.kernels.attention import current_spans
from dagflow_tasks.kernels.session_cache import Span
from dagflow_tasks.kernels.states import Advance, RecurrentState, cat_rows, rows_of

WINDOW = "dagflow.window.default"
SCAN = "dagflow.scan.default"
RUNNING_MAX = "dagflow.running_max.default"
RECURRENT = frozenset({WINDOW, SCAN, RUNNING_MAX})


def _over_sessions(number: int, inputs: tuple[torch.Tensor, ...], advance: Advance) -> torch.Tensor:
    """Run over a pass' tokens, each session's from its own state.

    Parameters
    ----------
    number : int
        Which of the model's states it is.
    inputs : tuple of Tensor (N, ...)
    """
    outputs = []
    begin = 0
    for span in current_spans() or [Span(None, 0, inputs[0].shape[0])]:
        end = begin + span.count
        own = rows_of(inputs, begin, end)
        if span.cache is None:
            outputs.append(advance(None, own)[0])
        else:
            state = span.cache.states.setdefault(number, RecurrentState())
            outputs.append(state.run(span.start, own, advance))
        begin = end
    # Whatever strides they have: a model may ask for views of what it takes to be contiguous.
    return cat_rows(outputs).contiguous()


def window(values: torch.Tensor, size: int, state: int, fill: float = 0.0) -> torch.Tensor:
    """Return for each token its own values and those of the tokens before it in its session.

    Short convolutions and token shifts are sums over it.

    Parameters
    ----------
    values : Tensor (1, N, ...)
    size : int
        How many tokens a window has, the token's own last.
    state : int
        Number of the operator's state in the model.
    fill : float
        What stands before the first token.

    Returns
    -------
    Tensor (1, N, size, ...)
    """

    def advance(
        before: torch.Tensor | None, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (new,) = inputs
        if before is None:
            before = new.new_full((size - 1, *new.shape[1:]), fill)
        row = torch.cat([before, new])
        # A copy: a slice would keep the whole pass.
        return row.unfold(0, size, 1).movedim(-1, 1), row[row.shape[0] - size + 1 :].clone()

    return _over_sessions(state, (values[0],), advance)[None]


def scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    state: int,
    rates: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention that forgets: each head has a matrix S (K, V) of keys and values.

    For each token, in float32::

        S = diag(exp(log_decay * rates)) S + key (beta (value - S^T key))^T    with beta: delta rule
        S = diag(exp(log_decay * rates)) S + key value^T                      without
        output = S^T query

    where the delta rule reads S after its decay.

    Parameters
    ----------
    query, key : Tensor (1, N, G, K)
        G divides H: neighbouring heads share them.
    value : Tensor (1, N, H, V)
    log_decay : Tensor (1, N, H) or (1, N, H, K)
    state : int
        Number of the operator's state in the model.
    rates : Tensor (H, K), optional
        Of a decay that differs by a factor along the keys.
    beta : Tensor (1, N, H), optional

    Returns
    -------
    Tensor (1, N, H, V), float32

    References
    ----------
    Mamba (selective state space: V = 1, a head a channel, B the key, C the query), arXiv 2312.00752;
    Mamba 2, 2405.21060; gated delta rule, 2412.06464; Kimi Delta Attention (log_decay by key),
    2510.26692; lightning attention, 2401.04658; RG-LRU (K = V = 1), 2402.19427; mLSTM, 2405.04517.
    """
    groups, heads = key.shape[2], value.shape[2]
    given = (query, key, value, log_decay, *([beta] if beta is not None else []))
    factors = rates.float().reshape(groups, heads // groups, -1, 1) if rates is not None else None

    def advance(
        before: torch.Tensor | None, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _scanned(before, inputs, groups, factors)

    return _over_sessions(state, tuple(tensor[0] for tensor in given), advance)[None]


def _scanned(
    state: torch.Tensor | None,
    inputs: tuple[torch.Tensor, ...],
    groups: int,
    factors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs (T, H, V) and the state (G, H / G, K, V) after tokens' inputs."""
    query, key, value, log_decay, *rest = (tensor.float() for tensor in inputs)
    count, heads, width = value.shape
    shared = heads // groups
    row = _Row(
        query=query[:, :, None],
        key=key[:, :, None],
        value=value.reshape(count, groups, shared, width),
        log_decay=log_decay.reshape(count, groups, shared, -1),
        beta=rest[0].reshape(count, groups, shared, 1) if rest else None,
    )
    if state is None:
        state = value.new_zeros(groups, shared, key.shape[2], width)
    at_once = factors is None and row.log_decay.shape[-1] == 1
    if at_once and count >= _LEAST_AT_ONCE and key.shape[2] * width >= _LEAST_STATE:
        outputs = []
        for begin in range(0, count, _CHUNK_TOKENS):
            output, state = _chunk(state, row.part(begin, begin + _CHUNK_TOKENS))
            outputs.append(output)
        output = cat_rows(outputs)
    else:
        output, state = _one_by_one(state, row, factors)
    return output.reshape(count, heads, width), state


# From so many tokens on, and so many elements of a head's state, matrix products over chunks take less
# than a product a token. Chunks are as in Mamba 2 and flash-linear-attention.
_LEAST_AT_ONCE, _LEAST_STATE, _CHUNK_TOKENS = 8, 64, 64
# exp of it is nothing, and its sums over a chunk are exact enough in float64.
_LEAST_LOG = -1e4


@dataclass(frozen=True)
class _Row:
    """Inputs of tokens: query, key (T, G, 1, K), value (T, G, H / G, V), the rest by (T, G, H / G)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor | None

    def part(self, begin: int, end: int) -> _Row:
        return _Row(
            self.query[begin:end],
            self.key[begin:end],
            self.value[begin:end],
            self.log_decay[begin:end],
            self.beta[begin:end] if self.beta is not None else None,
        )


def _one_by_one(
    state: torch.Tensor, row: _Row, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    logs = row.log_decay[..., None]
    output = torch.empty_like(row.value[..., None, :])
    for t in range(row.value.shape[0]):
        key, new = row.key[t, ..., None, :], row.value[t, ..., None, :]
        decay = (logs[t] if factors is None else logs[t] * factors).exp()
        # The first product makes a tensor of its own: the state before may be marked.
        state = state * decay if t == 0 else state.mul_(decay)
        if row.beta is not None:
            new = (new - key @ state) * row.beta[t, ..., None]
        state.addcmul_(key.transpose(-1, -2), new)
        torch.matmul(row.query[t, ..., None, :], state, out=output[t])
    return output.squeeze(-2), state


def _chunk(state: torch.Tensor, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens at once: what is left of token j at i is ``exp(sum of logs from j + 1 to i)``.

    With the delta rule, what the tokens add (beta (value - S^T key)) solves a triangular system.
    """
    # (G, H / G, T, ...)
    query, key, value = (t.movedim(0, -2) for t in (row.query, row.key, row.value))
    sums = row.log_decay.double().clamp(min=_LEAST_LOG).movedim(0, -2).cumsum(-2)
    left = (sums - sums.transpose(-1, -2)).masked_fill_(_later(value), -torch.inf).exp().float()
    before = sums.exp().float()
    new = value
    if row.beta is not None:
        beta = row.beta.movedim(0, -2)
        system = beta * (key @ key.transpose(-1, -2)) * left
        wanted = beta * (value - before * (key @ state))
        new = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    output = before * (query @ state) + (query @ key.transpose(-1, -2) * left) @ new
    at_end = left[..., -1:, :].transpose(-1, -2)
    state = before[..., -1:, :] * state + key.transpose(-1, -2) @ (at_end * new)
    return output.movedim(-2, 0), state


def _later(value: torch.Tensor) -> torch.Tensor:
    """Tell of each token (T, T) which come after it."""
    count = value.shape[-2]
    return torch.ones(count, count, dtype=torch.bool, device=value.device).triu(1)


def running_max(
    values: torch.Tensor, log_decay: torch.Tensor, state: int, initial: float
) -> torch.Tensor:
    """Return for each token the largest value so far, where what is past sinks by `log_decay` a token.

    It keeps exponential gates in range (arXiv 2405.04517, equation 15; RWKV, 2305.13048, appendix).

    Parameters
    ----------
    values, log_decay : Tensor (1, N, ...)
    state : int
        Number of the operator's state in the model.
    initial : float
        What stands before the first token.

    Returns
    -------
    Tensor (1, N, ...)
    """

    def advance(
        before: torch.Tensor | None, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new, sinking = inputs
        most = new.new_full(new.shape[1:], initial) if before is None else before
        found = []
        for t in range(new.shape[0]):
            most = torch.maximum(most + sinking[t], new[t])
            found.append(most)
        return torch.stack(found), most

    return _over_sessions(state, (values[0], log_decay[0]), advance)[None]
