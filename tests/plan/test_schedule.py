"""One-forward-one-backward: the known timetable, and what holds for any placement."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagflow.plan.schedule import (
    BACKWARD,
    FORWARD,
    Action,
    Schedule,
    in_flight_limits,
    one_forward_one_backward,
)

Costs = list[tuple[float, float]]


def end(schedule: Schedule, action: Action, costs: Costs) -> float:
    return schedule.starts[action] + costs[action.stage][0 if action.kind == FORWARD else 1]


def most_in_flight(schedule: Schedule, stage: int) -> int:
    """Largest number of micro-batches between a stage's forward and its backward."""
    most = now = 0
    for action in schedule.order([stage]):
        now += 1 if action.kind == FORWARD else -1
        most = max(most, now)
    return most


def assert_valid(
    schedule: Schedule,
    placement: list[int],
    num_microbatches: int,
    limits: list[int],
    costs: Costs,
) -> None:
    num_stages = len(placement)
    stages, microbatches = range(num_stages), range(num_microbatches)
    every = {Action(s, kind, m) for s in stages for kind in "FB" for m in microbatches}
    assert set(schedule.starts) == every
    starts = schedule.starts
    for stage in stages:
        for m in microbatches:
            forward, backward = Action(stage, FORWARD, m), Action(stage, BACKWARD, m)
            assert starts[backward] >= end(schedule, forward, costs)
            if stage > 0:
                assert starts[forward] >= end(schedule, Action(stage - 1, FORWARD, m), costs)
            if stage < num_stages - 1:
                after = end(schedule, Action(stage + 1, BACKWARD, m), costs)
                assert starts[backward] >= after
        assert most_in_flight(schedule, stage) <= limits[stage]
        for kind in (FORWARD, BACKWARD):
            inside = [a.microbatch for a in schedule.order([stage]) if a.kind == kind]
            assert inside == list(microbatches)
    for worker in set(placement):
        own = schedule.order([s for s in stages if placement[s] == worker])
        for first, second in pairwise(own):
            assert starts[second] >= end(schedule, first, costs)
    assert schedule.length == max(end(schedule, action, costs) for action in every)


def test_four_stages_and_eight_microbatches_have_the_known_timetable() -> None:
    schedule = one_forward_one_backward([0, 1, 2, 3], 8, in_flight_limits(4))
    assert schedule.grid([0, 1, 2, 3]).splitlines() == [
        "worker 0: 0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7",
        "worker 1: 1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7",
        "worker 2: 2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7",
        "worker 3: 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7",
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8, 16])
def test_the_bubble_is_that_of_pipedream_flush(num_stages: int, num_microbatches: int) -> None:
    placement = list(range(num_stages))
    schedule = one_forward_one_backward(placement, num_microbatches, in_flight_limits(num_stages))
    busy = 3.0 * num_microbatches
    bubble = (num_stages - 1) / (num_microbatches + num_stages - 1)
    assert 1 - busy / schedule.length == pytest.approx(bubble)


def test_the_limits_are_reached_and_not_passed() -> None:
    schedule = one_forward_one_backward([0, 1, 2, 3], 8, in_flight_limits(4))
    assert in_flight_limits(4) == (4, 3, 2, 1)
    assert [most_in_flight(schedule, stage) for stage in range(4)] == [4, 3, 2, 1]


def test_slack_adds_to_every_stage_but_the_last() -> None:
    assert in_flight_limits(3, slack=2) == (5, 4, 1)
    limits = in_flight_limits(3, slack=2)
    schedule = one_forward_one_backward([0, 1, 2], 8, limits)
    assert all(most_in_flight(schedule, stage) <= limits[stage] for stage in range(3))


def test_two_stages_a_worker_interleave() -> None:
    placement = [0, 1, 0, 1]
    limits = in_flight_limits(4)
    schedule = one_forward_one_backward(placement, 4, limits)
    assert_valid(schedule, placement, 4, list(limits), [(1.0, 2.0)] * 4)
    first, second = schedule.grid(placement).splitlines()
    assert first.startswith("worker 0: 0F0 0F1 2F0 ")
    assert {action[0] for action in first.split()[2:]} == {"0", "2"}
    assert {action[0] for action in second.split()[2:]} == {"1", "3"}
    assert schedule.length >= 2 * 4 * 3


def test_one_worker_for_everything_has_no_bubble() -> None:
    schedule = one_forward_one_backward([0, 0, 0], 5, in_flight_limits(3))
    assert schedule.length == 3 * 5 * 3


def test_actions_print_and_sort_as_people_read_them() -> None:
    assert str(Action(2, FORWARD, 0)) == "2F0"
    schedule = one_forward_one_backward([0, 1], 2, in_flight_limits(2))
    assert [str(a) for a in schedule.order([1])] == ["1F0", "1B0", "1F1", "1B1"]
    assert [str(a) for a in schedule.order([0, 1])][:3] == ["0F0", "0F1", "1F0"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, list[int], Costs]:
    num_stages = draw(st.integers(1, 7))
    placement = [draw(st.integers(0, 3)) for _ in range(num_stages)]
    num_microbatches = draw(st.integers(1, 9))
    limits = [draw(st.integers(1, 9)) for _ in range(num_stages)]
    cost = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 4.0])
    costs = [(draw(cost), draw(cost)) for _ in range(num_stages)]
    return placement, num_microbatches, limits, costs


@given(problems())
def test_any_placement_limits_and_costs_give_a_valid_schedule(
    problem: tuple[list[int], int, list[int], Costs],
) -> None:
    placement, num_microbatches, limits, costs = problem
    schedule = one_forward_one_backward(placement, num_microbatches, limits, costs)
    assert_valid(schedule, placement, num_microbatches, limits, costs)


@given(problems())
def test_the_same_problem_has_the_same_schedule(
    problem: tuple[list[int], int, list[int], Costs],
) -> None:
    first, second = (one_forward_one_backward(*problem) for _ in range(2))
    assert first == second
