"""What a run does about workers that come, go, stall and fail, decided without a cluster."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarm_model import HAPPENINGS, World

from dagflow.errors import NonFiniteLoss, WorkersLost
from dagflow.plan.memory import StageNeeds
from dagflow.plan.placement import Assignment
from dagflow.training.recovery import MAX_LOSSES_A_STEP, MAX_TROUBLES_A_STEP, Recovery
from dagflow.training.recovery_protocol import (
    Assign,
    Copied,
    Copy,
    Disown,
    Drained,
    End,
    Forget,
    GarbageReceived,
    Hold,
    Instruction,
    Phase,
    Progress,
    Release,
    ResultLost,
    Resume,
    Resumed,
    Roster,
    Say,
    SnapshotCommitted,
    Stall,
    StepDone,
    Stop,
    Stopped,
    Wait,
    WorkFailed,
)

FOUR_BYTES_EACH = [StageNeeds(4), StageNeeds(4)]
SEQUENCES = st.tuples(
    st.integers(1, 4),
    st.integers(0, 2**16),
    st.lists(st.integers(0, len(HAPPENINGS) - 1), max_size=60),
)


def survives(num_workers: int, seed: int, happenings: list[int]) -> None:
    world = World(num_workers, seed)
    for number in happenings:
        HAPPENINGS[number](world)
    world.settle()


@given(SEQUENCES)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_happens_in_whatever_order_every_stage_has_one_owner(
    sequence: tuple[int, int, list[int]],
) -> None:
    survives(*sequence)


@pytest.mark.slow
@given(SEQUENCES)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ten_thousand_sequences_leave_every_stage_with_one_owner(
    sequence: tuple[int, int, list[int]],
) -> None:
    survives(*sequence)


def there(*workers: str, **stalls: Stall) -> Roster:
    return Roster(dict.fromkeys(workers), stalls)


def said(instructions: list[Instruction]) -> list[str]:
    return [i.text for i in instructions if isinstance(i, Say)]


def asked(instructions: list[Instruction]) -> list[Instruction]:
    return [i for i in instructions if not isinstance(i, Say)]


def two_stages(**more: float) -> Recovery:
    return Recovery(["a", "b"], FOUR_BYTES_EACH, 0, join_address="tcp://swarm:8786", **more)


def went_on(recovery: Recovery, known: dict[int, int]) -> list[Instruction]:
    """Answer an assignment, and return what is to be rebuilt."""
    resume = recovery.handle(Progress(recovery.assignment, known), 0.0)
    recovery.handle(Resumed(recovery.assignment), 0.0)
    assert recovery.phase is Phase.RUNNING
    return resume


def test_a_stage_whose_worker_left_is_rebuilt_on_a_spare_and_the_others_stay() -> None:
    recovery = two_stages()
    (stop,) = recovery.handle(there("a", "c"), 0.0)
    assert stop == Stop("The worker b left with stage 1.")
    done = recovery.handle(Stopped(), 0.0)
    assert said(done) == ["Rebuilding stage 1 on c."]
    assert asked(done) == [Assign(1, Assignment.of(["a", "c"]), frozenset({0}), frozenset())]
    assert went_on(recovery, {0: 0}) == [Resume(1, frozenset({1}), frozenset({1}))]


def test_who_answers_but_has_lost_its_memory_is_rebuilt_where_it_is() -> None:
    recovery = two_stages()
    recovery.handle(StepDone(5), 0.0)
    recovery.handle(ResultLost("gone"), 0.0)
    (assign,) = recovery.handle(Stopped(), 0.0)
    assert assign == Assign(1, Assignment.of(["a", "b"]), frozenset({0, 1}), frozenset())
    assert went_on(recovery, {0: 6, 1: 0}) == [Resume(1, frozenset({1}), frozenset({1}))]


def test_a_loss_during_a_rebuilding_begins_it_again_with_what_was_to_be_sent() -> None:
    recovery = two_stages()
    recovery.handle(there("a", "c", "d"), 0.0)
    recovery.handle(Stopped(), 0.0)
    (resume,) = recovery.handle(Progress(1, {0: 0}), 0.0)
    assert resume == Resume(1, frozenset({1}), frozenset({1}))
    assert asked(recovery.handle(there("c", "d"), 0.0)) == [Stop("The worker a left with stage 0.")]
    assert recovery.handle(Resumed(1), 0.0) == []  # too late
    (assign,) = asked(recovery.handle(Stopped(), 0.0))
    assert assign == Assign(2, Assignment.of(["d", "c"]), frozenset({1}), frozenset())
    assert went_on(recovery, {1: -1}) == [Resume(2, frozenset({0, 1}), frozenset({0, 1}))]


def test_a_silent_worker_counts_as_gone_until_it_is_heard_of() -> None:
    recovery = two_stages()
    (stop,) = recovery.handle(there("a", "b", b=Stall(3.0, silent=True)), 0.0)
    assert stop == Stop("The worker b has fallen silent with stage 1.")
    (assign,) = asked(recovery.handle(Stopped(), 0.0))
    assert assign == Assign(1, Assignment.of(["a", "a"]), frozenset({0}), frozenset())


@pytest.mark.parametrize("first", ["copy", "worker"])
def test_of_a_slow_worker_and_its_copy_whoever_is_first_keeps_the_stage(first: str) -> None:
    recovery = two_stages()
    copying = recovery.handle(there("a", "b", "c", b=Stall(3.0, silent=False)), 0.0)
    assert said(copying) == ["Rebuilding stage 1 of b on c, too: it has stalled for 3.0 s."]
    assert asked(copying) == [Copy(1, 1, "c", 0, by_snapshot=False)]
    assert recovery.handle(there("a", "b", "c", b=Stall(4.0, silent=False)), 0.0) == []
    if first == "copy":
        (stop,) = recovery.handle(Copied(1), 0.0)
        assert stop == Stop("The worker b has stalled; its stages go elsewhere.")
        done = asked(recovery.handle(Stopped(), 0.0))
        assert done == [
            Release(1),
            Assign(1, Assignment.of(["a", "c"]), frozenset({0}), frozenset()),
        ]
        assert recovery.usable() == ["a", "c"]
        recovery.handle(there("a", "b", "c"), 0.0)
        assert recovery.usable() == ["a", "b", "c"]
    else:
        back = recovery.handle(there("a", "b", "c"), 0.0)
        assert said(back) == ["The worker b is back, with stage 1."]
        assert asked(back) == [Release(1), Forget(1, "c")]
        assert recovery.handle(Copied(1), 0.0) == []


def test_a_copy_that_fails_is_not_tried_again_there_in_the_same_step() -> None:
    recovery = two_stages()
    slow = there("a", "b", "c", b=Stall(3.0, silent=False))
    recovery.handle(slow, 0.0)
    assert recovery.handle(Copied(1, is_there=False), 0.0) == [Release(1), Forget(1, "c")]
    assert recovery.handle(slow, 0.0) == []
    recovery.handle(StepDone(1), 0.0)
    assert asked(recovery.handle(slow, 0.0)) == [Copy(2, 1, "c", 1, by_snapshot=False)]


def test_a_stage_moves_to_who_has_joined_between_two_steps() -> None:
    recovery = Recovery(["a", "a"], FOUR_BYTES_EACH, 0)
    recovery.handle(there("a", "b"), 0.0)
    moving = recovery.handle(StepDone(1), 0.0)
    assert said(moving) == [
        "Rebuilding stage 1 of a on b, too: a worker has joined, and this one has 2."
    ]
    assert asked(moving) == [Copy(1, 1, "b", 1, by_snapshot=False)]
    assert recovery.handle(Copied(1), 0.0) == [Hold()]
    done = asked(recovery.handle(Drained(), 0.0))
    assert done == [
        Release(1),
        Forget(1, "a"),
        Assign(1, Assignment.of(["a", "b"]), frozenset({0}), frozenset({1})),
    ]


def test_nobody_is_moved_to_who_has_no_room() -> None:
    recovery = Recovery(["a", "a"], FOUR_BYTES_EACH, 0)
    recovery.handle(Roster({"a": None, "small": 3}), 0.0)
    assert recovery.handle(StepDone(1), 0.0) == []
    recovery.handle(Roster({"a": None, "small": 3, "z": 4}), 0.0)
    assert asked(recovery.handle(StepDone(2), 0.0)) == [Copy(1, 1, "z", 2, by_snapshot=False)]


def test_a_lost_stage_waits_for_a_worker_with_room_and_says_so_once() -> None:
    recovery = two_stages()
    recovery.handle(Roster({"a": 7, "small": 3}), 0.0)
    waiting = recovery.handle(Stopped(), 0.0)
    assert said(waiting) == [
        "Stage 1 needs about 4 B, and the most that a worker has left is 3 B; waiting for new ones "
        "(dagflow join tcp://swarm:8786)."
    ]
    assert asked(waiting) == [Wait(0.5)]
    assert recovery.handle(Roster({"a": 7, "small": 3}), 1.0) == [Wait(0.5)]
    (assign,) = asked(recovery.handle(Roster({"a": 7, "small": 3, "c": 4}), 2.0))
    assert assign == Assign(1, Assignment.of(["a", "c"]), frozenset({0}), frozenset())


def test_who_waits_in_vain_is_told_for_what() -> None:
    recovery = two_stages(wait_seconds=10.0)
    recovery.handle(there(), 0.0)
    assert asked(recovery.handle(Stopped(), 0.0)) == [Wait(0.5)]
    (end,) = recovery.handle(there(), 10.0)
    assert isinstance(end, End)
    assert isinstance(end.error, WorkersLost)
    assert "none has joined tcp://swarm:8786 within 10 s" in str(end.error)
    assert recovery.handle(there("a", "b"), 11.0) == []


def failed(recovery: Recovery, stage: int, assignment: int | None = None) -> list[Instruction]:
    task = ("update", "0", str(stage))
    where = recovery.owners[stage]
    return recovery.handle(WorkFailed(task, stage, where, "OSError: disk", assignment), 0.0)


def test_a_task_that_fails_is_tried_elsewhere_and_ends_the_run_if_it_fails_there_too() -> None:
    recovery = two_stages()
    recovery.handle(there("a", "b", "c"), 0.0)
    (stop,) = failed(recovery, 1)
    assert stop == Stop(
        "update of stage 1 in step 0 failed on b: OSError: disk. It will be tried elsewhere."
    )
    assert failed(recovery, 1) == []  # the same failure, told twice
    (assign,) = asked(recovery.handle(Stopped(), 0.0))
    assert assign == Assign(1, Assignment.of(["a", "c"]), frozenset({0}), frozenset())
    went_on(recovery, {0: 0})
    assert failed(recovery, 1, assignment=0) == []  # told late
    assert failed(recovery, 1) == [End(None)]


def test_the_only_worker_is_forgiven_and_rebuilds_what_it_got_wrong() -> None:
    recovery = Recovery(["a", "a"], FOUR_BYTES_EACH, 0)
    failed(recovery, 1)
    (assign,) = asked(recovery.handle(Stopped(), 0.0))
    assert assign == Assign(1, Assignment.of(["a", "a"]), frozenset({0}), frozenset())
    assert went_on(recovery, {0: 0}) == [Resume(1, frozenset({1}), frozenset({1}))]


def test_garbage_is_blamed_on_where_the_stage_was_that_sent_it() -> None:
    recovery = two_stages()
    recovery.handle(there("b", "c"), 0.0)
    recovery.handle(Stopped(), 0.0)
    went_on(recovery, {1: 0})
    assert recovery.owners == ("c", "b")
    recovery.handle(there("a", "b", "c"), 0.0)
    told = recovery.handle(GarbageReceived(0, "NaN came.", has_nan=True, assignment=0), 0.0)
    assert told[0] == Disown(0, "a")
    assert recovery.excluded.keys() == {"a"}


def test_the_same_garbage_from_two_workers_is_nobodys_fault() -> None:
    recovery = two_stages()
    recovery.handle(there("a", "b", "c"), 0.0)
    recovery.handle(GarbageReceived(0, "NaN came.", has_nan=True), 0.0)
    recovery.handle(Stopped(), 0.0)
    went_on(recovery, {1: 0})
    (end,) = recovery.handle(GarbageReceived(0, "NaN came.", has_nan=True), 0.0)
    assert isinstance(end, End)
    assert isinstance(end.error, NonFiniteLoss)
    assert "computed twice, on a and c" in str(end.error)


@pytest.mark.parametrize(
    ("loses", "most"), [(True, MAX_LOSSES_A_STEP), (False, MAX_TROUBLES_A_STEP)]
)
def test_a_step_that_never_gets_done_is_given_up(loses: bool, most: int) -> None:
    recovery = two_stages()
    for turn in range(most):
        event = there("a", f"new{turn:02}") if loses else ResultLost("gone")
        recovery.handle(event, 0.0)
        recovery.handle(Stopped(), 0.0)
        went_on(recovery, dict.fromkeys(range(2), 0))
    recovery.handle(there("a", "last") if loses else ResultLost("gone"), 0.0)
    (end,) = recovery.handle(Stopped(), 0.0)
    assert isinstance(end, End)
    assert f"Step 0 was taken up again {most} times" in str(end.error)


def test_without_a_journal_a_loss_ends_the_attempt_and_nothing_moves() -> None:
    recovery = Recovery(["a", "a"], FOUR_BYTES_EACH, 0, has_journal=False)
    recovery.handle(there("a", "b"), 0.0)
    assert recovery.handle(StepDone(1), 0.0) == []
    assert recovery.handle(SnapshotCommitted(1), 0.0) == []
    recovery.handle(there("b"), 0.0)
    (end,) = recovery.handle(Stopped(), 0.0)
    assert isinstance(end, End)
    assert "no journal" in str(end.error)


def test_spares_keep_what_is_at_risk_one_each_and_take_it_over() -> None:
    recovery = two_stages()
    recovery.handle(there("a", "b", "c", "d"), 0.0)
    kept = recovery.handle(SnapshotCommitted(10), 0.0)
    assert kept == [Copy(1, 0, "c", 10, by_snapshot=True), Copy(2, 1, "d", 10, by_snapshot=True)]
    recovery.handle(Copied(2), 0.0)
    # What is still on its way is let arrive; what is there is renewed.
    again = recovery.handle(SnapshotCommitted(20), 0.0)
    assert again == [Release(2), Copy(3, 1, "d", 20, by_snapshot=True)]
    recovery.handle(Copied(1), 0.0)
    recovery.handle(Copied(3), 0.0)
    recovery.handle(there("a", "c", "d"), 0.0)
    done = asked(recovery.handle(Stopped(), 0.0))
    assert done[-1] == Assign(1, Assignment.of(["a", "d"]), frozenset({0}), frozenset())


def test_a_worker_may_recover_while_its_copy_is_about_to_be_taken() -> None:
    recovery = two_stages()
    recovery.handle(there("a", "b", "c", b=Stall(3.0, silent=False)), 0.0)
    recovery.handle(Copied(1), 0.0)
    recovery.handle(there("a", "b", "c"), 0.0)  # before it has stopped
    (assign,) = [i for i in recovery.handle(Stopped(), 0.0) if isinstance(i, Assign)]
    assert assign.owners.workers in (("a", "b"), ("a", "c"))


def test_an_answer_to_an_earlier_question_says_nothing_of_the_new_owners() -> None:
    recovery = two_stages()
    recovery.handle(ResultLost("gone"), 0.0)
    recovery.handle(Stopped(), 0.0)
    recovery.handle(there("a", "c"), 0.0)
    recovery.handle(Stopped(), 0.0)
    assert recovery.handle(Progress(1, {0: 0, 1: 0}), 0.0) == []
    assert recovery.handle(Resumed(1), 0.0) == []
    assert went_on(recovery, {0: 0}) == [Resume(2, frozenset({1}), frozenset({1}))]


def test_two_slow_workers_are_not_both_copied_to_one_spare() -> None:
    recovery = two_stages()
    slow = {"a": Stall(3.0, silent=False), "b": Stall(3.0, silent=False)}
    copying = recovery.handle(there("a", "b", "c", **slow), 0.0)
    assert asked(copying) == [Copy(1, 0, "c", 0, by_snapshot=False)]
    more = recovery.handle(there("a", "b", "c", "d", **slow), 0.0)
    assert asked(more) == [Copy(2, 1, "d", 0, by_snapshot=False)]
