"""What all stages do with a step's gradients: clip as torch does, skip what overflowed."""

from __future__ import annotations

import pytest
import torch

from dagflow_tasks.train.results import INITIAL_LOSS_SCALE, Decision
from dagflow_tasks.train.update import decide

GRADIENTS = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
NORMS = [{"b": torch.tensor(12.0)}, {"a": torch.tensor(5.0)}]
ORDER = ["a", "b"]


def test_clipping_is_torchs() -> None:
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in GRADIENTS.values()]
    for parameter, gradient in zip(parameters, GRADIENTS.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    found = decide(NORMS, ORDER, 1.0, Decision(), scaled=False)
    assert found.norm == norm == 13.0
    assert parameters[0].grad is not None
    assert torch.equal(GRADIENTS["a"] * found.coefficient, parameters[0].grad)


def test_small_gradients_are_not_scaled_up() -> None:
    assert decide(NORMS, ORDER, 100.0, Decision(), scaled=False).coefficient == 1.0


def test_the_norm_does_not_depend_on_how_parameters_are_shared_out() -> None:
    torch.manual_seed(0)
    norms = {str(i): torch.rand(()) * 10 ** (i % 5) for i in range(50)}
    order = list(norms)
    whole = decide([norms], order, None, Decision(), scaled=False)
    halves = [{n: norms[n] for n in reversed(order[25:])}, {n: norms[n] for n in order[:25]}]
    assert decide(halves, order, None, Decision(), scaled=False) == whole


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scaled_step_that_overflows_is_skipped_and_halves_the_scale(bad: float) -> None:
    before = Decision(loss_scale=INITIAL_LOSS_SCALE, good_steps=7)
    norms = [{"a": torch.tensor(bad), "b": torch.tensor(1.0)}]
    found = decide(norms, ORDER, None, before, scaled=True)
    assert not found.apply
    assert found.loss_scale == INITIAL_LOSS_SCALE / 2
    assert found.good_steps == 0


def test_a_scaled_step_is_unscaled_before_it_is_clipped() -> None:
    before = Decision(loss_scale=4.0)
    found = decide(NORMS, ORDER, 1.0, before, scaled=True)
    assert found.norm == 13.0 / 4
    assert found.coefficient == pytest.approx(1 / 13.0, rel=1e-6)
    assert found.loss_scale == 4.0


def test_the_scale_doubles_after_two_thousand_good_steps() -> None:
    decision = Decision(loss_scale=4.0)
    scales = []
    for _ in range(2001):
        decision = decide(NORMS, ORDER, None, decision, scaled=True)
        scales.append(decision.loss_scale)
    assert scales[1998] == 4.0
    assert scales[1999] == scales[2000] == 8.0
    assert decision.good_steps == 1


def test_without_loss_scaling_an_overflow_is_not_hidden() -> None:
    norms = [{"a": torch.tensor(float("inf"))}]
    found = decide(norms, ["a"], None, Decision(), scaled=False)
    assert found.apply
    assert found.norm == float("inf")
