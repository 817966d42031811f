"""What a worker that no longer has a stage is told to drop: its copy in memory, what it has sent."""

from __future__ import annotations

import asyncio

from distributed import Client

from dagflow.swarm.clusters import ask_workers, in_background
from dagflow_storage import Store
from dagflow_storage.records.journal import delete_segments
from dagflow_tasks.train.references import StageRef
from dagflow_tasks.train.replay import drop_stage
from dagflow_tasks.train.worker_journal import JOURNAL

_DISOWN_SECONDS = 5.0


def drop_from_memory(client: Client, ref: StageRef, turn: tuple[int, int], address: str) -> None:
    """Have a worker drop a stage from its memory; nobody waits for that.

    `turn` is the rebuilding that this is as of, see `dagflow_tasks.train.replay.drop_stage`.
    """
    # Workers of one process have one memory.
    if client.status != "running" or address.startswith("inproc://"):
        return
    dropping = client.run(
        _drop_stage, ref, turn, workers=[address], on_error="ignore", asynchronous=True
    )
    in_background(client, dropping)


def disown(client: Client, store: Store, ref: StageRef, from_step: int, address: str) -> None:
    """Make sure that nobody who is rebuilt reads from the journal what a stage sent from a step on."""
    ask_workers(client, _disown, ref.run_id, ref.stage, from_step, addresses=[address])
    # The stage's batches, which the driver has written, go with the rest; they are sent again.
    JOURNAL.disown(ref.run_id, ref.stage, from_step, _DISOWN_SECONDS)
    delete_segments(store, ref.plan, from_step, ref.stage)


async def _disown(run_id: str, stage: int, from_step: int) -> None:
    """Have a worker's journal drop what a stage sent; runs on the worker."""
    await asyncio.to_thread(JOURNAL.disown, run_id, stage, from_step, _DISOWN_SECONDS)


async def _drop_stage(ref: StageRef, turn: tuple[int, int]) -> None:
    """Have a worker drop a stage from its memory; runs on the worker."""
    await asyncio.to_thread(drop_stage, ref, turn)
