"""Whatever volunteers do: the same bits, each sample once, and nothing computed again for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chaos.accounting import Execution, Hit, Place, reruns, unexplained
from chaos.driving import Recipe
from chaos.faults import (
    ENABLED,
    FAILING,
    AfterStep,
    Extent,
    Fault,
    Incident,
    InTask,
    WhileRebuilding,
    script,
)
from chaos.trial import hold_script, hold_trial, recipe_for

EXTENT = Extent()


def test_a_run_that_each_fault_happens_to_ends_with_the_same_bits(tmp_path: Path) -> None:
    trial = hold_trial(0, tmp_path, len(ENABLED))
    assert {incident.fault for incident in trial.outcome.fired} == ENABLED
    assert trial.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_everything_happens_to_ends_with_the_same_bits(
    seed: int, tmp_path: Path
) -> None:
    trial = hold_trial(seed, tmp_path)
    assert len(trial.outcome.fired) >= 25
    assert {incident.fault for incident in trial.outcome.fired} >= ENABLED
    assert trial.failures == []


def test_one_killed_worker_costs_no_other_stage_anything(tmp_path: Path) -> None:
    incident = Incident(0, Fault.KILL, AfterStep(7), stages=(1,))
    recipe = replace(recipe_for(1, tmp_path), extent=Extent(num_steps=14))
    trial = hold_script([incident], recipe, tmp_path)
    assert trial.failures == []
    assert {e.place[2] for e in trial.outcome.executions if e.place[0] == "replay"} == {1}


@pytest.mark.slow
def test_a_fault_while_rebuilding_does_not_keep_batches_from_who_rebuilds(tmp_path: Path) -> None:
    # Whoever has frozen holds the rebuilding of the others up until that is noticed.
    incidents = [
        Incident(0, Fault.KILL, AfterStep(7), (0,)),
        Incident(1, Fault.FREEZE, AfterStep(7), (3,), lasts_steps=1),
    ]
    trial = hold_script(incidents, Recipe(Extent(num_steps=14)), tmp_path)
    assert trial.failures == []
    assert trial.outcome.steps_repeated == 0


def test_garbage_does_not_come_back_out_of_the_journal(tmp_path: Path) -> None:
    # A new driver has every worker write its journal, and then the garbage's reader is replayed.
    incidents = [
        Incident(0, Fault.WRONG_SHAPE, InTask("forward", 6, 0, 1), (0,)),
        Incident(1, Fault.DRIVER_KILLED, AfterStep(8)),
        Incident(2, Fault.KILL, AfterStep(9), (1,)),
    ]
    trial = hold_script(incidents, Recipe(Extent(num_steps=14)), tmp_path)
    assert trial.failures == []


def test_batches_outlive_the_garbage_that_was_made_of_them(tmp_path: Path) -> None:
    # The first loss has the batches in flight written; the second deletes what the stage has sent.
    incidents = [
        Incident(0, Fault.KILL, AfterStep(6), (2,)),
        Incident(1, Fault.WRONG_SHAPE, InTask("forward", 7, 0, 1), (0,)),
        Incident(2, Fault.KILL, AfterStep(9), (0,)),
    ]
    trial = hold_script(incidents, Recipe(Extent(num_steps=14)), tmp_path)
    assert trial.failures == []
    assert trial.outcome.steps_repeated == 0


def test_a_script_follows_from_its_seed() -> None:
    assert script(4, EXTENT, 28) == script(4, EXTENT, 28)
    assert script(4, EXTENT, 28) != script(5, EXTENT, 28)


@pytest.mark.parametrize("seed", range(20))
def test_every_script_has_every_kind_and_several_faults_at_a_time(seed: int) -> None:
    incidents = script(seed, EXTENT, 28)
    assert {incident.fault for incident in incidents} == ENABLED
    steps = [i.moment.step for i in incidents if not isinstance(i.moment, WhileRebuilding)]
    assert len(set(steps)) < len(steps)
    assert all(0 < step < EXTENT.num_steps for step in steps)


@pytest.mark.parametrize("seed", range(20))
def test_no_script_has_a_task_fail_twice(seed: int) -> None:
    failing = [i for i in script(seed, EXTENT, 28) if i.fault in FAILING]
    places = [(i.moment.step, *i.stages) for i in failing if isinstance(i.moment, InTask)]
    assert len(set(places)) == len(places) == len(failing)


def test_dask_may_run_tasks_again_until_the_next_attempt_has_come() -> None:
    place, other = ("forward", 0, 0, 0), ("forward", 1, 0, 0)

    def done(place: Place, attempt: str, begin: float) -> Execution:
        return Execution("left alone", place, attempt, begin, begin + 0.1)

    before, again = done(place, "first", 1.0), done(place, "first", 3.0)
    late = [done(other, "second", 4.0), done(place, "first", 5.0), done(place, "second", 6.0)]
    killed = [Hit(2.0, 2.5, frozenset({"another"}))]
    assert reruns([before, again, *late], killed) == [again]
    assert reruns([before, again, *late], []) == []
    assert len(unexplained([before, *late], killed)) == 2


def test_garbage_is_computed_where_something_is_computed() -> None:
    kinds = {Fault.NOT_FINITE, Fault.WRONG_SHAPE}
    moments = [i.moment for seed in range(20) for i in script(seed, EXTENT, 4, kinds)]
    assert {m.function for m in moments if isinstance(m, InTask)} == {
        "forward",
        "forward_backward",
    }
