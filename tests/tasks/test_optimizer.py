"""Optimizers and schedules travel by name and options, and their state through the store."""

from __future__ import annotations

import math
import uuid
from typing import Any

import pytest
import torch
from inline import assert_same_bits, run_inline
from zoo import build, captured

from dagflow_storage import Snapshot, Store, commit_snapshot
from dagflow_tasks.errors import OptimizerInvalid
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer, Schedule, restore_slots, slots
from dagflow_tasks.train.state import OPTIMIZER, read_tensors, write_tensors

EVERY_KIND = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}


def parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "layer.weight": torch.randn(4, 3, requires_grad=True),
        "layer.bias": torch.randn(4, requires_grad=True),
    }


def take_steps(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], steps: range
) -> None:
    for step in steps:
        for index, tensor in enumerate(tensors.values()):
            generator = torch.Generator().manual_seed(100 * step + index)
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


def through_store(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    store = Store(f"memory://optimizer-{uuid.uuid4().hex}")
    named = {(OPTIMIZER, name): tensor for name, tensor in tensors.items()}
    commit_snapshot(store, 0, [write_tensors(store, 0, "s", named)], {})
    return read_tensors(Snapshot.open(store, 0), OPTIMIZER, list(tensors))


@pytest.mark.parametrize("name", EVERY_KIND)
def test_saved_and_restored_is_never_stopped(name: str) -> None:
    kind = Optimizer(name, lr=0.01, **EVERY_KIND[name])
    whole = parameters()
    take_steps(kind.build(whole), whole, range(6))

    first = parameters()
    stopped = kind.build(first)
    take_steps(stopped, first, range(3))
    stored = through_store(slots(stopped, {id(t): n for n, t in first.items()}))
    second = {n: t.detach().clone().requires_grad_() for n, t in first.items()}
    resumed = kind.build(second)
    restore_slots(resumed, second, stored)
    take_steps(resumed, second, range(3, 6))
    assert_same_bits(second, whole)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_step_leaves_the_gradients_that_other_tasks_hold_alone(name: str) -> None:
    tensors = parameters()
    optimizer = Optimizer(name, lr=0.01, **EVERY_KIND[name]).build(tensors)
    for _ in range(3):
        gradients = {n: torch.randn(t.shape) for n, t in tensors.items()}
        before = {n: g.clone() for n, g in gradients.items()}
        for n, tensor in tensors.items():
            tensor.grad = gradients[n]
        optimizer.step()
        assert_same_bits(gradients, before)


@pytest.mark.parametrize(
    ("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("RMSprop", {})]
)
def test_a_run_that_loses_its_worker_goes_on_from_its_snapshot(
    name: str, options: dict[str, Any]
) -> None:
    kind = Optimizer(name, lr=1e-3, **options)
    example, dag = build("two_branches"), captured("two_branches")
    torch.manual_seed(4)
    batches = [[example.batch(3), example.batch(3)] for _ in range(3)]

    def finish(stop: bool) -> dict[str, torch.Tensor]:
        run = run_inline(example, 2, steps=2, dag=dag, optimizer=kind)
        run.save(2)
        if stop:
            CACHE.clear()
        for step in range(2, 5):
            run.step(step, batches[step - 2])
        return run.weights(5)

    assert_same_bits(finish(stop=True), finish(stop=False))


def test_an_unknown_optimizer_is_answered_with_those_there_are() -> None:
    with pytest.raises(OptimizerInvalid, match=r"'AdamX'.*choose one of.*Adam, AdamW.*SGD\."):
        Optimizer("AdamX", lr=1.0)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler", "__doc__"])
def test_what_a_stage_cannot_run_is_refused_and_not_offered(name: str) -> None:
    with pytest.raises(OptimizerInvalid) as caught:
        Optimizer(name)
    assert f" {name}," not in str(caught.value).partition("choose one of")[2]


def test_an_unknown_option_is_answered_with_those_there_are() -> None:
    with pytest.raises(OptimizerInvalid, match=r"AdamW .*'momentum'.*options are lr, betas"):
        Optimizer("AdamW", lr=1e-3, momentum=0.9)


def test_an_option_out_of_range_is_refused_where_it_is_written() -> None:
    with pytest.raises(OptimizerInvalid, match="Invalid learning rate: -1"):
        Optimizer("AdamW", lr=-1.0)
    with pytest.raises(OptimizerInvalid, match=r"'bias'.*momentum"):
        Optimizer("AdamW", lr=1.0).override("bias", momentum=0.5)


def test_an_override_holds_for_the_names_it_finds_and_the_first_one_wins() -> None:
    kind = Optimizer("SGD", lr=0.1, weight_decay=0.5).override(r"bias$", weight_decay=0.0)
    kind = kind.override("layer", lr=0.7)
    tensors = {**parameters(), "head.weight": torch.zeros(1, requires_grad=True)}
    groups = {
        name: group
        for group in kind.build(tensors).param_groups
        for name, tensor in tensors.items()
        if any(tensor is member for member in group["params"])
    }
    found = {name: (group["base_lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found == {
        "layer.bias": (0.1, 0.0),
        "layer.weight": (0.7, 0.5),
        "head.weight": (0.1, 0.5),
    }


def test_an_optimizer_is_a_value() -> None:
    kind = Optimizer("AdamW", lr=0.1).override("bias", lr=0.2)
    again = Optimizer(kind.name, kind.overrides, **kind.options)
    assert again == kind
    assert kind.to_json() == {
        "name": "AdamW",
        "options": {"lr": 0.1},
        "overrides": [["bias", {"lr": 0.2}]],
    }


def test_a_cosine_after_a_warm_up_has_its_closed_form() -> None:
    schedule = Schedule("cosine", warmup_steps=3, total_steps=10, final_factor=0.1)
    found = [schedule.factor(step) for step in range(12)]
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(8)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, *falling, 0.1])


def test_cosine_and_linear_are_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    ours = Schedule("cosine", total_steps=8)
    for step in range(9):
        assert ours.factor(step) == pytest.approx(cosine.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        cosine.step()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=8)
    ours = Schedule("linear", total_steps=8, final_factor=0.25)
    for step in range(12):
        assert ours.factor(step) == pytest.approx(linear.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        linear.step()


def test_a_constant_schedule_warms_up_and_stays() -> None:
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "polynomial"}, "No schedule 'polynomial'; choose 'constant'"),
        ({"warmup_steps": -1}, "at least 0; found -1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizerInvalid, match=message):
        Schedule(**options)


def test_a_falling_schedule_needs_an_end() -> None:
    with pytest.raises(OptimizerInvalid, match="'cosine' needs total_steps="):
        Schedule("cosine").factor(0)
