"""The driver: hands steps to dask one after the other, and watches them come back.

It keeps a few steps in flight and nothing else: what must survive is in the store, what must be
fast is on the workers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker

from dagflow.errors import NonFiniteLoss, WorkersLost
from dagflow.run.events import StepEvent
from dagflow.run.feed import Feed, StepBatch
from dagflow.run.graph import Key, Places, Priorities, StepGraph, StepInputs
from dagflow.run.interrupts import Interrupts
from dagflow_storage import (
    RunDirectory,
    ShardRecord,
    commit_snapshot,
    delete_old_snapshots,
)
from dagflow_tasks.optimizer import Schedule
from dagflow_tasks.results import Decision, StepReport

# The scheduler remembers every task from which one that is still wanted descends. A run's steps
# descend from each other, so the chain is cut when it has grown this long: the driver waits until
# nothing is in flight, and the next step starts from the workers' state.
_LINEAGE_TASKS = 20_000
_LINEAGE_STEPS = 64
_CHECK_WORKERS_SECONDS = 2.0
_METRICS_EVERY_STEPS = 50


@dataclass
class _Flight:
    """A step in flight, with everything that must be kept until it is done."""

    step: int
    batch: StepBatch
    futures: dict[Key, Future]
    factor: float


@dataclass
class Driver:
    """Runs the steps of one attempt at a run.

    Attributes
    ----------
    client, graph, priorities, addresses
        Where tasks go, and in which order. `addresses` are the workers by stage.
    feed : Feed
    schedule : Schedule
    run : RunDirectory
    snapshot_every : int | None
    on_step : callable
    write_extra : callable
        Writes the parts of a snapshot that no stage writes.
    decision : Decision | None
        The latest, to go on from.
    interrupts : Interrupts
        Heeded between steps.
    """

    client: Client
    graph: StepGraph
    priorities: Priorities
    addresses: Sequence[str]
    feed: Feed
    schedule: Schedule
    run: RunDirectory
    snapshot_every: int | None
    lookahead_steps: int
    keep_snapshots: int
    on_step: Callable[[StepEvent], None]
    write_extra: Callable[[int], Sequence[ShardRecord]]
    decision: Decision | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    _flights: deque[_Flight] = field(default_factory=deque)
    _last: _Flight | None = None
    _saves: dict[int, dict[Key, Future]] = field(default_factory=dict)
    _lineage: tuple[int, int] = (0, 0)
    _metrics: list[dict[str, Any]] = field(default_factory=list)
    _committed: set[int] = field(default_factory=set)
    _decisions: dict[int, Decision | None] = field(default_factory=dict)
    _reported: int = -1
    _clock: float = 0.0

    def go(self, first_step: int, last_step: int | None) -> int:
        """Run steps until `last_step`, or until the data ends, and return how many are done.

        Every step that comes back is reported; snapshots are committed when all their shards are
        written. On any way out, Ctrl-C included, the metrics so far are written.

        Raises
        ------
        NonFiniteLoss
            If a loss isn't finite; names step and stage.
        WorkersLost
            If a worker with a stage is gone.
        """
        done = first_step
        next_step = first_step
        exhausted = False
        self._clock = time.perf_counter()
        try:
            while True:
                while not exhausted and (last_step is None or next_step < last_step):
                    if len(self._flights) >= self.lookahead_steps:
                        break
                    if self._lineage_full() and self._flights:
                        break
                    batch = self.feed.prepare(next_step, self.graph)
                    if batch is None:
                        exhausted = True
                        break
                    self._submit(next_step, batch)
                    next_step += 1
                if not self._flights:
                    break
                done = self._finish_oldest()
                self._commit_finished(done)
                self.interrupts.heed()
            self.save_and_commit(done)
            self.interrupts.heed()
        finally:
            self._flush_metrics()
        return done

    def drain(self) -> int | None:
        """Let the steps in flight finish, and return how many are done; None if none was."""
        while self._flights:
            self._finish_oldest()
        self._flush_metrics()
        return None if self._last is None else self._last.step + 1

    def save_and_commit(self, step: int) -> None:
        """Make sure that a snapshot of this step exists; nothing may be in flight."""
        if step not in self._saves and step not in self._committed:
            self._submit_saves(step, after_update=False)
        self._commit_finished(step, wait_for_all=True)

    @contextlib.contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Let go on the way out of whatever is in flight: dask drops tasks that nobody wants."""
        try:
            yield
        finally:
            # By hand: dask keeps a failed task's exception, its traceback our frames, and these
            # every future of theirs.
            for flight in (*self._flights, *([self._last] if self._last else [])):
                for future in (*flight.futures.values(), *flight.batch.held):
                    future.release()
            for futures in self._saves.values():
                for future in futures.values():
                    future.release()
            self._flights.clear()
            self._saves.clear()
            self._last = None

    # Steps

    def _lineage_full(self) -> bool:
        num_tasks, num_steps = self._lineage
        return num_tasks > _LINEAGE_TASKS or num_steps >= _LINEAGE_STEPS

    def _submit(self, step: int, batch: StepBatch) -> None:
        first = not self._flights and (self._last is None or self._lineage_full())
        factor = self.schedule.factor(step)
        inputs = StepInputs(
            step,
            batch.microbatches,
            batch.argument,
            factor,
            first=first,
            saved=step in self._saves,
            decision=self.decision,
        )
        dsk = {**batch.tasks, **self.graph.step(inputs)}
        keys = [*self.graph.update_keys(step), self.graph.report_key(step)]
        if self.graph.decides:
            keys.append(self.graph.decision_key(step))
        futures = self._get(dsk, keys)
        if first:
            self._lineage = (0, 0)
        self._lineage = (self._lineage[0] + len(dsk), self._lineage[1] + 1)
        self._flights.append(_Flight(step, batch, futures, factor))
        if self.snapshot_every and (step + 1) % self.snapshot_every == 0:
            self._submit_saves(step + 1, after_update=True)

    def _get(self, dsk: dict[Key, Any], keys: list[Key]) -> dict[Key, Future]:
        with dask.annotate(workers=Places(self.addresses), priority=self.priorities):
            futures: list[Future] = self.client.get(dsk, keys, sync=False)
        return dict(zip(keys, futures, strict=True))

    def _finish_oldest(self) -> int:
        """Wait for the oldest step in flight, and return how many are done."""
        self._finish(self._flights[0])
        self._last = self._flights.popleft()
        return self._last.step + 1

    def _finish(self, flight: _Flight) -> None:
        """Wait for a step and tell everybody about it, once."""
        if flight.step <= self._reported:
            return
        report: StepReport = self._result(flight.futures[self.graph.report_key(flight.step)])
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        skipped = report.decision is not None and not report.decision.apply
        if not math.isfinite(report.loss) and not skipped:
            raise NonFiniteLoss(_not_finite(report))
        self.decision = report.decision
        self._decisions = {flight.step + 1: report.decision, **self._recent_decisions()}
        self._reported = flight.step
        event = StepEvent(
            step=flight.step + 1,
            loss=report.loss,
            seconds=seconds,
            amount=flight.batch.amount,
            unit=flight.batch.unit,
            learning_rate_factor=flight.factor,
            gradient_norm=report.decision.norm if report.decision else None,
        )
        self._metrics.append(event.to_json())
        if len(self._metrics) >= _METRICS_EVERY_STEPS:
            self._flush_metrics()
        self.on_step(event)

    def _recent_decisions(self) -> dict[int, Decision | None]:
        return {step: d for step, d in self._decisions.items() if step in self._saves}

    def _result(self, future: Future) -> Any:
        """Wait for a result, watching that the workers it needs are there."""
        while True:
            try:
                return future.result(timeout=_CHECK_WORKERS_SECONDS)
            except TimeoutError:
                if future.status == "error":  # the task's own
                    raise
                self._check_workers()
                self.interrupts.heed()
            except (CancelledError, KilledWorker) as error:
                self._check_workers()
                raise WorkersLost(f"The cluster gave up on a task: {error}.") from error

    def _check_workers(self) -> None:
        present = set(self.client.scheduler_info()["workers"])
        missing = sorted(set(self.addresses) - present)
        if missing:
            stages = [s for s, address in enumerate(self.addresses) if address in missing]
            raise WorkersLost(
                f"The worker {', '.join(missing)} left with stage {', '.join(map(str, stages))}."
            )

    def _flush_metrics(self) -> None:
        if self._metrics:
            self.run.append_metrics(self._metrics)
            self._metrics = []

    # Snapshots

    def _submit_saves(self, step: int, *, after_update: bool) -> None:
        dsk = self.graph.save(step, after_update=after_update)
        self._saves[step] = self._get(dsk, list(dsk))

    def _commit_finished(self, done: int, *, wait_for_all: bool = False) -> None:
        """Commit the snapshots whose step came back well and whose shards are all written."""
        for step in sorted(self._saves):
            futures = self._saves[step]
            if step > done or not (wait_for_all or all(f.done() for f in futures.values())):
                continue
            records = [self._result(future) for future in futures.values()]
            records += self.write_extra(step)
            self._flush_metrics()
            meta = {"decision": _decision_json(self._decisions.get(step, self.decision))}
            commit_snapshot(self.run.store, step, records, meta)
            self._committed.add(step)
            # The step after it may still be about to be submitted; its update waits for the save.
            del self._saves[step]
            delete_old_snapshots(self.run.store, keep=self.keep_snapshots)


def _decision_json(decision: Decision | None) -> Any:
    if decision is None:
        return None
    return {"loss_scale": decision.loss_scale, "good_steps": decision.good_steps}


def _not_finite(report: StepReport) -> str:
    where = "the loss itself"
    if report.non_finite:
        stage = min(report.non_finite)
        microbatches = ", ".join(map(str, report.non_finite[stage]))
        where = f"stage {stage}, micro-batch {microbatches}"
    return (
        f"The loss of step {report.step} is {report.loss}; the numbers first left the finite range in "
        f"{where}. The weights of the last snapshot are good. Lower the learning rate, clip gradients "
        "(clip_grad_norm=1.0), or look at that step's data; then train again with the same store."
    )
