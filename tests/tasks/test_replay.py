"""A stage that was lost is rebuilt alone, from its snapshot and the journal, to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline, save_now
from zoo import build, captured

from dagflow_storage import Store, commit_snapshot
from dagflow_storage.records.journal import delete_segments, trim_journal
from dagflow_tasks.errors import StateLost
from dagflow_tasks.train.cache import CACHE, COPY
from dagflow_tasks.train.call import call
from dagflow_tasks.train.exchange import lend_parameters
from dagflow_tasks.train.references import StateRef
from dagflow_tasks.train.replay import (
    StepRecord,
    drop_stage,
    needed_entries,
    progress,
    reach,
    recall,
    restore,
)
from dagflow_tasks.train.results import UpdateResult
from dagflow_tasks.train.snapshots import copy_state, save_copy
from dagflow_tasks.train.state import state_tensors
from dagflow_tasks.train.worker_journal import JOURNAL

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


def test_a_rebuild_opens_the_segments_of_its_neighbours_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained("resnet")
    wanted = state_of(run, 0)
    forget(run)
    opened: set[str] = set()
    read = Store.read_bytes

    def noted(store: Store, path: str) -> bytes:
        if path.startswith("journal/"):
            opened.add(path.split("/")[3].partition("-")[0])
        return read(store, path)

    monkeypatch.setattr(Store, "read_bytes", noted)
    restore(run.refs[0], STEPS, run.records, run.neighbours(0))
    assert_same_bits(state_of(run, 0), wanted)
    assert opened == {"1"}


def rebuild(run: InlineRun, stage: int) -> None:
    task = (run.refs[stage], STEPS, tuple(run.records), run.neighbours(stage), (1, 1))
    call(restore, task)


def load(run: InlineRun, stage: int) -> None:
    call(lend_parameters, (run.refs[stage], StateRef(0), ()))


@pytest.mark.parametrize(
    ("work", "reads"), [(rebuild, "programs/"), (rebuild, "snapshots/"), (load, "snapshots/")]
)
def test_a_store_that_is_slow_to_one_stage_holds_up_no_other(
    work: Callable[[InlineRun, int], None], reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("two_branches")
    wanted = [state_of(run, stage) for stage in range(2)]
    forget(run)
    waits, goes_on = threading.Event(), threading.Event()
    read = Store.read_bytes

    def slow(store: Store, path: str) -> bytes:
        if path.startswith(reads) and threading.current_thread().name.startswith("slow"):
            waits.set()
            assert goes_on.wait(30), "the other stage has waited for this one"
        return read(store, path)

    monkeypatch.setattr(Store, "read_bytes", slow)
    with ThreadPoolExecutor(1, "slow") as pool:
        slow_work = pool.submit(work, run, 1)
        assert waits.wait(30)
        rebuild(run, 0)
        assert progress(run.refs[0]).step == STEPS
        assert_same_bits(state_of(run, 0), wanted[0])
        goes_on.set()
        slow_work.result(30)
    rebuild(run, 1)
    assert_same_bits(state_of(run, 1), wanted[1])


def test_a_stage_that_is_elsewhere_now_takes_no_memory() -> None:
    run = trained("resnet")
    ref, wanted = run.refs[1], state_of(run, 1)
    copy_state(ref, StateRef(STEPS))
    drop_stage(ref, (1, 1))
    kept = [*CACHE.programs, *CACHE.states, *(key[0] for key in CACHE.graphs)]
    assert ref.key not in kept
    assert run.refs[0].key in kept
    assert [what for key, what in CACHE.kept if key == ref.key] == [COPY]
    # What others may still ask it for is there.
    assert isinstance(recall(ref, STEPS - 1, "update", 0), UpdateResult)
    assert save_copy(ref, StateRef(STEPS)).arrays
    # It comes back, and who runs the dropping again then drops nothing.
    restore(ref, STEPS, run.records, run.neighbours(1), (1, 2))
    drop_stage(ref, (1, 1))
    assert_same_bits(state_of(run, 1), wanted)
