"""Recurrent layers over sessions' states: what a captured decoder remembers besides keys and values.

Convolutions, state spaces and linear attention look at other tokens in two ways only: they see the
few tokens before (`window`), or a sum over all of them that forgets (`scan`, `running_max`). These
operators are captured whole, as attention is, and know on the worker whose tokens they are given.
A state has the same size however long its session is.
"""

from __future__ import annotations

import torch

from dagflow_tasks.attention import Span, current_spans
from dagflow_tasks.states import Advance, RecurrentState, cat_rows, rows_of

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
    return cat_rows(outputs)


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
    """Token by token: outputs (T, H, V) and the state (G, H / G, K, V)."""
    query, key, value, log_decay, *rest = (tensor.float() for tensor in inputs)
    count, heads, width = value.shape
    shared = heads // groups
    queries, keys = query[:, :, None, None], key[:, :, None, None]  # (T, G, 1, 1, K)
    values = value.reshape(count, groups, shared, 1, width)
    logs = log_decay.reshape(count, groups, shared, -1, 1)
    betas = rest[0].reshape(count, groups, shared, 1, 1) if rest else None
    if state is None:
        state = value.new_zeros(groups, shared, key.shape[2], width)
    output = value.new_empty(count, groups, shared, 1, width)
    for t in range(count):
        log = logs[t] if factors is None else logs[t] * factors
        state = state * log.exp()
        new = values[t]
        if betas is not None:
            new = (new - keys[t] @ state) * betas[t]
        state = state + keys[t].transpose(-1, -2) * new
        torch.matmul(queries[t], state, out=output[t])
    return output.reshape(count, heads, width), state


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
