"""The driver: hands steps to dask one after the other, watches them come back, and takes them up
again when a machine is lost.

It keeps a few steps in flight and nothing else: what must survive is in the store, what must be
fast is on the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, NoReturn

import dask
from distributed import Client, Future, KilledWorker

from dagflow.errors import (
    GarbageReceived,
    NonFiniteLoss,
    SchedulerLost,
    TaskFailed,
    TransientError,
    WorkersLost,
)
from dagflow.run.clusters import ask_workers, scheduler_info
from dagflow.run.dask_internals import cause_of
from dagflow.run.events import StepEvent
from dagflow.run.feed import Feed, StepBatch
from dagflow.run.graph import (
    Key,
    Places,
    Priorities,
    Standing,
    StepGraph,
    StepInputs,
    attempt_of,
)
from dagflow.run.interrupts import Interrupts
from dagflow.run.ledger import Ledger
from dagflow.run.membership import STALLED, Membership, NoRoom, ResultGone, place_again
from dagflow.run.watch import kind_of
from dagflow_storage import (
    Lease,
    LeaseUnconfirmed,
    NotFound,
    RunDirectory,
    ShardRecord,
    StoreNotWritable,
    commit_snapshot,
)
from dagflow_storage.journal import delete_segments
from dagflow_tasks.journal import JOURNAL
from dagflow_tasks.optimizer import Schedule
from dagflow_tasks.replay import StageProgress, StepRecord
from dagflow_tasks.results import Decision, JournalStats, StepReport
from dagflow_tasks.tasks import learning_rate_factor

# The scheduler remembers every task from which one that is still wanted descends. A run's steps
# descend from each other, so the chain is cut when it has grown this long: the driver waits until
# nothing is in flight, and the next step starts from the workers' state.
_LINEAGE_TASKS = 20_000
_LINEAGE_STEPS = 64
# Interrupts are heeded and the roster is looked at this often; news wakes the driver at once.
_TICK_SECONDS = 0.5
_DISOWN_SECONDS = 5.0
_WAY_OUT_SECONDS = 10.0
# Spares may fill this share of their memory with weights; of this much if they don't say.
_SPARE_SHARE, _ROOM_BYTES = 0.5, 8 << 30
# A step that so many workers in turn have not survived, or that was taken up again so often without
# a worker being lost, isn't unlucky.
_MAX_LOSSES_A_STEP = 12
_MAX_TROUBLES_A_STEP = 5


_WHAT_TO_DO = (
    "The weights of the last snapshot are good. Lower the learning rate, clip gradients "
    "(clip_grad_norm=1.0), or look at that step's data; then train again with the same store."
)


# What dask says of every future of a client whose scheduler is gone.
_CONNECTION_LOST = "scheduler-connection-lost"


class Disturbed(Exception):
    """Something was lost that the steps in flight need; they can be taken up again."""


@dataclass
class _Move:
    """A stage that is being rebuilt on another worker while its own still has it.

    Attributes
    ----------
    address : str
        Where to.
    future : Future
        Done when it is rebuilt there.
    because : str
        Why, for people.
    stalled : str or None
        The worker that has stalled with it: if it comes back first, the move is off.
    """

    address: str
    future: Future
    because: str
    stalled: str | None = None


@dataclass
class _Flight:
    """A step in flight, with everything that must be kept until it is done."""

    step: int
    batch: StepBatch
    futures: dict[Key, Future]


@dataclass
class Driver:
    """Runs the steps of one attempt at a run.

    Attributes
    ----------
    client, graph, priorities, addresses
        Where tasks go, and in which order. `addresses` are the workers by stage; they change when
        workers are lost.
    feed : Feed
    schedule : Schedule
    run : RunDirectory
    ledger : Ledger
    membership : Membership
    lease : Lease
        The right to write to the run's store.
    snapshot_every : int | None
    on_step : callable
    note : callable
        Tells people what happens.
    write_extra : callable
        Writes the parts of a snapshot that no stage writes.
    after_commit : callable
        Called with the step of a snapshot that was just committed, and of those under way.
    stage_bytes : sequence of int
        Memory that each stage takes.
    memory : mapping
        Memory in bytes of the workers that were there when the run was planned, by address.
    turns : iterator of int
        Counts the rebuildings of all attempts at the run.
    wait_seconds : float
        How long to wait for a worker when all are gone.
    decision : Decision | None
        The latest, to go on from.
    interrupts : Interrupts
        Heeded between steps.
    """

    client: Client
    graph: StepGraph
    priorities: Priorities
    addresses: list[str]
    feed: Feed
    schedule: Schedule
    run: RunDirectory
    ledger: Ledger
    membership: Membership
    lease: Lease
    snapshot_every: int | None
    lookahead_steps: int
    on_step: Callable[[StepEvent], None]
    note: Callable[[str], None]
    write_extra: Callable[[int], Sequence[ShardRecord]]
    after_commit: Callable[[int, Collection[int]], None]
    wait_seconds: float
    stage_bytes: Sequence[int]
    memory: Mapping[str, int]
    turns: Iterator[int]
    decision: Decision | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    _flights: deque[_Flight] = field(default_factory=deque)
    _saves: dict[int, dict[Key, Future]] = field(default_factory=dict)
    _ready: dict[int, Future] = field(default_factory=dict)
    _restored: list[Future] = field(default_factory=list)
    _wrong: set[int] = field(default_factory=set)
    _unsent: set[int] = field(default_factory=set)  # stages whose batches went with their worker
    _standing: Standing | None = None
    _lineage: tuple[int, int] = (0, 0)
    _journals: dict[str, JournalStats] = field(default_factory=dict)
    _trouble: str = ""
    _committed: set[int] = field(default_factory=set)
    _snapshot_due: bool = False
    _reports: dict[int, StepReport] = field(default_factory=dict)
    _done: int = 0
    _next: int = 0
    _exhausted: bool = False
    _clock: float = 0.0
    _moves: dict[int, _Move] = field(default_factory=dict)
    _warming: dict[tuple[int, str], Future] = field(default_factory=dict)
    _lost_stages: Counter[int] = field(default_factory=Counter)
    _failed: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    _handed_out: dict[str, list[str]] = field(default_factory=dict)  # where stages were, by attempt
    _limits: dict[str, int] = field(default_factory=dict)
    _asked_of: Collection[str] = ()
    _losses: Counter[int] = field(default_factory=Counter)
    _troubles: Counter[int] = field(default_factory=Counter)

    def go(self, first_step: int, last_step: int | None) -> int:
        """Run steps until `last_step`, or until the data ends, and return how many are done.

        Every step that comes back is reported once; snapshots are committed when all their shards
        are written. When a worker is lost, its stages are rebuilt on others, and the steps in flight
        go on.

        Raises
        ------
        NonFiniteLoss
            If a loss isn't finite; names step and stage.
        TransientError
            If a lost stage can't be rebuilt from the journal; all must go back to an earlier step.
        """
        self._done = self._next = first_step
        self.feed.look_around = self._look_around
        self._clock = time.perf_counter()
        self._restore(dict.fromkeys(range(len(self.addresses)), first_step))
        while True:
            try:
                if self._advance(last_step):
                    return self._done
            except Disturbed as disturbance:
                self._take_up_again(disturbance)

    def drain(self) -> int:
        """Let the steps in flight finish, and return how many are done."""
        while self._flights:
            self._finish_oldest()
        return self._done

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
            with contextlib.suppress(Exception):
                self._commit_on_the_way_out()
            for flight in self._flights:
                _release(flight.batch.held.values())
            self._let_go()
            self._drop_saves()
            _release(self._warming.values())
            _release(move.future for move in self._moves.values())
            self._warming.clear()
            self._moves.clear()
            self._flights.clear()

    # Steps

    def _advance(self, last_step: int | None) -> bool:
        """Submit what may be, finish a step, and tell whether the run is done."""
        if not self._flights and self._arrived():
            self._rebuild(self._arrived())
        while not self._exhausted and (last_step is None or self._next < last_step):
            if len(self._flights) >= self.lookahead_steps or self._arrived():
                break
            if self._lineage_full() and self._flights:
                break
            if not self._submit_next():
                break
        if self._flights:
            self._finish_oldest()
            self._commit_finished(self._done)
            self._spread_out()
            self.interrupts.heed()
            return False
        self.save_and_commit(self._done)
        self.interrupts.heed()
        return True

    def _submit_next(self) -> bool:
        try:
            batch = self.feed.prepare(self._next, self.graph)
        except WorkersLost as error:
            raise Disturbed(str(error)) from error
        if batch is None:
            self._exhausted = True
            return False
        step, self._next = self._next, self._next + 1
        first = not self._flights and (self._standing is None or self._lineage_full())
        self._flights.append(_Flight(step, batch, {}))
        if not any(microbatch.weight for microbatch in batch.microbatches):
            self.note(f"Nothing in the batch of step {step} counts: all its targets are ignored.")
        self._submit(self._flights[-1], first=first or step == self._done)
        due = self.snapshot_every and (step + 1) % self.snapshot_every == 0
        if self.snapshot_every and (due or self._snapshot_due):
            self._snapshot_due = False
            self._submit_saves(step + 1, after_update=True)
        return True

    def _lineage_full(self) -> bool:
        num_tasks, num_steps = self._lineage
        return num_tasks > _LINEAGE_TASKS or num_steps >= _LINEAGE_STEPS

    def _submit(self, flight: _Flight, *, first: bool) -> None:
        """Hand a step to dask: the tasks of it that aren't done yet."""
        step, batch = flight.step, flight.batch
        if self._standing is not None and step > max(
            self._standing.step(s) for s in range(len(self.addresses))
        ):
            self._standing = None  # nothing of this step or a later one is done
        inputs = StepInputs(
            step,
            batch.microbatches,
            batch.argument,
            self.schedule if self.graph.scaled else self.schedule.factor(step),
            first=first,
            saved=self.graph.key("copy", step, 0) in self._saves.get(step, ()),
            decision=self.decision,
            ready={s: f.key for s, f in self._ready.items()} if first else {},
            standing=self._standing,
        )
        dsk = {**batch.tasks, **self.graph.step(inputs)}
        keys = [key for key in self.graph.update_keys(step) if key in dsk]
        keys.append(self.graph.report_key(step))
        if self.graph.decides:
            keys.append(self.graph.decision_key(step))
        flight.futures = self._get(dsk, keys)
        if first:
            self._lineage = (0, 0)
            self._restored.clear()  # nothing descends from them any more
        self._lineage = (self._lineage[0] + len(dsk), self._lineage[1] + 1)

    def _get(
        self,
        dsk: Mapping[Key, Any],
        keys: Sequence[Key] | None = None,
        addresses: Sequence[str] | None = None,
    ) -> dict[Key, Future]:
        """Hand tasks to dask, and return the futures of some, or of all, by key."""
        wanted = list(dsk if keys is None else keys)
        if not wanted:
            return {}
        if addresses is None:
            self._handed_out[self.graph.prefix] = addresses = list(self.addresses)
        places = Places(addresses)
        with dask.annotate(workers=places, priority=self.priorities):
            futures: list[Future] = self.client.get(dsk, wanted, sync=False)
        return dict(zip(wanted, futures, strict=True))

    def _finish_oldest(self) -> None:
        """Wait for the oldest step in flight, and tell everybody about it."""
        flight = self._flights[0]
        with contextlib.suppress(LeaseUnconfirmed):
            self.lease.check()
        report: StepReport = self._result(flight.futures[self.graph.report_key(flight.step)])
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        skipped = report.decision is not None and not report.decision.apply
        if not math.isfinite(report.loss) and not skipped:
            raise NonFiniteLoss(_not_finite(report))
        self.decision = report.decision
        # From here on the step is done, whatever happens to its workers.
        self._flights.popleft()
        self._done = flight.step + 1
        # Kept: when a worker leaves, dask runs again what led to its results and isn't kept, on the
        # workers that are left, and restoring would take these back to where they once began.
        self._restored.extend(self._ready.values())
        self._ready.clear()
        self._reports = {flight.step + 1: report, **self._recent_reports()}
        batch = flight.batch
        factor = learning_rate_factor(self.schedule, flight.step, report.decision)
        for ref in self.graph.refs:
            JOURNAL.end_step(ref, flight.step)  # of what the driver itself has put there
        record = StepRecord(flight.step, batch.microbatches, factor, report.decision, batch.samples)
        journal_bytes, journal_seconds = self._journal_since(report)
        event = StepEvent(
            step=flight.step + 1,
            loss=report.loss,
            seconds=seconds,
            amount=flight.batch.amount,
            unit=flight.batch.unit,
            learning_rate_factor=factor,
            gradient_norm=report.decision.norm if report.decision else None,
            journal_bytes=journal_bytes,
            journal_share=min(1.0, journal_seconds / seconds) if seconds else 0.0,
        )
        self.ledger.add(record, event.to_json())
        self.on_step(event)

    def _journal_since(self, report: StepReport) -> tuple[int, float]:
        """Return what all journals have written since the last report, and the busiest's seconds."""
        num_bytes, seconds = 0, 0.0
        for stats in {s.process: s for s in report.journal.values()}.values():
            before = self._journals.get(stats.process, JournalStats())
            num_bytes += max(0, stats.num_bytes - before.num_bytes)
            seconds = max(seconds, stats.seconds - before.seconds)
            if stats.trouble and stats.trouble != before.trouble:
                self.note(f"A worker's journal can't be written at present: {stats.trouble}")
            self._journals[stats.process] = stats
        if self.ledger.trouble and self.ledger.trouble != self._trouble:
            self.note(f"The ledger can't be written at present: {self.ledger.trouble}")
        self._trouble = self.ledger.trouble
        return num_bytes, seconds

    def _recent_reports(self) -> dict[int, StepReport]:
        return {step: report for step, report in self._reports.items() if step in self._saves}

    def _result(self, future: Future) -> Any:
        """Wait for a result, watching that the workers it needs are there.

        Raises
        ------
        Disturbed
            If something was lost on the way.
        """
        try:
            return self.membership.result_of(future, self._look_around)
        except (Disturbed, SchedulerLost):
            raise
        except ResultGone as error:
            raise Disturbed(str(error)) from error
        except (CancelledError, KilledWorker, OSError) as error:
            if _CONNECTION_LOST not in str(error):
                self._check_workers()
            raise Disturbed(f"{type(error).__name__}: {error}") from error
        except GarbageReceived as error:
            self._check_workers()
            self._blame_sender(error, cause_of(self.client, future.key))
        except TransientError as error:
            self._check_workers()
            raise Disturbed(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            self._check_workers()
            self._blame_worker(error, cause_of(self.client, future.key))

    def _look_around(self) -> None:
        self.interrupts.heed()
        if self.client.status != "running":
            raise Disturbed(_CONNECTION_LOST)
        with contextlib.suppress(OSError):  # of a connection that is about to be noticed as lost
            self.membership.refresh_if_old()
        self._check_workers()
        self._check_stalls()

    def _check_workers(self) -> None:
        missing = sorted(set(self.addresses) - set(self.membership.usable()))
        if missing:
            stages = [s for s, address in enumerate(self.addresses) if address in missing]
            silent = [a for a in missing if a in self.membership.stalled]
            what = "has fallen silent" if len(silent) == len(missing) else "left"
            raise Disturbed(
                f"The worker {', '.join(missing)} {what} with stage {', '.join(map(str, stages))}."
            )

    # Who is to blame

    def _blame_sender(self, error: GarbageReceived, cause: Key | None) -> NoReturn:
        """Exclude the worker of the stage that sent garbage; twice the same is no accident.

        Parameters
        ----------
        cause
            The task that refused it: its sender is where the stage was when both were handed out.

        Raises
        ------
        NonFiniteLoss, TaskFailed
            If another worker has computed the same: the numbers have left the finite range, or
            the operators compute something else than their program says.
        """
        stage = error.stage
        if not 0 <= stage < len(self.addresses):
            raise Disturbed(str(error)) from error
        attempt = self.graph.prefix if cause is None else attempt_of(cause)
        addresses = self._handed_out.get(attempt, self.addresses)
        task, address = (str(error), str(self._done), str(stage)), addresses[stage]
        if not self._is_first_failure(task, address):
            twice = f"{error} It was computed twice, on {' and '.join(self._failed[task])}."
            if error.has_nan:
                raise NonFiniteLoss(f"{twice} {_WHAT_TO_DO}") from error
            raise TaskFailed(twice) from error
        # Whoever is rebuilt must not read it from the journal; the stage is rebuilt even if there is
        # no other worker for it.
        self._wrong.add(stage)
        run_id, plan = self.graph.refs[stage].run_id, self.graph.refs[stage].plan
        ask_workers(self.client, _disown, run_id, stage, self._done, addresses=[address])
        # The stage's batches, which the driver has written, go with the rest; they are sent again.
        JOURNAL.disown(run_id, stage, self._done, _DISOWN_SECONDS)
        delete_segments(self.run.store, plan, self._done, stage)
        raise Disturbed(str(error)) from error

    def _blame_worker(self, error: Exception, cause: Key | None) -> NoReturn:
        """Run a task that failed on another worker; if it fails there, too, the task is to blame."""
        address = self.membership.where_failed(cause) if cause is not None else None
        if cause is None or address is None or not self.graph.journal:
            raise error
        kind, stage = kind_of(cause)
        task = (kind, *map(str, cause[1:]))
        if not self._is_first_failure(task, address):
            raise error
        self._wrong.add(stage)
        raise Disturbed(
            f"{kind} of stage {stage} in step {cause[1]} failed on {address}: "
            f"{type(error).__name__}: {error}. It will be tried elsewhere."
        ) from error

    def _is_first_failure(self, task: tuple[str, ...], address: str) -> bool:
        """Note a failure, and exclude its worker if the task hasn't failed before."""
        known = self._failed.setdefault(task, [])
        known.append(address)
        if len(known) > 1:
            return False
        self.membership.exclude(address, f"{task[0]} failed there")
        if not self.membership.usable():
            self.membership.forgive()  # better this one again than nobody
        return True

    # Who is slow, and who is new

    def _check_stalls(self) -> None:
        """Have the stages of stalled workers rebuilt elsewhere; whoever is done first, wins."""
        stalled = self.membership.stalled
        self._drop_moves_to_nowhere()
        for stage, move in list(self._moves.items()):
            if move.stalled is not None and move.stalled not in stalled:
                self._moves.pop(stage).future.release()
                self.note(f"The worker {move.stalled} is back, with stage {stage}.")
        for stage, address in enumerate(self.addresses):
            if address in stalled and stage not in self._moves and self.graph.journal:
                news = stalled[address]
                because = f"it has stalled for {news['seconds']:.1f} s"
                self._move(stage, because, address, is_frozen=news["silent"])
        for move in self._moves.values():
            if move.stalled is not None and move.future.done():
                self.membership.exclude(move.stalled, STALLED)
                raise Disturbed(f"The worker {move.stalled} has stalled; its stages go elsewhere.")

    def _move(
        self, stage: int, because: str, stalled: str | None = None, *, is_frozen: bool = False
    ) -> None:
        """Begin to rebuild a stage elsewhere, if a worker has less to do, and room for it.

        Parameters
        ----------
        stalled
            Its worker, if that is why.
        is_frozen
            Whether it has fallen silent, so that any other will do.
        """
        address = self.addresses[stage]
        used, taken, memory = Counter[str](), Counter[str](), self._memory()
        for s, place in (*enumerate(self.addresses), *self._targets().items()):
            used[place] += 1
            taken[place] += self.stage_bytes[s]
        others = [
            a
            for a in self.membership.usable()
            if a != address and taken[a] + self.stage_bytes[stage] <= memory.get(a, math.inf)
        ]
        spares = [a for a in others if not used[a]]
        if not spares and not (is_frozen and others):
            return
        target = spares[0] if spares else min(others, key=lambda a: used[a])
        self.note(f"Rebuilding stage {stage} of {address} on {target}, too: {because}.")
        records = self.ledger.before(self._done)
        future = self._restored_at(stage, target, self._done, records)
        self._moves[stage] = _Move(target, future, because, stalled)

    def _restored_at(
        self, stage: int, address: str, step: int, records: Sequence[StepRecord]
    ) -> Future:
        """Have a stage rebuilt on a worker that isn't its own."""
        graph = self.graph.again(uuid.uuid4().hex[:8])
        dsk = graph.restore(stage, step, records, self._turn())
        places = list(self.addresses)
        places[stage] = address
        (future,) = self._get(dsk, addresses=places).values()
        return future

    def _spread_out(self) -> None:
        """Begin to move a stage off a worker that has several, if somebody has none."""
        if self._moves or not self.graph.journal:
            return
        used = Counter(self.addresses)
        crowded = [s for s, address in enumerate(self.addresses) if used[address] > 1]
        if not any(address not in used for address in self.membership.usable()):
            return
        for stage in reversed(crowded):
            if not self._moves:
                count = used[self.addresses[stage]]
                self._move(stage, f"a worker has joined, and this one has {count}")

    def _drop_moves_to_nowhere(self) -> None:
        usable = self.membership.usable()
        for stage in [s for s, move in self._moves.items() if move.address not in usable]:
            self._moves.pop(stage).future.release()

    def _warm_up(self, step: int) -> None:
        """Have spares read the weights of the stages most at risk from the newest snapshot."""
        _release(self._warming.values())
        self._warming.clear()
        spares = [a for a in self.membership.usable() if a not in self.addresses]
        if not spares or not self.graph.journal:
            return
        at_risk = sorted(range(len(self.addresses)), key=lambda s: (-self._lost_stages[s], s))
        known = scheduler_info(self.client)["workers"]
        for number, address in enumerate(spares):
            room = _SPARE_SHARE * (known.get(address, {}).get("memory_limit") or _ROOM_BYTES)
            for stage in at_risk[number:] + at_risk[:number]:
                room -= self.stage_bytes[stage]
                if room >= 0 and (stage, address) not in self._warming:
                    self._warming[stage, address] = self._restored_at(stage, address, step, ())

    def _warm(self) -> dict[int, str]:
        """Return by stage a spare that has its weights, or nearly."""
        found = {
            stage: address
            for (stage, address), future in self._warming.items()
            if future.status == "finished" and address not in self.addresses
        }
        return {**found, **self._targets()}

    def _targets(self) -> dict[int, str]:
        """Return by stage the worker that it is being moved to."""
        return {stage: move.address for stage, move in self._moves.items()}

    def _arrived(self) -> set[int]:
        """Return the stages that are ready elsewhere, to be taken over between two steps."""
        self._drop_moves_to_nowhere()
        done = {s for s, m in self._moves.items() if m.stalled is None and m.future.done()}
        for stage in [s for s in done if self._moves[s].future.status != "finished"]:
            self._moves.pop(stage).future.release()  # not there, after all
            done.discard(stage)
        return done

    # What is lost

    def _take_up_again(self, disturbance: Disturbed) -> None:
        """Find who is left and how far they are, rebuild what is lost elsewhere, and go on.

        Raises
        ------
        TransientError
            If that can't be done: all stages must go back to an earlier step.
        """
        while True:
            self._check_scheduler(disturbance)
            self.note(str(disturbance))
            self._let_go()
            lost = self._stages_of_the_missing() | self._wrong
            self._drop_saves(lost)
            self._count(lost, disturbance)
            if not self.graph.journal:
                raise WorkersLost(f"{disturbance} There is no journal to rebuild it from.")
            try:
                self._rebuild(lost)
                self._wrong.clear()
                return
            except Disturbed as another:
                disturbance = another

    def _check_scheduler(self, disturbance: Disturbed) -> None:
        """Refuse to ask a scheduler that isn't there, or is another than the one we knew.

        Raises
        ------
        SchedulerLost
        """
        if self.client.status != "running" or _CONNECTION_LOST in str(disturbance):
            address = self.client.scheduler.address
            raise SchedulerLost(f"The scheduler at {address} went away.") from disturbance

    def _count(self, lost: Collection[int], disturbance: Disturbed) -> None:
        counter = self._losses if lost else self._troubles
        counter[self._done] += 1
        if counter[self._done] > (_MAX_LOSSES_A_STEP if lost else _MAX_TROUBLES_A_STEP):
            raise WorkersLost(
                f"Step {self._done} was taken up again {counter[self._done] - 1} times. {disturbance}"
            ) from disturbance

    def _let_go(self) -> None:
        """Release every result that is waited for; dask forgets their tasks."""
        for flight in self._flights:
            _release(flight.futures.values())
            flight.futures = {}
        _release([*self._ready.values(), *self._restored])
        self._ready.clear()
        self._restored.clear()
        moves = {s: m for s, m in self._moves.items() if m.future.done()}
        _release(m.future for s, m in self._moves.items() if s not in moves)
        self._moves = moves
        warm = {place: f for place, f in self._warming.items() if f.done()}
        _release(f for place, f in self._warming.items() if place not in warm)
        self._warming = warm

    def _drop_saves(self, lost: Collection[int] | None = None) -> None:
        """Give up snapshots under way, or those that won't be finished without the lost stages.

        What has been copied from stages that are well is written, whatever becomes of the steps.
        """
        for step, futures in list(self._saves.items()):
            copied = all(f.status == "finished" for k, f in futures.items() if not _is_save(k))
            written = all(f.status == "finished" for k, f in futures.items() if _is_save(k))
            if lost is not None and copied and (written or not lost):
                continue
            _release(self._saves.pop(step).values())
            self._snapshot_due = True

    def _commit_on_the_way_out(self) -> None:
        """Commit the snapshots that are about to be written: what ended the run isn't in them."""
        deadline = time.monotonic() + _WAY_OUT_SECONDS
        for step in [step for step in self._saves if step <= self._done]:
            futures = self._saves[step].values()
            while not all(f.done() for f in futures) and time.monotonic() < deadline:
                self.membership.wait(_TICK_SECONDS / 10)
        if self._saves:
            self.ledger.flush(_WAY_OUT_SECONDS)
            self._commit_finished(self._done)

    def _stages_of_the_missing(self) -> set[int]:
        self.membership.refresh()
        usable = set(self.membership.usable())
        return {s for s, address in enumerate(self.addresses) if address not in usable}

    def _rebuild(self, lost: set[int]) -> None:
        """Place lost stages on other workers, and submit what is left of the steps in flight."""
        if not self._is_flushed(JOURNAL.flush):
            raise WorkersLost(f"The journal can't be written: {JOURNAL.stats().trouble}")
        self.graph = self.graph.again(uuid.uuid4().hex[:8])
        self.addresses[:] = self._placed_again(lost)
        self._lost_stages.update(lost)
        self._unsent |= lost  # also those of an earlier try that was itself disturbed
        if lost:
            places = ", ".join(f"stage {s} on {self.addresses[s]}" for s in sorted(lost))
            self.note(f"Rebuilding {places}.")
        known = self._progress(set(range(len(self.addresses))) - lost)
        for stage in lost & self._moves.keys():
            self._moves.pop(stage).future.release()
        lost = lost | {stage for stage, progress in known.items() if progress.step < self._done}
        for stage in lost:
            known[stage] = StageProgress(stage, self._done)
        self._standing = Standing(known)
        self._restore(dict.fromkeys(lost, self._done))
        for number, flight in enumerate(self._flights):
            try:
                flight.batch = self.feed.prepare_again(
                    flight.batch, flight.step, self.graph, self._unsent
                )
            except WorkersLost as error:
                raise Disturbed(str(error)) from error
            self._submit(flight, first=number == 0)
        self._unsent.clear()

    def _is_flushed(self, flush: Callable[[float], bool]) -> bool:
        """Wait until something is written, heeding interrupts; False if it takes too long."""
        deadline = time.monotonic() + self.wait_seconds
        while not flush(_TICK_SECONDS):
            self.interrupts.heed()
            if time.monotonic() > deadline:
                return False
        return True

    def _placed_again(self, lost: Collection[int]) -> list[str]:
        """Return the stages' workers, once there are any with room for those that are lost.

        Raises
        ------
        WorkersLost
            If none has come in time.
        """
        if not self.membership.usable():
            self.membership.forgive()
        deadline: float | None = None
        while True:
            usable, wanted = self.membership.usable(), "All workers are gone"
            if usable:
                try:
                    needs, memory = self.stage_bytes, self._memory()
                    return place_again(self.addresses, lost, usable, self._warm(), needs, memory)
                except NoRoom as error:
                    wanted = str(error)
            address = self.client.scheduler.address
            if deadline is None:
                deadline = time.monotonic() + self.wait_seconds
                self.note(f"{wanted}; waiting for new ones (dagflow join {address}).")
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkersLost(
                    f"{wanted}, and none has joined {address} within {self.wait_seconds:g} s."
                )
            self.membership.wait(min(left, _TICK_SECONDS))
            self.interrupts.heed()
            with contextlib.suppress(OSError):
                self.membership.refresh()

    def _memory(self) -> dict[str, int]:
        """Return the memory of each worker that says how much it has."""
        if self._asked_of is not self.membership.present:  # which is replaced, not changed
            self._asked_of = self.membership.present
            workers = scheduler_info(self.client)["workers"]
            limits = {address: info.get("memory_limit") for address, info in workers.items()}
            self._limits = {address: limit for address, limit in limits.items() if limit}
        return {**self._limits, **self.memory}

    def _progress(self, stages: Collection[int]) -> dict[int, StageProgress]:
        """Ask the workers of some stages how far these are."""
        dsk: dict[Key, Any] = {}
        for stage in sorted(stages):
            dsk |= self.graph.progress(stage, self._done)
        futures = self._get(dsk)
        try:
            found = [self._result(future) for future in futures.values()]
        finally:
            _release(futures.values())
        return {progress.stage: progress for progress in found}

    def _turn(self) -> tuple[int, int]:
        """Return a number that grows with every rebuilding of this run, whoever drives it."""
        return self.lease.holder.epoch, next(self.turns)

    def _restore(self, targets: Mapping[int, int]) -> None:
        """Have stages brought to the weights after some step; the next step waits for them."""
        dsk: dict[Key, Any] = {}
        for stage, step in targets.items():
            dsk |= self.graph.restore(stage, step, self.ledger.before(step), self._turn())
        futures = self._get(dsk)
        self._ready = {int(str(key[2])): future for key, future in futures.items()}

    # Snapshots

    def _submit_saves(self, step: int, *, after_update: bool) -> None:
        before = [key for futures in self._saves.values() for key in futures if _is_save(key)]
        ready = {s: f.key for s, f in self._ready.items()}
        dsk = self.graph.save(step, after_update=after_update, before=before, ready=ready)
        self._saves[step] = self._get(dsk)

    def _commit_finished(self, done: int, *, wait_for_all: bool = False) -> None:
        """Commit the snapshots whose step came back well and whose shards are all written."""
        for step in sorted(self._saves):
            futures = self._saves[step]
            if step > done or not (wait_for_all or all(f.done() for f in futures.values())):
                continue
            if wait_for_all and not self._is_flushed(self.ledger.flush):
                raise WorkersLost(f"The ledger can't be written: {self.ledger.trouble}")
            if not self.ledger.has_written(step):
                continue  # the next step will do
            records = self._records(step, must_be=wait_for_all)
            if records is None:
                continue
            records += self.write_extra(step)
            report = self._reports.get(step)
            decision = self.decision if report is None else report.decision
            meta = {
                "decision": _decision_json(decision),
                "loss": None if report is None else report.loss,
                "run_id": self.graph.refs[0].run_id,
                "plan": self.graph.refs[0].plan,
            }
            self._confirm_lease()
            # The step after it may still be about to be submitted; its update waits for the save.
            _release(self._saves.pop(step).values())
            try:
                commit_snapshot(self.run.store, step, records, meta)
            except (NotFound, StoreNotWritable) as error:
                if wait_for_all:
                    raise
                self.note(f"No snapshot of step {step}: {error}")  # the next one will do
                continue
            self._committed.add(step)
            self.after_commit(step, self._saves.keys())
            self._warm_up(step)

    def _records(self, step: int, *, must_be: bool) -> list[ShardRecord] | None:
        """Return what was written of a snapshot; None if that failed and the next one will do."""
        futures = [future for key, future in self._saves[step].items() if _is_save(key)]
        failed = [f.exception() for f in futures if f.status == "error"]
        passing = (TransientError, StoreNotWritable)
        if must_be or not failed or not all(isinstance(error, passing) for error in failed):
            return [self._result(future) for future in futures]
        self.note(f"No snapshot of step {step}: {failed[0]}")
        _release(self._saves.pop(step).values())
        return None

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
                self.note(str(error))
                self.membership.wait(_TICK_SECONDS)
                self.interrupts.heed()


async def _disown(run_id: str, stage: int, from_step: int) -> None:
    """Have a worker's journal drop what a stage sent; runs on the worker."""
    await asyncio.to_thread(JOURNAL.disown, run_id, stage, from_step, _DISOWN_SECONDS)


def _release(futures: Iterable[Future]) -> None:
    for future in futures:
        future.release()


def _is_save(key: Key) -> bool:
    return str(key[0]).startswith("save")


def _decision_json(decision: Decision | None) -> Any:
    if decision is None:
        return None
    skipped = {"skipped": decision.skipped} if decision.skipped else {}
    return {"loss_scale": decision.loss_scale, "good_steps": decision.good_steps, **skipped}


def _not_finite(report: StepReport) -> str:
    where = "the loss itself"
    if report.non_finite:
        stage = min(report.non_finite)
        microbatches = ", ".join(map(str, report.non_finite[stage]))
        where = f"stage {stage}, micro-batch {microbatches}"
    return (
        f"The loss of step {report.step} is {report.loss}; the numbers first left the finite range in "
        f"{where}. {_WHAT_TO_DO}"
    )
