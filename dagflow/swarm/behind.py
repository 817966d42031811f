"""Work that a worker does beside its stages: writing snapshots while training goes on."""

from __future__ import annotations

import contextlib

from distributed import get_worker, secede

from dagflow_storage import ShardRecord
from dagflow_tasks.train import snapshots
from dagflow_tasks.train.references import StageRef, StateRef


def save_behind(state: StateRef, ref: StageRef, copied: bool) -> ShardRecord:
    """Write a stage's state, or the copy of it, to the store, outside the worker's queue of tasks."""
    with contextlib.suppress(ValueError):  # not in a worker: in a test that runs graphs by itself
        get_worker()
        secede()
    return snapshots.save_copy(ref, state) if copied else snapshots.save_state(ref, state)
