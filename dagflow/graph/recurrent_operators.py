"""The operators of recurrent layers as a trace sees them: shapes, and a number for each state."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from dagflow_tasks.kernels import recurrence


@torch.library.custom_op("dagflow::window", mutates_args=())
def _window(values: torch.Tensor, size: int, state: int, fill: float = 0.0) -> torch.Tensor:
    return recurrence.window(values, size, state, fill).clone()


@_window.register_fake
def _window_shape(values: torch.Tensor, size: int, *_: Any) -> torch.Tensor:
    return values.new_empty(*values.shape[:2], size, *values.shape[2:])


@torch.library.custom_op("dagflow::scan", mutates_args=())
def _scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    state: int,
    rates: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    return recurrence.scan(query, key, value, log_decay, state, rates, beta)


@_scan.register_fake
def _scan_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> torch.Tensor:
    return value.new_empty(value.shape, dtype=torch.float32)


@torch.library.custom_op("dagflow::running_max", mutates_args=())
def _running_max(
    values: torch.Tensor, log_decay: torch.Tensor, state: int, initial: float
) -> torch.Tensor:
    return recurrence.running_max(values, log_decay, state, initial)


@_running_max.register_fake
def _running_max_shape(values: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(values)


class States:
    """Numbers the states of a model in the order in which its forward asks for them."""

    def __init__(self) -> None:
        self._numbers = count()

    def begin(self, *_: Any) -> None:
        """Number from zero; a model may be called more than once while it is traced."""
        self._numbers = count()

    def window(self, values: torch.Tensor, size: int, fill: float = 0.0) -> torch.Tensor:
        """Return the last `size` values up to each token's (1, N, size, ...), of values (1, N, ...)."""
        found: torch.Tensor = _window(values, size, next(self._numbers), fill)
        return found

    def previous(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Return for each token the values of the one before."""
        return self.window(values, 2, fill)[:, :, 0]

    def scan(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        rates: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `dagflow_tasks.kernels.recurrence.scan` of a new state."""
        number = next(self._numbers)
        found: torch.Tensor = _scan(query, key, value, log_decay, number, rates, beta)
        return found

    def running_max(
        self, values: torch.Tensor, log_decay: torch.Tensor, initial: float
    ) -> torch.Tensor:
        """Return `dagflow_tasks.kernels.recurrence.running_max` of a new state."""
        found: torch.Tensor = _running_max(values, log_decay, next(self._numbers), initial)
        return found

    def convolution(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the depthwise causal convolution of (1, N, C) by weights (C, k), in float32."""
        windows = self.window(values, weight.shape[-1])
        return (windows.float() * weight.float().t()).sum(2)
