"""Training with dagflow's tasks is training with a plain torch loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, count_onednn_layers
from zoo import Example, build, captured, without_dropout

from dagflow.plan.partition import partition
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer

OPTIMIZER = Optimizer("AdamW", lr=1e-3)


def build_without_dropout(name: str) -> Example:
    example = build(name)
    without_dropout(example.model)
    return example


def batches(example: Example, steps: int, num_microbatches: int) -> list[list[Any]]:
    torch.manual_seed(2)
    return [[example.batch(3) for _ in range(num_microbatches)] for _ in range(steps)]


def train_with_torch(
    example: Example, data: list[list[Any]], clip_norm: float | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = copy.deepcopy(example.model)
    example = Example(model, example.batch, example.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in data:
        total = 0.0
        for batch in step:
            loss = example.eager_loss(batch)
            (loss / len(step)).backward()
            total += loss.item() / len(step)
        losses.append(total)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def train_with_dagflow(
    name: str, data: list[list[Any]], num_stages: int, clip_norm: float | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    CACHE.clear()
    example, dag = build_without_dropout(name), captured(name, dropout=False)
    run = InlineRun(
        example,
        dag,
        partition(dag, num_stages),
        num_microbatches=len(data[0]),
        optimizer=OPTIMIZER,
        clip_norm=clip_norm,
    )
    for step, step_batches in enumerate(data):
        run.step(step, step_batches)
    names = {name for name, _ in example.model.named_parameters()}
    return run.losses, {n: t for n, t in run.weights(len(data)).items() if n in names}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "resnet", "lstm", "two_branches"])
def test_ten_steps_of_four_microbatches_have_torchs_losses(name: str) -> None:
    example = build_without_dropout(name)
    data = batches(example, 10, 4)
    wanted, _ = train_with_torch(example, data)
    found, _ = train_with_dagflow(name, data, num_stages=3)
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["llama", "two_branches", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_on_onednns_kernels_ten_steps_have_torchs_losses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = count_onednn_layers(monkeypatch)
    example = build_without_dropout(name)
    data = batches(example, 10, 4)
    wanted, _ = train_with_torch(example, data)
    found, _ = train_with_dagflow(name, data, num_stages=3)
    assert num_calls() > 0
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["two_branches", "llama"])
def test_one_microbatch_of_untied_weights_trains_with_torchs_bits(name: str) -> None:
    example = build_without_dropout(name)
    data = batches(example, 5, 1)
    wanted_losses, wanted = train_with_torch(example, data)
    losses, weights = train_with_dagflow(name, data, num_stages=3)
    assert losses == wanted_losses
    assert_same_bits(weights, wanted)


@pytest.mark.parametrize("name", ["two_branches", "llama"])
def test_clipping_one_microbatch_of_untied_weights_has_torchs_bits(name: str) -> None:
    example = build_without_dropout(name)
    data = batches(example, 5, 1)
    wanted_losses, wanted = train_with_torch(example, data, clip_norm=0.1)
    losses, weights = train_with_dagflow(name, data, num_stages=3, clip_norm=0.1)
    assert losses == wanted_losses
    assert_same_bits(weights, wanted)


@pytest.mark.parametrize("name", ["two_branches", "gpt2"])
def test_clipping_sums_of_microbatches_is_torchs_to_rounding(name: str) -> None:
    example = build_without_dropout(name)
    data = batches(example, 5, 4)
    wanted, _ = train_with_torch(example, data, clip_norm=0.1)
    found, _ = train_with_dagflow(name, data, num_stages=3, clip_norm=0.1)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found != pytest.approx(train_with_torch(example, data)[0], rel=1e-6)
