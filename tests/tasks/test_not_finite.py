"""Gradients with NaN are refused by the stage that made them, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inline import InlineRun
from torch import nn
from zoo import Example, capture_example

from dagflow.plan.partition import partition
from dagflow_tasks.errors import GarbageReceived
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.replay import StageProgress, progress

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def root_of_zero(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is 0 times infinity."""
    return (output - target).square().mean() + (output * 0).abs().sqrt().mean()


def batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 8), torch.randn(rows, 4)


def run_of(model: nn.Module, loss: Loss) -> InlineRun:
    CACHE.clear()
    example = Example(model, batch, loss)
    dag = capture_example(example)
    return InlineRun(example, dag, partition(dag, 2), num_microbatches=2, journal=1)


@pytest.mark.parametrize("halved", [True, False])
def test_a_gradient_for_another_stage_is_refused_where_it_is_made(halved: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)] if halved else [nn.Linear(8, 4)]
    run = run_of(nn.Sequential(*layers), root_of_zero)
    assert run.graph.halved[1] == halved
    with pytest.raises(GarbageReceived, match=r"by 1[IB]0 step 0 has NaN") as caught:
        run.step(0, [batch(), batch()])
    assert (caught.value.stage, caught.value.has_nan) == (1, True)
    # Other tasks of the stage find its weights, and nothing of the micro-batch.
    assert progress(run.refs[1]) == StageProgress(1, 0)
