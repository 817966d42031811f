"""Idioms of modelling code, each in a tiny model: what people write that a graph may not hold.

An idiom is the middle of a model: a function of hidden values, or a module. What comes before and
after it has parameters, so that gradients have to pass through, and the model can be cut around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .case import IDIOMS, RIGHT, Case, Subject

WIDTH, TOKENS = 8, 32
_MODULES = (
    "idioms_left",
    "idioms_state",
    "idioms_gradients",
    "idioms_numbers",
    "idioms_sizes",
    "idioms_layers",
    "idioms_operators",
    "idioms_losses",
)
_SHAPES: dict[str, Any] = {
    "vectors": ((3,), (5,)),
    "sequences": ((3, 12), (5, 17)),
    "images": ((3,), (5,)),
    "tokens": ((3, 12), (5, 17)),
}
_CASES: list[Case] = []


def cases() -> list[Case]:
    """Return all idioms."""
    for module in _MODULES:
        import_module(f".{module}", __package__)
    return list(_CASES)


def idiom(
    kind: str = "vectors", expected: str = RIGHT, dtype: torch.dtype = torch.float32
) -> Callable[[Any], Any]:
    """Register a function of hidden values (or a module class) as the middle of a model.

    Parameters
    ----------
    kind : {"vectors", "sequences", "images", "tokens"}
        What it gets: (B, 8), (B, T, 8), (B, 8, 8, 8), or embedded tokens (B, T, 8).
    """

    def register(body: Any) -> Any:
        def make() -> Subject:
            torch.manual_seed(0)
            model = Around(kind, body() if isinstance(body, type) else body)
            model = model if dtype == torch.float32 else model.to(dtype)
            return Subject(model.train(), partial(_batch, kind, dtype), weighted_square)

        name = body.__name__
        _CASES.append(Case(IDIOMS, name, make, _SHAPES[kind], (2, None), expected=expected))
        return body

    return register


def whole(
    kind: str = "vectors",
    expected: str = RIGHT,
    batch: Callable[..., Any] | None = None,
    loss: Callable[[], Any] | None = None,
    shapes: Any = None,
) -> Callable[[Any], Any]:
    """Register a module class as a model of its own, with its batches and what makes its loss."""

    def register(body: type[nn.Module]) -> type[nn.Module]:
        def make() -> Subject:
            torch.manual_seed(0)
            model = body().train()
            own = loss() if loss is not None else None
            return Subject(model, batch or partial(_batch, kind, torch.float32), own)

        at = shapes or _SHAPES[kind]
        _CASES.append(Case(IDIOMS, body.__name__, make, at, (2, None), expected=expected))
        return body

    return register


class Around(nn.Module):
    """A stem with parameters, the idiom, and a gain after it."""

    def __init__(self, kind: str, body: Any) -> None:
        super().__init__()
        stems: dict[str, Callable[[], nn.Module]] = {
            "images": lambda: nn.Conv2d(3, WIDTH, 3, padding=1),
            "tokens": lambda: nn.Embedding(TOKENS, WIDTH),
        }
        self.stem = stems.get(kind, lambda: nn.Linear(WIDTH, WIDTH))()
        self.body = body
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(torch.tanh(self.stem(x))) * self.gain
        return found


def _batch(
    kind: str, dtype: torch.dtype, rows: int, length: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "tokens":
        x = torch.randint(0, TOKENS, (rows, length))
    elif kind == "images":
        x = torch.randn(rows, 3, 8, 8, dtype=dtype)
    else:
        x = torch.randn(rows, *([length] if length else []), WIDTH, dtype=dtype)
    return x, torch.randn(rows, dtype=dtype)


def weighted_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that sees where in the output a value is, so that no order or place goes unnoticed."""
    flat = output.reshape(output.shape[0], -1)
    flat = flat.abs() if flat.is_complex() else flat
    weights = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))
    return (((flat * weights).mean(1) - target.to(flat.dtype)) ** 2).mean()
