"""Small runs, and the plain torch loop that they must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from zoo import Example, build, without_dropout

import dagflow

LR = 1e-3


def example(name: str = "two_branches", *, dropout: bool = False) -> Example:
    found = build(name)
    if not dropout:
        without_dropout(found.model)
    return found


def batches(of: Example, count: int, rows: int = 8, seed: int = 3) -> list[Any]:
    torch.manual_seed(seed)
    return [of.batch(rows) for _ in range(count)]


def train(of: Example, data: Any, store: Path | str, **options: Any) -> dagflow.TrainResult:
    """Train with few micro-batches and without a progress line."""
    options = {
        "optimizer": dagflow.Optimizer("AdamW", lr=LR),
        "num_microbatches": 4,
        "progress": False,
        **options,
    }
    return dagflow.train(of.model, data, loss=of.loss, store=store, **options)


def train_with_torch(
    of: Example,
    data: Sequence[Any],
    *,
    make: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=LR),
    factor: Callable[[int], float] = lambda step: 1.0,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the weights of a plain loop over whole batches."""
    of = Example(copy.deepcopy(of.model), of.batch, of.loss)
    optimizer = make([p for p in of.model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for batch in data:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = of.eager_loss(batch)
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(of.model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: t.detach() for name, t in of.model.state_dict().items()}


def assert_same_run(found: dagflow.TrainResult, wanted: dagflow.TrainResult) -> None:
    """Compare two runs' losses and final weights bit for bit."""
    assert found.losses == wanted.losses
    tensors, expected = found.state_dict(), wanted.state_dict()
    assert sorted(tensors) == sorted(expected)
    assert [n for n in expected if not torch.equal(tensors[n], expected[n])] == []
