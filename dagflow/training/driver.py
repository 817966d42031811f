"""The driver: hands steps to dask one after the other, and watches them come back.

It keeps a few steps in flight and nothing else: what must survive is in the store, what must be
fast is on the workers. What to do when machines come, go or fail is decided by `dagflow.training.recovery`;
the driver tells it what happens, and carries out what it says.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

from dagflow.errors import NonFiniteLoss, WorkersLost
from dagflow.plan.memory import StageNeeds
from dagflow.swarm.events import EventStream
from dagflow.swarm.interrupts import Interrupts
from dagflow.swarm.membership import Membership
from dagflow.training import recovery_protocol as protocol
from dagflow.training.copies import Copies
from dagflow.training.dask_tasks import Key, Priorities
from dagflow.training.disowning import disown, drop_from_memory
from dagflow.training.dispatch import CONNECTION_LOST, Dispatch, Disturbed, release
from dagflow.training.events import StepEvent
from dagflow.training.feed import Feed, StepBatch
from dagflow.training.journal_watch import JournalWatch
from dagflow.training.ledger import Ledger
from dagflow.training.lookout import Lookout
from dagflow.training.non_finite import where_numbers_left_range
from dagflow.training.recovery import Recovery
from dagflow.training.saving import Saving
from dagflow.training.step_graph import StepGraph
from dagflow.training.step_inputs import Standing, StepInputs
from dagflow_storage import Lease, LeaseUnconfirmed, RunDirectory, ShardRecord
from dagflow_tasks.train.optimizer import Schedule
from dagflow_tasks.train.replay import StageProgress, StepRecord
from dagflow_tasks.train.results import Decision, StepReport
from dagflow_tasks.train.update import learning_rate_factor
from dagflow_tasks.train.worker_journal import JOURNAL

# The scheduler remembers every task from which one that is still wanted descends. A run's steps
# descend from each other, so the chain is cut when it has grown this long: the driver waits until
# nothing is in flight, and the next step starts from the workers' state.
_LINEAGE_TASKS = 20_000
_LINEAGE_STEPS = 64


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
    events : EventStream
        Is told what happens.
    write_extra : callable
        Writes the parts of a snapshot that no stage writes.
    after_commit : callable
        Called with the step of a snapshot that was just committed, and of those under way.
    needs : sequence of StageNeeds
        What each stage takes of its worker's memory.
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
    events: EventStream
    write_extra: Callable[[int], Sequence[ShardRecord]]
    after_commit: Callable[[int, Collection[int]], None]
    wait_seconds: float
    needs: Sequence[StageNeeds]
    memory: Mapping[str, int]
    turns: Iterator[int]
    decision: Decision | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    recovery: Recovery = field(init=False)
    dispatch: Dispatch = field(init=False)
    saving: Saving = field(init=False)
    _copies: Copies = field(init=False)
    _lookout: Lookout = field(init=False)
    _journals: JournalWatch = field(init=False)
    _duty: protocol.Instruction | None = None  # comes before anything else; the latest counts
    _error: BaseException | None = None
    _is_holding: bool = False
    _flights: deque[_Flight] = field(default_factory=deque)
    _ready: dict[int, Future] = field(default_factory=dict)
    _restored: list[Future] = field(default_factory=list)
    _known: dict[int, StageProgress] = field(default_factory=dict)
    _standing: Standing | None = None
    _lineage: tuple[int, int] = (0, 0)
    _done: int = 0
    _next: int = 0
    _exhausted: bool = False
    _clock: float = 0.0

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
            self.events,
            self.wait_seconds,
            self.write_extra,
            self._committed,
        )
        self._copies = Copies(self.dispatch, self.addresses, self.ledger, self._turn)
        run_id, owners = self.graph.refs[0].run_id, self.addresses
        self._lookout = Lookout(run_id, self.membership, self.memory, owners, self.events)
        self._journals = JournalWatch(self.ledger, self.events.note)
        self._begin_at(0)

    def _begin_at(self, step: int) -> None:
        self._done = self._next = step
        self.recovery = Recovery(
            self.addresses,
            self.needs,
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
        self._lookout.tell_placed([""] * len(self.addresses), self.addresses)
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
            # By hand: dask keeps a failed task's traceback, that our frames, and these their futures.
            with contextlib.suppress(Exception):
                self.saving.commit_on_the_way_out(self._done, self.decision)
            for flight in self._flights:
                release(flight.batch.held.values())
            self._let_go()
            self._flights.clear()
            self.saving.drop_all()
            self._copies.release_all()
            self._error = None

    # Steps

    def _advance(self, last_step: int | None) -> bool:
        """Submit what may be, finish a step, and tell whether the run is done."""
        if self._is_holding and not self._flights:
            self._is_holding = False
            self._tell(protocol.Drained())
        while not self._exhausted and (last_step is None or self._next < last_step):
            is_long = self._lineage_full() and self._flights
            if len(self._flights) >= self.lookahead_steps or self._is_holding or is_long:
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
            raise Disturbed(str(error), protocol.ResultLost(str(error))) from error
        if batch is None:
            self._exhausted = True
            return False
        step, self._next = self._next, self._next + 1
        first = not self._flights and (self._standing is None or self._lineage_full())
        self._flights.append(_Flight(step, batch, {}))
        if not any(microbatch.weight for microbatch in batch.microbatches):
            self.events.note(
                f"Nothing in the batch of step {step} counts: all its targets are ignored."
            )
        self._submit(self._flights[-1], first=first or step == self._done)
        due = self.snapshot_every and (step + 1) % self.snapshot_every == 0
        if self.snapshot_every and (due or self.saving.is_due):
            self.saving.begin(step + 1, self._ready)
        return True

    def _lineage_full(self) -> bool:
        return self._lineage[0] > _LINEAGE_TASKS or self._lineage[1] >= _LINEAGE_STEPS

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
            raise NonFiniteLoss(where_numbers_left_range(report))
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
        journal_bytes, journal_seconds = self._journals.since_last(report)
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
        self.events.tell(event)
        self._tell(protocol.StepDone(self._done))

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
            raise Disturbed(CONNECTION_LOST, protocol.ResultLost(CONNECTION_LOST))
        self._tell(self._lookout.look())
        for copied in self._copies.arrived():
            self._tell(copied)

    def _take_in(self, disturbance: Disturbed) -> None:
        """Tell what has disturbed the steps in flight, unless `Recovery` has said so itself."""
        if disturbance.event is None:
            return
        self._error = disturbance.__cause__
        for event in (disturbance.event, protocol.ResultLost(str(disturbance))):
            with contextlib.suppress(Disturbed):
                self._tell(event)
            if self._duty is not None:  # else it has been told before
                return

    def _tell(self, event: protocol.Event) -> None:
        """Tell what has happened, and do what is to be done about it.

        Raises
        ------
        Disturbed
            If that can't be done in the middle of something else, see `go`.
        """
        instructions = self.recovery.handle(event, time.monotonic())
        self._lookout.tell_excluded(self.recovery.excluded)
        for instruction in instructions:
            match instruction:
                case protocol.Say(text):
                    self.events.note(text)
                case protocol.Hold():
                    self._is_holding = True
                case protocol.Copy():
                    self._copies.begin(instruction)
                case protocol.Release(number):
                    self._copies.release(number)
                case protocol.Forget(stage, address):
                    drop_from_memory(self.client, self.graph.refs[stage], self._turn(), address)
                case protocol.Disown(stage, address):
                    disown(self.client, self.run.store, self.graph.refs[stage], self._done, address)
                case _:
                    self._duty = instruction
        if self._duty is not None:
            raise Disturbed(getattr(self._duty, "why", type(self._duty).__name__))

    def _carry_out(self, instruction: protocol.Instruction) -> None:
        match instruction:
            case protocol.Stop(why):
                self.dispatch.check_scheduler(why, self._error)
                self.events.note(why)
                self._is_holding = False
                self._let_go()
                self.saving.drop_uncopied()
                self._tell(self._lookout.look_now())
                self._tell(protocol.Stopped())
            case protocol.Wait(seconds):
                self.membership.wait(seconds)
                self.interrupts.heed()
                with contextlib.suppress(OSError):
                    self._tell(self._lookout.look_now())
            case protocol.Assign():
                self._assign(instruction)
            case protocol.Resume():
                self._resume(instruction)
            case protocol.End(error):
                if error is not None:
                    raise error from self._error
                assert self._error is not None
                raise self._error

    def _let_go(self) -> None:
        """Release every result that is waited for; dask forgets their tasks."""
        for flight in self._flights:
            release(flight.futures.values())
            flight.futures = {}
        release([*self._ready.values(), *self._restored])
        self._ready.clear()
        self._restored.clear()

    def _assign(self, assign: protocol.Assign) -> None:
        """Give stages other owners, and ask the others how far they are."""
        if not self.interrupts.until(JOURNAL.flush, self.wait_seconds):
            raise WorkersLost(f"The journal can't be written: {JOURNAL.stats().trouble}")
        stages = frozenset(range(len(self.addresses)))
        if stages - assign.ask - assign.moved:
            self.saving.drop_unwritten()
        before = list(self.addresses)
        self.dispatch.assign(assign.owners.workers, assign.number, uuid.uuid4().hex[:8])
        self._lookout.tell_placed(before, self.addresses)
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
        self._tell(protocol.Progress(assign.number, {s: p.step for s, p in self._known.items()}))

    def _resume(self, resume: protocol.Resume) -> None:
        """Have stages rebuilt, and submit what is left of the steps in flight."""
        begins = {stage: StageProgress(stage, self._done) for stage in resume.rebuild}
        self._standing = Standing({**self._known, **begins})
        self._restore(dict.fromkeys(sorted(resume.rebuild), self._done))
        graph = self.dispatch.graph
        for number, flight in enumerate(self._flights):
            try:
                again = self.feed.prepare_again(flight.batch, flight.step, graph, resume.resend)
            except WorkersLost as error:
                raise Disturbed(str(error), protocol.ResultLost(str(error))) from error
            kept = {id(future) for future in again.held.values()}
            release(f for f in flight.batch.held.values() if id(f) not in kept)
            flight.batch = again
            self._submit(flight, first=number == 0)
        self._tell(protocol.Resumed(resume.assignment))

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

    def _committed(self, step: int, under_way: Collection[int]) -> None:
        self.after_commit(step, under_way)
        self._tell(protocol.SnapshotCommitted(step))
