"""Who takes part: one more worker, however small, leaves the plan as good or better."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import mse_loss

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.capture import capture
from dagflow.plan.memory import bytes_by_worker
from dagflow.plan.partition import Partition, num_parts
from dagflow.plan.search import cut_and_place, step_seconds
from dagflow.plan.training_memory import TrainingMemory

TRAINING = TrainingMemory()
# Cuts may be so much slower than the best, for fewer bytes across.
SLACK = 1.03
PLENTY = 1 << 40


@cache
def layers(num_layers: int = 12) -> DagAnalysis:
    """Layers of which each can be a stage."""
    parts = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(num_layers)]
    batch = (torch.randn(64, 32), torch.randn(64, 32))
    return DagAnalysis(capture(nn.Sequential(*parts), batch, loss=mse_loss))


@cache
def whole_bytes() -> int:
    """What one worker needs that has everything."""
    (cut, _) = cut_and_place(layers(), [PLENTY], TRAINING)
    return cut.estimates[0].memory_bytes


def assert_fits(cut: Partition, placement: Sequence[int], memory: Sequence[int]) -> None:
    needed = bytes_by_worker([e.needs for e in cut.estimates], placement)
    assert {worker: n for worker, n in needed.items() if n > memory[worker]} == {}


def seconds(memory: Sequence[int]) -> float:
    """How long a step takes with these workers; infinite if they can't."""
    try:
        cut, placement = cut_and_place(layers(), memory, TRAINING)
    except StageTooLarge:
        return float("inf")
    assert_fits(cut, placement, memory)
    assert len(set(placement)) == len(cut)
    return step_seconds(cut, placement, TRAINING.num_microbatches)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 7, 8, 12, 20, 40])
def test_any_number_of_workers_is_taken_and_the_rest_are_spares(num_workers: int) -> None:
    cut, placement = cut_and_place(layers(), [PLENTY] * num_workers, TRAINING)
    assert len(cut) <= min(num_workers, num_parts(layers()))
    assert list(placement) == list(range(len(cut)))
    if num_workers <= 4:
        assert len(cut) == num_workers


shares = st.sampled_from([0.001, 0.02, 0.1, 0.2, 0.35, 0.6, 1.0, 4.0])


@settings(max_examples=15, deadline=None)
@given(st.lists(shares, min_size=1, max_size=40), shares)
def test_one_more_worker_never_makes_a_step_longer(known: list[float], joins: float) -> None:
    before = [round(share * whole_bytes()) for share in known]
    after = [*before, round(joins * whole_bytes())]
    assert seconds(after) <= SLACK * seconds(before)


def test_a_tiny_worker_beside_a_large_one_takes_no_part() -> None:
    cut, placement = cut_and_place(layers(), [1000, 2 * whole_bytes()], TRAINING)
    assert len(cut) == 1
    assert placement == (1,)


def test_a_smaller_worker_takes_less() -> None:
    memory = [whole_bytes() // 3, whole_bytes(), whole_bytes()]
    cut, placement = cut_and_place(layers(), memory, TRAINING, num_stages=3)
    assert placement == (1, 2, 0)
    assert_fits(cut, placement, memory)


def test_several_stages_of_one_worker_share_its_memory() -> None:
    free, placement = cut_and_place(layers(), [PLENTY] * 2, TRAINING, num_stages=4)
    assert placement == (0, 1, 0, 1)
    stages = [e.memory_bytes for e in free.estimates]
    needed = bytes_by_worker([e.needs for e in free.estimates], placement)
    enough_for_each_stage = max(stages)
    assert enough_for_each_stage < min(needed.values())
    with pytest.raises(StageTooLarge, match=r"need about .* together; their worker has"):
        cut_and_place(layers(), [enough_for_each_stage] * 2, TRAINING, num_stages=4)
    memory = [round(0.98 * needed[0]), PLENTY]
    cut, placement = cut_and_place(layers(), memory, TRAINING, num_stages=4)
    assert placement == (1, 0, 1, 0)
    assert_fits(cut, placement, memory)


def test_what_fits_nobody_is_refused_with_the_numbers() -> None:
    with pytest.raises(StageTooLarge, match=r"Stage \d of 2 needs about .* its worker has 1 kB"):
        cut_and_place(layers(), [1000, 1000], TRAINING)


def test_more_stages_than_parts_are_refused_only_where_somebody_wants_them() -> None:
    with pytest.raises(PlanInvalid, match="can't be cut into 1000 stages"):
        cut_and_place(layers(), [PLENTY] * 2, TRAINING, num_stages=1000)


def test_given_cuts_are_kept() -> None:
    wanted, _ = cut_and_place(layers(), [PLENTY] * 3, TRAINING, num_stages=3)
    cut, placement = cut_and_place(layers(), [PLENTY] * 2, TRAINING, cuts=wanted.cuts)
    assert cut.cuts == wanted.cuts
    assert placement == (0, 1, 0)
