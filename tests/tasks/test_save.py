"""Snapshots hold weights that one can go back to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline
from zoo import build, captured

from dagflow_storage import Snapshot, commit_snapshot, list_snapshots
from dagflow_tasks.errors import StateLost, WeightsNotFinite
from dagflow_tasks.train import call as calling
from dagflow_tasks.train import update as updating
from dagflow_tasks.train.arguments import UpdateArguments
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import StateRef
from dagflow_tasks.train.snapshots import copy_state, save_copy
from dagflow_tasks.train.state import PARAMETER, read_tensors


def test_weights_that_are_not_finite_get_no_snapshot() -> None:
    run = run_inline(build("two_branches"), 2, 1, dag=captured("two_branches"))
    state = CACHE.states[run.refs[1].key]
    name = next(iter(state.parameters))
    with torch.no_grad():
        state.parameters[name].flatten()[0] = float("nan")
    with pytest.raises(WeightsNotFinite, match=rf"After step 1 the parameter '{name}' of stage 1"):
        run.save(1)
    assert list_snapshots(run.store) == [0]


def with_a_step_to_do() -> InlineRun:
    """Train two steps, and go back to the state before the second one's update."""
    run = run_inline(build("two_branches"), 2, 1, 1, dag=captured("two_branches"))
    run.save(1)
    example = build("two_branches")
    run.step(1, [example.batch(3)])
    CACHE.clear()
    CACHE.state(run.refs[1], 1)
    return run


def update(run: InlineRun) -> Any:
    """Run the second step's update of stage 1, as a worker does."""
    work = UpdateArguments(run.refs[1], 1, run.sums(1, 1, 0), 1.0)
    return calling.call(updating.update, (work,))


def parameters(run: InlineRun, record: Any, step: int) -> dict[str, torch.Tensor]:
    commit_snapshot(run.store, step, [record], {})
    snapshot = Snapshot.open(run.store, step)
    return read_tensors(snapshot, PARAMETER, snapshot.names(PARAMETER))


def live(run: InlineRun) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in CACHE.states[run.refs[1].key].parameters.items()}


def test_a_lost_copy_is_not_made_again_beside_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ref = with_a_step_to_do(), None
    ref = run.refs[1]
    copy_state(ref, StateRef(1))
    CACHE.begin_again(ref)  # as a rebuilding does: the copy is gone
    stepping, waits, step = threading.Event(), threading.Event(), torch.optim.AdamW.step
    lock_of = CACHE.stage_lock

    def half_done(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        stepping.set()
        assert waits.wait(30)

    def asked_for(ref: Any) -> Any:
        if stepping.is_set():
            waits.set()
        return lock_of(ref)

    def save() -> Any:
        try:
            return save_copy(ref, StateRef(1))
        finally:
            waits.set()

    monkeypatch.setattr(torch.optim.AdamW, "step", half_done)
    monkeypatch.setattr(CACHE, "stage_lock", asked_for)
    with ThreadPoolExecutor() as pool:
        updated = pool.submit(update, run)
        assert stepping.wait(30)
        with pytest.raises(StateLost, match="has done step 2"):
            save()
        assert updated.result(30).state == StateRef(2)


def test_a_copy_is_written_as_it_was_while_the_stage_goes_on() -> None:
    run = with_a_step_to_do()
    before = live(run)
    copy_state(run.refs[1], StateRef(1))
    update(run)
    record = save_copy(run.refs[1], StateRef(1))
    assert_same_bits(parameters(run, record, 7), before)
    assert CACHE.kept == {}


def test_a_save_that_nobody_waits_for_any_more_leaves_the_next_copy_alone() -> None:
    run = with_a_step_to_do()
    update(run)
    after = live(run)
    copy_state(run.refs[1], StateRef(2))
    with pytest.raises(StateLost):
        save_copy(run.refs[1], StateRef(1))
    update_of_then = CACHE.states.pop(run.refs[1].key)  # only the copy is left
    assert update_of_then.step == 2
    assert_same_bits(parameters(run, save_copy(run.refs[1], StateRef(2)), 7), after)
