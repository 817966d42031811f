"""A stage that was lost is rebuilt alone, from its snapshot and the journal, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline, save_now
from zoo import build, captured

from dagflow_storage import commit_snapshot
from dagflow_storage.journal import delete_segments, trim_journal
from dagflow_tasks.cache import CACHE
from dagflow_tasks.errors import StateLost
from dagflow_tasks.journal import JOURNAL
from dagflow_tasks.references import StateRef
from dagflow_tasks.replay import (
    StepRecord,
    needed_entries,
    progress,
    reach,
    restore,
)
from dagflow_tasks.state import state_tensors

STEPS, STAGES, MICROBATCHES = 3, 3, 2


def trained(name: str, **options: Any) -> InlineRun:
    run = run_inline(
        build(name), STAGES, STEPS, MICROBATCHES, dag=captured(name), journal=1, **options
    )
    assert JOURNAL.flush(60)
    return run


def state_of(run: InlineRun, stage: int) -> dict[str, torch.Tensor]:
    state = CACHE.states[run.refs[stage].key]
    program = CACHE.executable(run.refs[stage]).program
    return {f"{r} {n}": t.detach().clone() for (r, n), t in state_tensors(program, state).items()}


def forget(run: InlineRun) -> None:
    """Lose the process's memory."""
    CACHE.clear()
    JOURNAL.forget(run.refs[0].run_id)


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("name", ["gpt2", "resnet", "t5", "two_branches"])
def test_a_replayed_stage_has_the_same_bits(name: str, stage: int) -> None:
    run = trained(name)
    wanted = state_of(run, stage)
    forget(run)
    assert restore(run.refs[stage], STEPS, run.records, run.neighbours(stage)) == StateRef(STEPS)
    assert_same_bits(state_of(run, stage), wanted)
    # Alone: no other stage was even loaded.
    assert set(CACHE.states) == {run.refs[stage].key}


def test_clipping_is_replayed_with_the_decision_of_then() -> None:
    run = trained("gpt2", clip_norm=0.05)
    wanted = state_of(run, 1)
    forget(run)
    restore(run.refs[1], STEPS, run.records, run.neighbours(1))
    assert_same_bits(state_of(run, 1), wanted)


@pytest.mark.parametrize("begin", [0, 2])
def test_a_scaled_loss_is_replayed_with_the_scale_of_then(begin: int) -> None:
    run = trained("two_branches", precision="fp16")
    wanted = state_of(run, STAGES - 1)
    forget(run)
    if begin:  # what a resumed run has: a snapshot, and the records since
        restore(run.refs[STAGES - 1], begin, run.records[:begin], run.neighbours(STAGES - 1))
        decided = {"decision": {"loss_scale": run.records[begin - 1].decision.loss_scale}}
        commit_snapshot(run.store, begin, [save_now(run.refs[STAGES - 1], begin)], decided)
        forget(run)
    restore(run.refs[STAGES - 1], STEPS, run.records[begin:], run.neighbours(STAGES - 1))
    assert_same_bits(state_of(run, STAGES - 1), wanted)


def test_a_replay_without_a_known_scale_is_refused() -> None:
    run = trained("two_branches", precision="fp16")
    stage = STAGES - 1
    forget(run)
    restore(run.refs[stage], 2, run.records[:2], run.neighbours(stage))
    commit_snapshot(run.store, 2, [save_now(run.refs[stage], 2)], {"decision": None})
    forget(run)
    with pytest.raises(StateLost, match="Nobody knows the loss scale of step 2"):
        restore(run.refs[stage], STEPS, run.records[2:], run.neighbours(stage))


def test_a_replay_goes_on_from_what_the_worker_has() -> None:
    run = trained("two_branches")
    forget(run)
    restore(run.refs[1], 2, run.records[:2], run.neighbours(1), (1, 1))
    delete_segments(run.store, "p", 0, 0)
    for step in (0, 1):
        trim_journal(run.store, step + 1)
    with pytest.raises(StateLost, match="The journal of step 2"):
        restore(run.refs[1], STEPS, run.records, run.neighbours(1), (1, 2))
    # The first two steps weren't asked for again: their journal is gone.
    assert CACHE.states[run.refs[1].key].step == 2


def test_a_rebuilding_whose_turn_is_over_takes_nothing_back() -> None:
    run = trained("two_branches")
    ref = run.refs[1]
    restore(ref, STEPS, run.records, run.neighbours(1), (2, 5))
    restore(ref, 1, run.records[:1], run.neighbours(1), (2, 4))
    assert CACHE.states[ref.key].step == STEPS
    restore(ref, 1, run.records[:1], run.neighbours(1), (3, 1))
    assert CACHE.states[ref.key].step == 1


def test_a_task_of_an_earlier_step_is_refused() -> None:
    run = trained("two_branches")
    with pytest.raises(StateLost, match=f"has done step {STEPS} on this worker"):
        CACHE.state(run.refs[0], 1)


def test_progress_is_what_the_cache_holds() -> None:
    run = trained("two_branches")
    found = progress(run.refs[0])
    assert (found.stage, found.step, found.forwards, found.halves) == (0, STEPS, set(), set())
    forget(run)
    assert progress(run.refs[0]).step == -1


def test_a_run_can_be_taken_up_where_every_stage_has_all_it_needs() -> None:
    run = trained("gpt2")
    known = [run.neighbours(stage) for stage in range(STAGES)]
    records = {record.step: record for record in run.records}
    programs = run.cut.programs
    assert reach(run.refs[0], programs, known, 0, records) == STEPS
    assert reach(run.refs[0], programs, known, 0, {0: records[0]}) == 1
    delete_segments(run.store, "p", 1, 1)
    assert reach(run.refs[0], programs, known, 0, records) == 1
    assert needed_entries(programs[0], known[0], run.records[0].microbatches)


def test_a_record_survives_json() -> None:
    record = trained("two_branches", clip_norm=0.1).records[1]
    assert isinstance(record, StepRecord)
    assert StepRecord.from_json(record.to_json()) == record
