"""Snapshots of a run that goes on: written by the stages' owners, committed by the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Future

from dagflow.errors import TransientError, WorkersLost
from dagflow.swarm.events import EventStream, SnapshotCommitted
from dagflow.swarm.interrupts import TICK_SECONDS, Interrupts
from dagflow.swarm.membership import Membership
from dagflow.training.dask_tasks import Key
from dagflow.training.dispatch import Dispatch, release
from dagflow.training.ledger import Ledger
from dagflow_storage import (
    Lease,
    LeaseUnconfirmed,
    NotFound,
    RunDirectory,
    ShardRecord,
    StoreNotWritable,
    commit_snapshot,
)
from dagflow_tasks.train.results import Decision

_WAY_OUT_SECONDS = 10.0


@dataclass
class Saving:
    """The snapshots under way.

    A snapshot is committed once its step has come back, the ledger has it, and all its shards are
    written; by then some steps more may have been handed out.

    Attributes
    ----------
    dispatch, run, ledger, membership, lease, interrupts, events
        As in `Driver`.
    wait_seconds : float
        For how long to wait for the ledger at the run's end.
    write_extra : callable
        Writes the parts of a snapshot that no stage writes.
    committed : callable
        Called with the step of a snapshot that was just committed, and those of others under way.
    is_due : bool
        Whether a snapshot was given up, so that the next step makes another.
    """

    dispatch: Dispatch
    run: RunDirectory
    ledger: Ledger
    membership: Membership
    lease: Lease
    interrupts: Interrupts
    events: EventStream
    wait_seconds: float
    write_extra: Callable[[int], Sequence[ShardRecord]]
    committed: Callable[[int, Collection[int]], None]
    is_due: bool = False
    _saves: dict[int, dict[Key, Future]] = field(default_factory=dict)
    _begun: dict[int, float] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _facts: dict[int, tuple[float, Decision | None]] = field(default_factory=dict)

    def begin(self, step: int, ready: Mapping[int, Future], *, after_update: bool = True) -> None:
        """Have the state after `step` steps written; see `StepGraph.save`.

        Parameters
        ----------
        ready
            By stage what brings its weights to where the run begins.
        """
        self.is_due = False
        before = [key for futures in self._saves.values() for key in futures if _is_save(key)]
        keys = {stage: future.key for stage, future in ready.items()}
        dsk = self.dispatch.graph.save(step, after_update=after_update, before=before, ready=keys)
        self._saves[step], self._begun[step] = self.dispatch.submit(dsk), time.monotonic()

    def is_copied_first(self, step: int) -> bool:
        """Tell whether a step's update must wait until the state before it has been copied."""
        return self.dispatch.graph.key("copy", step, 0) in self._saves.get(step, ())

    def step_done(self, num_steps: int, loss: float, decision: Decision | None) -> None:
        """Take in what a snapshot after so many steps says of its run."""
        recent = {step: facts for step, facts in self._facts.items() if step in self._saves}
        self._facts = {num_steps: (loss, decision), **recent}

    def finish(
        self, num_steps: int, ready: Mapping[int, Future], decision: Decision | None
    ) -> None:
        """Make sure that there is a snapshot after so many steps; nothing may be in flight."""
        if num_steps not in self._saves and num_steps not in self._done:
            self.begin(num_steps, ready, after_update=False)
        self.commit_written(num_steps, decision, wait_for_all=True)

    def commit_written(
        self, num_steps: int, decision: Decision | None, *, wait_for_all: bool = False
    ) -> None:
        """Commit the snapshots whose step came back well and whose shards are all written."""
        for step in sorted(self._saves):
            futures = self._saves[step]
            if step > num_steps or not (wait_for_all or all(f.done() for f in futures.values())):
                continue
            if wait_for_all and not self.interrupts.until(self.ledger.flush, self.wait_seconds):
                raise WorkersLost(f"The ledger can't be written: {self.ledger.trouble}")
            if not self.ledger.has_written(step):
                continue  # the next step will do
            records = self._records(step, must_be=wait_for_all)
            if records is not None:
                self._commit(step, records, decision, must_be=wait_for_all)

    def _commit(
        self, step: int, records: list[ShardRecord], decision: Decision | None, *, must_be: bool
    ) -> None:
        records += self.write_extra(step)
        loss, decision = self._facts.get(step, (None, decision))
        ref = self.dispatch.graph.refs[0]
        meta = {
            "decision": _decision_json(decision),
            "loss": loss,
            "run_id": ref.run_id,
            "plan": ref.plan,
        }
        self._confirm_lease()
        # The step after it may still be about to be submitted; its update waits for the save.
        release(self._saves.pop(step).values())
        try:
            commit_snapshot(self.run.store, step, records, meta)
        except (NotFound, StoreNotWritable) as error:
            if must_be:
                raise
            self.events.note(f"No snapshot of step {step}: {error}")  # the next one will do
            return
        self._done.add(step)
        parts = [part for record in records for part in record.flattened()]
        num_bytes = sum(found.size_bytes for part in parts for found in part.objects)
        seconds = time.monotonic() - self._begun[step]
        self.events.tell(SnapshotCommitted(step, seconds, num_bytes))
        self.committed(step, self._saves.keys())

    def _records(self, step: int, *, must_be: bool) -> list[ShardRecord] | None:
        """Return what was written of a snapshot; None if that failed and the next one will do."""
        futures = [future for key, future in self._saves[step].items() if _is_save(key)]
        failed = [f.exception() for f in futures if f.status == "error"]
        passing = (TransientError, StoreNotWritable)
        if must_be or not failed or not all(isinstance(error, passing) for error in failed):
            return [self.dispatch.result(future) for future in futures]
        self.events.note(f"No snapshot of step {step}: {failed[0]}")
        release(self._saves.pop(step).values())
        return None

    def drop_uncopied(self) -> None:
        """Give up the snapshots of steps that won't come back as they were handed out.

        What has been copied from the stages is written, whatever becomes of the steps.
        """
        self._drop(lambda key: not _is_save(key))

    def drop_unwritten(self) -> None:
        """Give up the snapshots that won't be finished, because a stage's copy went with its owner."""
        self._drop(lambda key: True)

    def _drop(self, must_be_done: Callable[[Key], bool]) -> None:
        for step, futures in list(self._saves.items()):
            if any(must_be_done(k) and f.status != "finished" for k, f in futures.items()):
                release(self._saves.pop(step).values())
                self.is_due = True

    def commit_on_the_way_out(self, num_steps: int, decision: Decision | None) -> None:
        """Commit the snapshots that are about to be written: what ended the run isn't in them."""
        deadline = time.monotonic() + _WAY_OUT_SECONDS
        for step in [step for step in self._saves if step <= num_steps]:
            futures = self._saves[step].values()
            while not all(f.done() for f in futures) and time.monotonic() < deadline:
                self.membership.wait(TICK_SECONDS / 10)
        if self._saves:
            self.ledger.flush(_WAY_OUT_SECONDS)
            self.commit_written(num_steps, decision)

    def drop_all(self) -> None:
        for futures in self._saves.values():
            release(futures.values())
        self._saves.clear()

    def _confirm_lease(self) -> None:
        """Return once it is certain that no other driver has taken over.

        Raises
        ------
        LeaseLost
        """
        while True:
            try:
                self.lease.verify()
                return
            except LeaseUnconfirmed as error:
                self.events.note(str(error))
                self.membership.wait(TICK_SECONDS)
                self.interrupts.heed()


def _is_save(key: Key) -> bool:
    return str(key[0]).startswith("save")


def _decision_json(decision: Decision | None) -> Any:
    if decision is None:
        return None
    skipped = {"skipped": decision.skipped} if decision.skipped else {}
    return {"loss_scale": decision.loss_scale, "good_steps": decision.good_steps, **skipped}
