"""One-forward-one-backward: the known timetable, and what holds for any placement."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagflow.plan.schedule import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Action,
    Schedule,
    halved_stages,
    in_flight_limits,
    one_forward_one_backward,
    useful_slack,
)

Costs = list[tuple[float, float]]


@dataclass(frozen=True)
class Problem:
    """What a schedule is made for."""

    placement: list[int]
    num_microbatches: int
    limits: list[int]
    halved: list[bool]
    costs: Costs

    @classmethod
    def alike(cls, placement: list[int], num_microbatches: int) -> Problem:
        """Stages of equal cost with 1F1B's limits, and halves."""
        num_stages = len(placement)
        limits, halved = in_flight_limits(num_stages), halved_stages(placement)
        costs = [(1.0, 2.0)] * num_stages
        return cls(placement, num_microbatches, list(limits), list(halved), costs)

    def schedule(self) -> Schedule:
        return one_forward_one_backward(
            self.placement, self.num_microbatches, self.limits, self.halved, self.costs
        )

    @property
    def last(self) -> int:
        return len(self.placement) - 1

    def actions(self) -> set[Action]:
        stages, microbatches = range(len(self.placement)), range(self.num_microbatches)
        every = {Action(s, FORWARD, m) for s in stages if s != self.last for m in microbatches}
        every |= {Action(s, BACKWARD, m) for s in stages for m in microbatches}
        every |= {Action(s, WEIGHTS, m) for s in stages if self.halved[s] for m in microbatches}
        return every

    def seconds(self, action: Action) -> float:
        forward, backward = self.costs[action.stage]
        if action.kind == FORWARD:
            return forward
        seconds = backward / 2 if self.halved[action.stage] else backward
        if action.kind == BACKWARD and action.stage == self.last:
            seconds += forward
        return seconds


def most_in_flight(schedule: Schedule, problem: Problem, stage: int) -> int:
    """Largest number of micro-batches that a stage remembers something of."""
    most = 0
    begun, ended = set(), set()
    for action in schedule.order([stage]):
        begun.add(action.microbatch)
        most = max(most, len(begun - ended))
        if action.kind == WEIGHTS or (action.kind == BACKWARD and not problem.halved[stage]):
            ended.add(action.microbatch)
    assert begun <= ended
    return most


def assert_valid(problem: Problem) -> None:
    schedule = problem.schedule()
    starts = schedule.starts
    assert set(starts) == problem.actions()
    ends = {action: start + problem.seconds(action) for action, start in starts.items()}
    last = problem.last
    for stage in range(len(problem.placement)):
        for m in range(problem.num_microbatches):
            forward, backward = Action(stage, FORWARD, m), Action(stage, BACKWARD, m)
            weights = Action(stage, WEIGHTS, m)
            if stage > 0:
                first = backward if stage == last else forward
                assert starts[first] >= ends[Action(stage - 1, FORWARD, m)]
            if stage < last:
                assert starts[backward] >= ends[forward]
                assert starts[backward] >= ends[Action(stage + 1, BACKWARD, m)]
            if weights in starts:
                assert starts[weights] >= ends[backward]
            if weights in starts and m + problem.limits[stage] < problem.num_microbatches:
                assert starts[weights] == ends[backward]
        assert most_in_flight(schedule, problem, stage) <= problem.limits[stage]
        for kind in (FORWARD, BACKWARD, WEIGHTS):
            inside = [a.microbatch for a in schedule.order([stage]) if a.kind == kind]
            assert inside == sorted(inside)
    for worker in set(problem.placement):
        own = [s for s, place in enumerate(problem.placement) if place == worker]
        for one, other in pairwise(schedule.order(own)):
            assert starts[other] >= ends[one]
    assert schedule.length == max(ends.values())


def test_four_stages_and_eight_microbatches_have_the_known_timetable() -> None:
    schedule = one_forward_one_backward([0, 1, 2, 3], 8, in_flight_limits(4))
    assert schedule.grid([0, 1, 2, 3]).splitlines() == [
        "worker 0: 0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7",
        "worker 1: 1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7",
        "worker 2: 2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7",
        "worker 3: 3B0 3B1 3B2 3B3 3B4 3B5 3B6 3B7",
    ]


def test_backwards_in_two_halves_fill_the_end_of_the_step() -> None:
    placement = [0, 1, 2, 3]
    problem = Problem.alike(placement, 8)
    assert problem.halved == [False, True, True, True]
    assert problem.schedule().grid(placement).splitlines() == [
        "worker 0: 0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7",
        "worker 1: 1F0 1F1 1F2 1B0 1W0 1F3 1B1 1W1 1F4 1B2 1W2 1F5 1B3 1W3 1F6 1B4 1W4 1F7 1B5 1W5 "
        "1B6 1W6 1B7 1W7",
        "worker 2: 2F0 2F1 2B0 2W0 2F2 2B1 2W1 2F3 2B2 2W2 2F4 2B3 2W3 2F5 2B4 2W4 2F6 2B5 2W5 2F7 "
        "2B6 2W6 2B7 2W7",
        "worker 3: 3B0 3W0 3B1 3W1 3B2 3W2 3B3 3W3 3B4 3W4 3B5 3W5 3B6 3W6 3B7 3W7",
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8, 16])
def test_the_bubble_is_that_of_pipedream_flush(num_stages: int, num_microbatches: int) -> None:
    placement = list(range(num_stages))
    schedule = one_forward_one_backward(placement, num_microbatches, in_flight_limits(num_stages))
    busy = 3.0 * num_microbatches
    bubble = (num_stages - 1) / (num_microbatches + num_stages - 1)
    assert 1 - busy / schedule.length == pytest.approx(bubble)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_microbatches", [8, 16])
def test_halves_take_a_third_off_the_bubble(num_stages: int, num_microbatches: int) -> None:
    schedule = Problem.alike(list(range(num_stages)), num_microbatches).schedule()
    busy = 3.0 * num_microbatches
    assert schedule.length - busy == pytest.approx(2.0 * (num_stages - 1))


def test_nothing_is_halved_where_one_worker_has_all_stages() -> None:
    assert halved_stages([0, 0, 0]) == (False, False, False)


def test_the_limits_are_reached_and_not_passed() -> None:
    problem = Problem.alike([0, 1, 2, 3], 8)
    assert problem.limits == [4, 3, 2, 1]
    schedule = problem.schedule()
    assert [most_in_flight(schedule, problem, stage) for stage in range(4)] == [4, 3, 2, 1]


def test_slack_adds_to_every_stage_but_the_last() -> None:
    assert in_flight_limits(3, slack=2) == (5, 4, 1)


def test_two_stages_a_worker_interleave() -> None:
    placement = [0, 1, 0, 1]
    schedule = one_forward_one_backward(placement, 4, in_flight_limits(4))
    first, second = schedule.grid(placement).splitlines()
    assert first.startswith("worker 0: 0F0 0F1 2F0 ")
    assert {action[0] for action in first.split()[2:]} == {"0", "2"}
    assert {action[0] for action in second.split()[2:]} == {"1", "3"}
    assert schedule.length >= 2 * 4 * 3


@pytest.mark.parametrize(("num_workers", "num_stages"), [(3, 6), (4, 8)])
@pytest.mark.parametrize("num_microbatches", [8, 32])
def test_useful_slack_leaves_workers_of_several_stages_little_to_wait_for(
    num_workers: int, num_stages: int, num_microbatches: int
) -> None:
    placement = [stage % num_workers for stage in range(num_stages)]
    costs = [(1.0, 2.0)] * num_stages
    slack = useful_slack(placement, num_microbatches, costs)

    def length(slack: int) -> float:
        limits = in_flight_limits(num_stages, slack)
        halved = halved_stages(placement)
        return one_forward_one_backward(placement, num_microbatches, limits, halved, costs).length

    assert 0 < slack < num_stages
    assert length(slack) < length(0)
    # No more than interleaved 1F1B loses (arXiv 2104.04473, section 2.2).
    work = 3 * num_microbatches * num_stages / num_workers
    assert length(slack) <= work + 3 * (num_workers - 1)


@pytest.mark.parametrize("placement", [[0], [0, 0, 0], [0, 1], [0, 1, 2, 3]])
def test_no_slack_is_useful_with_a_stage_a_worker_or_one_worker(placement: list[int]) -> None:
    assert useful_slack(placement, 8, [(1.0, 2.0)] * len(placement)) == 0


def test_two_workers_of_two_stages_need_no_slack_where_backwards_come_in_halves() -> None:
    placement, costs = [0, 1, 0, 1], [(1.0, 2.0)] * 4
    assert useful_slack(placement, 8, costs) == 0
    assert Problem.alike(placement, 8).schedule().length <= 1.03 * (3 * 8 * 4 / 2)
    whole = one_forward_one_backward(placement, 8, in_flight_limits(4))
    assert whole.length >= 1.08 * (3 * 8 * 4 / 2)


def test_one_worker_for_everything_has_no_bubble() -> None:
    schedule = one_forward_one_backward([0, 0, 0], 5, in_flight_limits(3))
    assert schedule.length == 3 * 5 * 3


def test_actions_print_and_sort_as_people_read_them() -> None:
    assert str(Action(2, FORWARD, 0)) == "2F0"
    schedule = one_forward_one_backward([0, 1], 2, in_flight_limits(2))
    assert [str(a) for a in schedule.order([1])] == ["1B0", "1B1"]
    assert [str(a) for a in schedule.order([0, 1])][:3] == ["0F0", "0F1", "1B0"]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_stages = draw(st.integers(1, 7))
    placement = [draw(st.integers(0, 3)) for _ in range(num_stages)]
    num_microbatches = draw(st.integers(1, 9))
    limits = [draw(st.integers(1, 9)) for _ in range(num_stages)]
    halved = [is_halved and draw(st.booleans()) for is_halved in halved_stages(placement)]
    cost = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 4.0])
    costs = [(draw(cost), draw(cost)) for _ in range(num_stages)]
    return Problem(placement, num_microbatches, limits, halved, costs)


@given(problems())
def test_any_placement_limits_and_costs_give_a_valid_schedule(problem: Problem) -> None:
    assert_valid(problem)


@given(problems())
def test_the_same_problem_has_the_same_schedule(problem: Problem) -> None:
    assert problem.schedule() == problem.schedule()
