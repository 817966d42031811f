"""The driver: hands steps to dask one after the other, and watches them come back.

It keeps a few steps in flight and nothing else: what must survive is in the store, what must be
fast is on the workers. What to do when machines come, go or fail is decided by `dagflow.training.recovery`;
the driver tells it what happens, and carries out what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

from dagflow.errors import NonFiniteLoss, SchedulerLost, WorkersLost
from dagflow.swarm.clusters import ask_workers, in_background, scheduler_info
from dagflow.swarm.interrupts import Interrupts
from dagflow.swarm.membership import Membership
from dagflow.training.dispatch import CONNECTION_LOST, Dispatch, Disturbed, release
from dagflow.training.events import StepEvent
from dagflow.training.feed import Feed, StepBatch
from dagflow.training.ledger import Ledger
from dagflow.training.recovery import NUMBERS_LEFT_RANGE, Recovery
from dagflow.training.recovery_protocol import (
    Assign,
    Copied,
    Copy,
    Disown,
    Drained,
    End,
    Event,
    Forget,
    Hold,
    Instruction,
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
)
from dagflow.training.saving import Saving
from dagflow.training.step_graph import Key, Priorities, Standing, StepGraph, StepInputs
from dagflow_storage import Lease, LeaseUnconfirmed, RunDirectory, ShardRecord
from dagflow_storage.records.journal import delete_segments
from dagflow_tasks.train.optimizer import Schedule
from dagflow_tasks.train.references import StageRef
from dagflow_tasks.train.replay import StageProgress, StepRecord, drop_stage
from dagflow_tasks.train.results import Decision, JournalStats, StepReport
from dagflow_tasks.train.tasks import learning_rate_factor
from dagflow_tasks.train.worker_journal import JOURNAL

# The scheduler remembers every task from which one that is still wanted descends. A run's steps
# descend from each other, so the chain is cut when it has grown this long: the driver waits until
# nothing is in flight, and the next step starts from the workers' state.
_LINEAGE_TASKS = 20_000
_LINEAGE_STEPS = 64
_DISOWN_SECONDS = 5.0


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
    recovery: Recovery = field(init=False)
    dispatch: Dispatch = field(init=False)
    saving: Saving = field(init=False)
    _duty: Instruction | None = None  # to be carried out before anything else; the latest counts
    _error: BaseException | None = None
    _is_holding: bool = False
    _copies: dict[int, Future] = field(default_factory=dict)
    _arriving: set[int] = field(default_factory=set)  # copies that `Recovery` waits for
    _flights: deque[_Flight] = field(default_factory=deque)
    _ready: dict[int, Future] = field(default_factory=dict)
    _restored: list[Future] = field(default_factory=list)
    _known: dict[int, StageProgress] = field(default_factory=dict)
    _standing: Standing | None = None
    _lineage: tuple[int, int] = (0, 0)
    _journals: dict[str, JournalStats] = field(default_factory=dict)
    _trouble: str = ""
    _done: int = 0
    _next: int = 0
    _exhausted: bool = False
    _clock: float = 0.0
    _limits: dict[str, int] = field(default_factory=dict)
    _asked_of: Collection[str] = ()

    def __post_init__(self) -> None:
        self.dispatch = Dispatch(
            self.client,
            self.graph,
            self.priorities,
            self.addresses,
            self.membership,
            self._look_around,
        )
        self.saving = Saving(
            self.dispatch,
            self.run,
            self.ledger,
            self.membership,
            self.lease,
            self.interrupts,
            self.note,
            self.wait_seconds,
            self.write_extra,
            self._committed,
        )
        self._begin_at(0)

    def _begin_at(self, step: int) -> None:
        self._done = self._next = step
        self.recovery = Recovery(
            self.addresses,
            self.stage_bytes,
            step,
            has_journal=self.graph.journal > 0,
            wait_seconds=self.wait_seconds,
            join_address=self.client.scheduler.address,
        )

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
        self._begin_at(first_step)
        self.feed.look_around = self._look_around
        self._clock = time.perf_counter()
        self._restore(dict.fromkeys(range(len(self.addresses)), first_step))
        while True:
            try:
                if self._duty is not None:
                    duty, self._duty = self._duty, None
                    self._carry_out(duty)
                elif self._advance(last_step):
                    return self._done
            except Disturbed as disturbance:
                self._take_in(disturbance)

    def drain(self) -> int:
        """Let the steps in flight finish, and return how many are done."""
        while self._flights:
            self._finish_oldest()
        return self._done

    def save_and_commit(self, step: int) -> None:
        """Make sure that a snapshot of this step exists; nothing may be in flight."""
        self.saving.finish(step, self._ready, self.decision)

    @contextlib.contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Let go on the way out of whatever is in flight: dask drops tasks that nobody wants."""
        try:
            yield
        finally:
            # By hand: dask keeps a failed task's exception, its traceback our frames, and these
            # every future of theirs.
            with contextlib.suppress(Exception):
                self.saving.commit_on_the_way_out(self._done, self.decision)
            for flight in self._flights:
                release(flight.batch.held.values())
            self._let_go()
            self._flights.clear()
            self.saving.drop_all()
            release(self._copies.values())
            self._copies.clear()
            self._error = None

    # Steps

    def _advance(self, last_step: int | None) -> bool:
        """Submit what may be, finish a step, and tell whether the run is done."""
        if self._is_holding and not self._flights:
            self._is_holding = False
            self._tell(Drained())
        while not self._exhausted and (last_step is None or self._next < last_step):
            if len(self._flights) >= self.lookahead_steps or self._is_holding:
                break
            if self._lineage_full() and self._flights:
                break
            if not self._submit_next():
                break
        if self._flights:
            self._finish_oldest()
            self.saving.commit_written(self._done, self.decision)
            self.interrupts.heed()
            return False
        self.save_and_commit(self._done)
        self.interrupts.heed()
        return True

    def _submit_next(self) -> bool:
        try:
            batch = self.feed.prepare(self._next, self.dispatch.graph)
        except WorkersLost as error:
            raise Disturbed(str(error), ResultLost(str(error))) from error
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
        if self.snapshot_every and (due or self.saving.is_due):
            self.saving.begin(step + 1, self._ready)
        return True

    def _lineage_full(self) -> bool:
        num_tasks, num_steps = self._lineage
        return num_tasks > _LINEAGE_TASKS or num_steps >= _LINEAGE_STEPS

    def _submit(self, flight: _Flight, *, first: bool) -> None:
        """Hand a step to dask: the tasks of it that aren't done yet."""
        step, batch, graph = flight.step, flight.batch, self.dispatch.graph
        if self._standing is not None and step > max(
            self._standing.step(s) for s in range(len(self.addresses))
        ):
            self._standing = None  # nothing of this step or a later one is done
        inputs = StepInputs(
            step,
            batch.microbatches,
            batch.argument,
            self.schedule if graph.scaled else self.schedule.factor(step),
            first=first,
            saved=self.saving.is_copied_first(step),
            decision=self.decision,
            ready={s: f.key for s, f in self._ready.items()} if first else {},
            standing=self._standing,
        )
        dsk = {**batch.tasks, **graph.step(inputs)}
        keys = [key for key in graph.update_keys(step) if key in dsk]
        keys.append(graph.report_key(step))
        if graph.decides:
            keys.append(graph.decision_key(step))
        flight.futures = self.dispatch.submit(dsk, keys)
        if first:
            self._lineage = (0, 0)
            self._restored.clear()  # nothing descends from them any more
        self._lineage = (self._lineage[0] + len(dsk), self._lineage[1] + 1)

    def _finish_oldest(self) -> None:
        """Wait for the oldest step in flight, and tell everybody about it."""
        flight = self._flights[0]
        with contextlib.suppress(LeaseUnconfirmed):
            self.lease.check()
        graph = self.dispatch.graph
        report: StepReport = self.dispatch.result(flight.futures[graph.report_key(flight.step)])
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
        self.saving.step_done(self._done, report.loss, report.decision)
        batch = flight.batch
        factor = learning_rate_factor(self.schedule, flight.step, report.decision)
        for ref in graph.refs:
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
        # By hand: the frames of an earlier disturbance, or a traceback that a callback keeps, hold them.
        release([*flight.futures.values(), *batch.held.values()])
        self.ledger.add(record, event.to_json())
        self.on_step(event)
        self._tell(StepDone(self._done))

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

    # What happens to the swarm

    def _look_around(self) -> None:
        """Tell what has changed since the last look.

        Raises
        ------
        Disturbed
            If what is waited for won't come.
        """
        self.interrupts.heed()
        if self.client.status != "running":
            raise Disturbed(CONNECTION_LOST, ResultLost(CONNECTION_LOST))
        with contextlib.suppress(OSError):  # of a connection that is about to be noticed as lost
            self.membership.refresh_if_old()
        self._tell(self._roster())
        for number in [n for n in self._arriving if self._copies[n].done()]:
            self._arriving.discard(number)
            self._tell(Copied(number, self._copies[number].status == "finished"))

    def _roster(self) -> Roster:
        present, stalled = self.membership.seen()
        memory = self._memory(present)
        stalls = {a: Stall(news["seconds"], news["silent"]) for a, news in stalled.items()}
        return Roster({address: memory.get(address) for address in present}, stalls)

    def _memory(self, present: Collection[str]) -> dict[str, int]:
        """Return the memory of each worker that says how much it has."""
        if self._asked_of is not present:  # which is replaced, not changed
            self._asked_of = present
            workers = scheduler_info(self.client)["workers"]
            limits = {address: info.get("memory_limit") for address, info in workers.items()}
            self._limits = {address: limit for address, limit in limits.items() if limit}
        return {**self._limits, **self.memory}

    def _take_in(self, disturbance: Disturbed) -> None:
        """Tell what has disturbed the steps in flight, unless `Recovery` has said so itself."""
        if disturbance.event is None:
            return
        self._error = disturbance.__cause__
        for event in (disturbance.event, ResultLost(str(disturbance))):
            with contextlib.suppress(Disturbed):
                self._tell(event)
            if self._duty is not None:  # else it has been told before
                return

    def _tell(self, event: Event) -> None:
        """Tell what has happened, and do what is to be done about it.

        Raises
        ------
        Disturbed
            If that can't be done in the middle of something else, see `go`.
        """
        for instruction in self.recovery.handle(event, time.monotonic()):
            match instruction:
                case Say(text):
                    self.note(text)
                case Hold():
                    self._is_holding = True
                case Copy():
                    self._begin_copy(instruction)
                case Release(number):
                    self._arriving.discard(number)
                    self._copies.pop(number).release()
                case Forget(stage, address):
                    self._have_forgotten(stage, address)
                case Disown(stage, address):
                    self._disown(stage, address)
                case _:
                    self._duty = instruction
        if self._duty is not None:
            raise Disturbed(getattr(self._duty, "why", type(self._duty).__name__))

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Stop(why):
                self._check_scheduler(why)
                self.note(why)
                self._is_holding = False
                self._let_go()
                self.saving.drop_uncopied()
                self._ask_who_is_there()
                self._tell(Stopped())
            case Wait(seconds):
                self.membership.wait(seconds)
                self.interrupts.heed()
                with contextlib.suppress(OSError):
                    self._ask_who_is_there()
            case Assign():
                self._assign(instruction)
            case Resume():
                self._resume(instruction)
            case End(error):
                if error is not None:
                    raise error from self._error
                assert self._error is not None
                raise self._error

    def _ask_who_is_there(self) -> None:
        self.membership.refresh()
        self._tell(self._roster())

    def _check_scheduler(self, why: str) -> None:
        """Refuse to ask a scheduler that isn't there, or is another than the one we knew.

        Raises
        ------
        SchedulerLost
        """
        if self.client.status != "running" or CONNECTION_LOST in why:
            address = self.client.scheduler.address
            raise SchedulerLost(f"The scheduler at {address} went away.") from self._error

    def _let_go(self) -> None:
        """Release every result that is waited for; dask forgets their tasks."""
        for flight in self._flights:
            release(flight.futures.values())
            flight.futures = {}
        release([*self._ready.values(), *self._restored])
        self._ready.clear()
        self._restored.clear()

    def _assign(self, assign: Assign) -> None:
        """Give stages other owners, and ask the others how far they are."""
        if not self.interrupts.until(JOURNAL.flush, self.wait_seconds):
            raise WorkersLost(f"The journal can't be written: {JOURNAL.stats().trouble}")
        stages = frozenset(range(len(self.addresses)))
        if stages - assign.ask - assign.moved:
            self.saving.drop_unwritten()
        self.dispatch.assign(assign.owners, assign.number, uuid.uuid4().hex[:8])
        graph = self.dispatch.graph
        dsk: dict[Key, Any] = {}
        for stage in sorted(assign.ask):
            dsk |= graph.progress(stage, self._done)
        futures = self.dispatch.submit(dsk)
        try:
            found = [self.dispatch.result(future) for future in futures.values()]
        finally:
            release(futures.values())
        self._known = {progress.stage: progress for progress in found}
        self._tell(Progress(assign.number, {s: p.step for s, p in self._known.items()}))

    def _resume(self, resume: Resume) -> None:
        """Have stages rebuilt, and submit what is left of the steps in flight."""
        begins = {stage: StageProgress(stage, self._done) for stage in resume.rebuild}
        self._standing = Standing({**self._known, **begins})
        self._restore(dict.fromkeys(sorted(resume.rebuild), self._done))
        graph = self.dispatch.graph
        for number, flight in enumerate(self._flights):
            try:
                again = self.feed.prepare_again(flight.batch, flight.step, graph, resume.resend)
            except WorkersLost as error:
                raise Disturbed(str(error), ResultLost(str(error))) from error
            kept = {id(future) for future in again.held.values()}
            release(f for f in flight.batch.held.values() if id(f) not in kept)
            flight.batch = again
            self._submit(flight, first=number == 0)
        self._tell(Resumed(resume.assignment))

    def _turn(self) -> tuple[int, int]:
        """Return a number that grows with every rebuilding of this run, whoever drives it."""
        return self.lease.holder.epoch, next(self.turns)

    def _restore(self, targets: Mapping[int, int]) -> None:
        """Have stages brought to the weights after some step; the next step waits for them."""
        dsk: dict[Key, Any] = {}
        for stage, step in targets.items():
            records = self.ledger.before(step)
            dsk |= self.dispatch.graph.restore(stage, step, records, self._turn())
        futures = self.dispatch.submit(dsk)
        self._ready = {int(str(key[2])): future for key, future in futures.items()}

    def _begin_copy(self, copy: Copy) -> None:
        """Have a stage rebuilt on a worker that isn't its owner."""
        graph = self.graph.again(uuid.uuid4().hex[:8])
        records = () if copy.by_snapshot else self.ledger.before(copy.num_steps)
        dsk = graph.restore(copy.stage, copy.num_steps, records, self._turn())
        places = list(self.addresses)
        places[copy.stage] = copy.address
        (self._copies[copy.number],) = self.dispatch.submit(dsk, addresses=places).values()
        self._arriving.add(copy.number)

    def _have_forgotten(self, stage: int, address: str) -> None:
        """Have a worker drop a stage from its memory; nobody waits for that."""
        # Workers of one process have one memory.
        if self.client.status != "running" or address.startswith("inproc://"):
            return
        forgetting = self.client.run(
            _drop_stage,
            self.graph.refs[stage],
            self._turn(),
            workers=[address],
            on_error="ignore",
            asynchronous=True,
        )
        in_background(self.client, forgetting)

    def _disown(self, stage: int, address: str) -> None:
        """Make sure that whoever is rebuilt doesn't read what a stage has sent from the journal."""
        ref = self.graph.refs[stage]
        ask_workers(self.client, _disown, ref.run_id, stage, self._done, addresses=[address])
        # The stage's batches, which the driver has written, go with the rest; they are sent again.
        JOURNAL.disown(ref.run_id, stage, self._done, _DISOWN_SECONDS)
        delete_segments(self.run.store, ref.plan, self._done, stage)

    def _committed(self, step: int, under_way: Collection[int]) -> None:
        self.after_commit(step, under_way)
        self._tell(SnapshotCommitted(step))


async def _disown(run_id: str, stage: int, from_step: int) -> None:
    """Have a worker's journal drop what a stage sent; runs on the worker."""
    await asyncio.to_thread(JOURNAL.disown, run_id, stage, from_step, _DISOWN_SECONDS)


async def _drop_stage(ref: StageRef, turn: tuple[int, int]) -> None:
    """Have a worker drop a stage from its memory; runs on the worker."""
    await asyncio.to_thread(drop_stage, ref, turn)


def _not_finite(report: StepReport) -> str:
    where = "the loss itself"
    if report.non_finite:
        stage = min(report.non_finite)
        microbatches = ", ".join(map(str, report.non_finite[stage]))
        where = f"stage {stage}, micro-batch {microbatches}"
    return (
        f"The loss of step {report.step} is {report.loss}; the numbers first left the finite range in "
        f"{where}. {NUMBERS_LEFT_RANGE}"
    )
