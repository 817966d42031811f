"""Keeps operators whole that torch would take apart, or stop at, while it traces a model.

torch traces `nn.LSTM`, `nn.GRU` and `nn.RNN` through a loop over the time steps, which fixes their
number; and the CTC loss not at all, for what it saves has a size that depends on the targets. The
operators behind them, `aten.lstm.input` and its like, are right for any; an operator of our own stands
for each in the trace.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import _reduction, functional

_LIBRARY: Any = torch.library.Library("dagflow_trace", "DEF")  # type: ignore[no-untyped-call]
_OPTIONS = (
    "Tensor[] weights, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)
_ONE_STATE = ("gru", "rnn_tanh", "rnn_relu")

TRACED_AS = {
    "dagflow_trace.ctc_loss.default": "aten.ctc_loss.Tensor",
    **{f"dagflow_trace.{kind}.default": f"aten.{kind}.input" for kind in ("lstm", *_ONE_STATE)},
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


def _ctc_loss(
    log_probabilities: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> torch.Tensor:
    return log_probabilities.new_empty(() if reduction else input_lengths.shape)


_LIBRARY.define(
    "ctc_loss(Tensor log_probabilities, Tensor targets, Tensor input_lengths, "
    "Tensor target_lengths, int blank, int reduction, bool zero_infinity) -> Tensor"
)
torch.library.register_fake("dagflow_trace::ctc_loss", _ctc_loss, lib=_LIBRARY)
_LIBRARY.define(f"lstm(Tensor x, Tensor[] state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
torch.library.register_fake("dagflow_trace::lstm", _lstm, lib=_LIBRARY)
for _kind in _ONE_STATE:
    _LIBRARY.define(f"{_kind}(Tensor x, Tensor state, {_OPTIONS}) -> (Tensor, Tensor)")
    torch.library.register_fake(f"dagflow_trace::{_kind}", _recurrent, lib=_LIBRARY)


def _ctc_loss_function(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Any:
    """Stands for `torch.nn.functional.ctc_loss`."""
    targets = _in_rows(targets)
    lengths = (input_lengths, target_lengths)
    kind = _reduction.get_enum(reduction)
    is_tensors = all(isinstance(length, torch.Tensor) for length in lengths)
    loss = torch.ops.dagflow_trace.ctc_loss if is_tensors else torch.ctc_loss
    return loss(log_probs, targets, *lengths, blank, kind, zero_infinity)


_SELECTED = "_dagflow_selected"


def _selecting(function: Any) -> Any:
    """Stands for a selection by a mask, which remembers what it has selected from what."""

    def select(values: torch.Tensor, mask: Any, *more: Any, **named: Any) -> Any:
        found = function(values, mask, *more, **named)
        is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
        if is_mask and mask.dim() == values.dim() == 2:
            setattr(found, _SELECTED, (values, mask))
        return found

    return select


def _in_rows(targets: torch.Tensor) -> torch.Tensor:
    """Return targets (S,) that a mask has selected out of rows as rows (B, T) that begin with them.

    How many there are depends on the data, which no graph holds; the CTC loss takes rows as well, and
    their lengths tell it which targets count.
    """
    selected: tuple[torch.Tensor, torch.Tensor] | None = getattr(targets, _SELECTED, None)
    if selected is None:
        return targets
    rows, mask = selected
    order = torch.argsort(mask.logical_not().to(torch.int8), dim=1, stable=True)
    return rows.gather(1, order)


def stand_in(function: Any, name: str) -> Any | None:
    """Return what is called in a trace instead of a torch function, if anything."""
    if function is functional.ctc_loss:
        return _ctc_loss_function
    if name in ("masked_select", "__getitem__"):
        return _selecting(function)
    is_known = not isinstance(function, types.FunctionType) and name in ("lstm", *_ONE_STATE)
    return getattr(torch.ops.dagflow_trace, name) if is_known else None
