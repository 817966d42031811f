"""A model cut into stages trains exactly as the uncut one, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from inline import assert_same_bits, count_onednn_layers, run_inline
from zoo import SIMILAR, ZOO, Example, build, captured

from dagflow_tasks.train.optimizer import Optimizer


@dataclass(frozen=True)
class Training:
    """What a training run leaves behind, and in how many stages it ran."""

    num_stages: int
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train(name: str, num_stages: int | None, steps: int = 3, **options: Any) -> Training:
    return train_example(build(name), num_stages, steps, dag=captured(name), **options)


def train_example(
    example: Example, num_stages: int | None, steps: int = 3, **options: Any
) -> Training:
    run = run_inline(example, num_stages, steps, **options)
    return Training(len(run.cut), run.losses, run.gradients(steps - 1, 2), run.weights(steps))


def assert_same_training(found: Training, wanted: Training) -> None:
    assert found.losses == wanted.losses
    assert_same_bits(found.gradients, wanted.gradients)
    assert_same_bits(found.weights, wanted.weights)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SIMILAR else []) for n in ZOO]
)
def test_two_to_four_stages_train_as_one(name: str) -> None:
    whole = train(name, 1)
    assert len(set(whole.losses)) == 3
    for num_stages in (2, 3, 4):
        cut = train(name, num_stages)
        assert cut.num_stages == num_stages
        assert_same_training(cut, whole)


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.slow), "t5", "resnet", "lstm", "two_branches"]
)
def test_one_operator_a_stage_trains_as_one_stage(name: str) -> None:
    finest = train(name, None, steps=2)
    # An LSTM is one operator; what belongs together (a buffer and its writers) is never cut.
    assert finest.num_stages >= min(30, len(captured(name).nodes) // 3)
    assert_same_training(finest, train(name, 1, steps=2))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "two_branches",
        pytest.param("bert", marks=pytest.mark.slow),
        pytest.param("t5", marks=pytest.mark.slow),
    ],
)
def test_on_onednns_kernels_stages_train_as_one_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(name, 1)
    num_calls = count_onednn_layers(monkeypatch)
    whole = train(name, 1)
    assert num_calls() > 0
    assert whole.losses == pytest.approx(plain.losses, rel=1e-5)
    for num_stages in (2, 4):
        assert_same_training(train(name, num_stages), whole)
    assert_same_training(train(name, None, steps=2), train(name, 1, steps=2))


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama", "two_branches"]
)
def test_half_precision_trains_as_one_stage_too(name: str) -> None:
    whole = train(name, 1, precision="bf16")
    assert whole.losses != train(name, 1).losses
    for num_stages in (2, 4):
        assert_same_training(train(name, num_stages, precision="bf16"), whole)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_clipping_takes_the_norm_over_all_stages(name: str) -> None:
    whole = train(name, 1, clip_norm=0.1)
    assert whole.losses[-1] != train(name, 1).losses[-1]
    for num_stages in (2, 4):
        assert_same_training(train(name, num_stages, clip_norm=0.1), whole)


def test_frozen_parameters_stay_as_they_are_in_every_stage() -> None:
    example = build("two_branches")
    for name, parameter in example.model.named_parameters():
        parameter.requires_grad_(name.startswith(("left.2", "head")))
    initial = {name: p.detach().clone() for name, p in example.model.named_parameters()}
    whole, cut = train_example(example, 1), train_example(example, 4)
    assert_same_training(cut, whole)
    moved = {name for name, tensor in cut.weights.items() if not tensor.equal(initial[name])}
    assert moved == {"left.2.weight", "left.2.bias", "head.weight", "head.bias"}


def test_options_by_parameter_name_hold_across_stages() -> None:
    optimizer = Optimizer("AdamW", lr=1e-2, weight_decay=0.5).override("bias$", weight_decay=0.0)
    whole = train("two_branches", 1, optimizer=optimizer)
    assert_same_training(train("two_branches", 3, optimizer=optimizer), whole)
    assert whole.losses != train("two_branches", 1, optimizer=Optimizer("AdamW", lr=1e-2)).losses
