"""Keeps recurrent layers whole while a model is traced, so that sequences may have any length.

torch traces `nn.LSTM`, `nn.GRU` and `nn.RNN` through a loop over the time steps, which fixes their
number. The operators behind them, `aten.lstm.input` and its like, take any; an operator of our own
stands for each in the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("dagflow_trace", "DEF")  # type: ignore[no-untyped-call]
_OPTIONS = (
    "Tensor[] weights, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)
_ONE_STATE = ("gru", "rnn_tanh", "rnn_relu")

TRACED_AS = {
    f"dagflow_trace.{kind}.default": f"aten.{kind}.input" for kind in ("lstm", *_ONE_STATE)
}
"""Operators of the trace, and those that programs have in their places."""


def _outputs(x: torch.Tensor, state: torch.Tensor, bidirectional: bool) -> torch.Tensor:
    """Return what stands for all time steps' states: x (B, T, F) or (T, B, F), state (L, B, H)."""
    directions = 2 if bidirectional else 1
    return x.new_empty(x.shape[0], x.shape[1], directions * state.shape[2])


def _lstm(
    x: torch.Tensor, state: Sequence[torch.Tensor], *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, cell = state
    return _outputs(x, hidden, options[5]), torch.empty_like(hidden), torch.empty_like(cell)


def _recurrent(
    x: torch.Tensor, state: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(x, state, options[5]), torch.empty_like(state)


_LIBRARY.define(f"lstm(Tensor x, Tensor[] state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
torch.library.register_fake("dagflow_trace::lstm", _lstm, lib=_LIBRARY)
for _kind in _ONE_STATE:
    _LIBRARY.define(f"{_kind}(Tensor x, Tensor state, {_OPTIONS}) -> (Tensor, Tensor)")
    torch.library.register_fake(f"dagflow_trace::{_kind}", _recurrent, lib=_LIBRARY)


def stand_in(name: str, args: Sequence[Any]) -> Any | None:
    """Return the operator of the trace for a torch function and its arguments, if it has one."""
    if f"dagflow_trace.{name}.default" not in TRACED_AS or is_packed(args):
        return None
    return getattr(torch.ops.dagflow_trace, name)


def is_packed(args: Sequence[Any]) -> bool:
    """Tell whether a recurrent layer was given a PackedSequence: its batch sizes come second."""
    return len(args) > 3 and isinstance(args[3], (list, tuple))
