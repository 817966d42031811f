"""Attempts at a run, one after the other, until it is done: a plan for who is there, and a driver."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from distributed import Client

from dagflow.check.micro_batch import CheckReport
from dagflow.errors import (
    BatchInvalid,
    SchedulerLost,
    SettingsInvalid,
    StageTooLarge,
    TransientError,
)
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.plan.memory import StageNeeds
from dagflow.plan.partition import cuts_at_modules, partition_by_operator
from dagflow.plan.plan import Plan
from dagflow.plan.search import cut_and_place
from dagflow.plan.training_memory import TrainingMemory
from dagflow.runs.listing import foreign
from dagflow.swarm.clusters import ask_workers, reconnect, roster
from dagflow.swarm.events import Announcer, EventStream
from dagflow.swarm.membership import Membership
from dagflow.swarm.workers import WorkerFacts
from dagflow.training.dask_tasks import Priorities
from dagflow.training.data import BatchStream, TokenDataset
from dagflow.training.dispatch import Disturbed
from dagflow.training.driver import Driver
from dagflow.training.events import ProgressLine
from dagflow.training.feed import Feed, StreamFeed, TokenFeed, TokenRows
from dagflow.training.initial_weights import Leftovers
from dagflow.training.ledger import Ledger
from dagflow.training.opening import alias_names
from dagflow.training.result import TrainResult
from dagflow.training.seen import SeenBatches
from dagflow.training.settings import Config, Mathematics
from dagflow.training.step_graph import StepGraph
from dagflow_storage import (
    Lease,
    NotFound,
    RunDirectory,
    Snapshot,
    SnapshotFacts,
    apply_retention,
    first_journal_step,
    list_snapshots,
    newest_whole_snapshot,
    set_aside_newer,
)
from dagflow_storage.place.documents import sound
from dagflow_storage.records.journal import trim_journal
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import StageRef, TaskSettings
from dagflow_tasks.train.replay import StepRecord, reach
from dagflow_tasks.train.results import Decision
from dagflow_tasks.train.worker_journal import JOURNAL

# A run whose workers keep leaving before it gets anywhere is given up after so many attempts.
_MAX_FRUITLESS_ATTEMPTS = 5


_FLUSH_SECONDS = 20.0


_LOOK_EVERY_SECONDS = 1.0


@dataclass
class Attempts:
    """One call of `train`: attempts at the same run until it is done."""

    dag: OperatorDag
    loss_weights: LossWeights
    report: CheckReport
    mathematics: Mathematics
    run: RunDirectory
    lease: Lease
    data: Any
    stream: BatchStream | None
    seen: SeenBatches
    total: int | None
    config: Config
    num_stages: int | str
    snapshot_every: int | None
    line: ProgressLine
    events: EventStream
    names: tuple[str, ...]
    journal: int
    has_own_client: bool
    plan: Plan | None = None
    kept: dict[int, SnapshotFacts] = field(default_factory=dict)
    turns: Iterator[int] = field(default_factory=partial(itertools.count, 1))

    def train(self, client: Client) -> TrainResult:
        self.line.total = self.total
        self.events.note(f"dashboard: {client.dashboard_link}")
        announcer = Announcer(client, {"run": self.run.run_id})
        self.events.listen(announcer)
        try:
            step = self._until_done(client)
        finally:
            self.events.leave(announcer)
            # The workers stay, and have other things to remember.
            if client.status == "running":
                with contextlib.suppress(OSError):
                    ask_workers(client, _forget, self.run.run_id)
        metrics = self.run.read_metrics()
        assert self.plan is not None
        aliases = alias_names(self.dag)
        return TrainResult(
            [row["loss"] for row in metrics if row["step"] <= step and "loss" in row],
            step,
            self.plan,
            self.run.store.url,
            self.run.store,
            aliases,
            self.names,
            self.report,
        )

    def _until_done(self, client: Client) -> int:
        fruitless = 0
        furthest = -1
        while True:
            embedded = self.config.cluster.num_workers
            # Outside the try: who has waited for workers in vain needn't wait again.
            workers = roster(client, embedded or 1, self.config.cluster.wait_seconds)
            try:
                return self._attempt(client, workers)
            except TransientError as error:
                newest = self._newest()
                fruitless = fruitless + 1 if newest <= furthest else 1
                furthest = max(furthest, newest)
                if fruitless >= _MAX_FRUITLESS_ATTEMPTS:
                    raise
                self.events.note(f"{error} Going on from an earlier step.")
                if isinstance(error, SchedulerLost):
                    if self.has_own_client:
                        raise  # a fresh client is there at once, one that reconnects after seconds
                    reconnect(client, self.config.cluster.wait_seconds)

    def _newest(self) -> int:
        """Return the step of the newest snapshot that is whole and of this run."""
        settings, run_id = self.run.settings(), self.run.run_id
        newest = newest_whole_snapshot(
            self.run.store, note=self.events.note, check=lambda s: foreign(s, settings, run_id)
        )
        set_aside_newer(self.run.store, newest)
        return newest

    def _attempt(self, client: Client, workers: Sequence[WorkerFacts]) -> int:
        """Plan for the workers that are there, and run until the end or until one is lost."""
        self.plan, workers = self._planned(client, workers)
        name = self._write_programs(self.plan)
        graph = self._graph(self.plan, name)
        ask_workers(client, _settle, self.run.run_id, name, seconds=2 * _FLUSH_SECONDS)
        newest = self._newest()
        start, ledger = self._start(graph, newest)
        addresses = [workers[index].address for index in self.plan.placement]
        if self.total is None or start < self.total:
            self.events.note(str(self.plan))
        self.line.begin(start)
        with Membership(client) as membership, ledger.writing():
            leftovers = Leftovers(self.run.store, newest, graph.programs)
            driver = self._driver(
                client, workers, graph, addresses, membership, ledger, start, leftovers
            )
            with driver.cleaning_up(), driver.interrupts.noted():
                try:
                    return driver.go(start, self.total)
                except KeyboardInterrupt:
                    self._stop(driver, start)
                    raise

    def _planned(
        self, client: Client, workers: Sequence[WorkerFacts]
    ) -> tuple[Plan, Sequence[WorkerFacts]]:
        """Plan for the workers that are there; once a plan was lost, wait for those that it takes.

        Raises
        ------
        PlanInvalid, StageTooLarge
        """
        deadline: float | None = None
        training = TrainingMemory(
            self.mathematics.optimizer.moments(),
            copies=self.snapshot_every is not None,
            scaled=self.mathematics.clip_grad_norm is not None
            or self.mathematics.precision == "fp16",
            num_microbatches=self.mathematics.num_microbatches,
            journal_steps=self.journal,
        )
        while True:
            try:
                plan = make_plan(
                    self.dag, workers, self.num_stages, self.mathematics, self.config, training
                )
                return plan, workers
            except StageTooLarge as error:
                if self.plan is None or (deadline is not None and time.monotonic() > deadline):
                    raise
                if deadline is None:
                    deadline = time.monotonic() + self.config.cluster.wait_seconds
                    address = client.scheduler.address
                    self.events.note(f"{error} Waiting for others (dagflow join {address}).")
            time.sleep(_LOOK_EVERY_SECONDS)
            workers = roster(client, 1, self.config.cluster.wait_seconds)

    def _write_programs(self, plan: Plan) -> str:
        """Store the plan's programs under a name that says what is computed, and return it.

        Whatever the journal holds under that name is of use to this attempt.
        """
        programs = [program.to_json() for program in plan.partition.programs]
        settings = json.dumps([self.mathematics.to_json(), programs], sort_keys=True)
        name = hashlib.sha256(settings.encode()).hexdigest()[:12]
        try:
            self.run.read_programs(name)
        except NotFound:
            self.run.write_programs(name, programs)
        return name

    def _start(self, graph: StepGraph, newest: int) -> tuple[int, Ledger]:
        """Return the step that all stages can be brought to, and the ledger up to there."""
        rows = self.run.ledger.read(self._needed_since())
        self.seen.learn(rows)
        kept = {row["step"]: StepRecord.from_json(row) for row in rows if self.journal}
        start = reach(graph.refs[0], graph.programs, graph.neighbours, newest, kept)
        if start > newest:
            self.events.note(
                f"Going on from step {start}: the snapshot of step {newest} and the journal."
            )
        return start, Ledger(self.run, {k: r for k, r in kept.items() if k < start})

    def _graph(self, plan: Plan, name: str) -> StepGraph:
        m = self.mathematics
        settings = TaskSettings(m.seed, m.precision, m.optimizer)
        run_id = self.run.run_id
        refs = [
            StageRef(self.run.store, run_id, name, stage, settings, self.journal)
            for stage in range(plan.num_stages)
        ]
        return StepGraph(
            prefix=uuid.uuid4().hex[:8],
            programs=plan.partition.programs,
            refs=refs,
            limits=plan.limits,
            halved=plan.halved,
            clip_norm=m.clip_grad_norm,
            scaled=m.precision == "fp16",
            parameter_order=tuple(p.name for p in self.dag.parameters if p.trainable),
            read_batch=self._read_batch(plan),
        )

    def _read_batch(self, plan: Plan) -> Callable[[int], TokenRows] | None:
        feed = self.token_feed
        if feed is None:
            return None
        return lambda stage: feed.rows(plan.partition.programs[stage])

    @cached_property
    def token_feed(self) -> TokenFeed | None:
        """What has the workers read the data, if they can."""
        if not isinstance(self.data, TokenDataset):
            return None
        num_microbatches = self.mathematics.num_microbatches
        return TokenFeed(self.data, self.dag, num_microbatches, self.loss_weights)

    def _driver(
        self,
        client: Client,
        workers: Sequence[WorkerFacts],
        graph: StepGraph,
        addresses: list[str],
        membership: Membership,
        ledger: Ledger,
        start: int,
        leftovers: Leftovers,
    ) -> Driver:
        assert self.plan is not None
        limit = self.config.memory_limit_bytes
        is_coarse = self.config.granularity == "stage"  # otherwise nobody has looked what fits
        return Driver(
            client=client,
            graph=graph,
            priorities=Priorities(self.plan.pipeline),
            addresses=addresses,
            feed=self._feed(client, addresses, start),
            schedule=self.mathematics.schedule,
            run=self.run,
            ledger=ledger,
            membership=membership,
            lease=self.lease,
            snapshot_every=self.snapshot_every,
            lookahead_steps=self.config.lookahead_steps,
            events=self.events,
            write_extra=leftovers.write,
            after_commit=lambda step, saving: self._tidy(ledger, saving),
            wait_seconds=self.config.cluster.wait_seconds,
            turns=self.turns,
            needs=[need if is_coarse else StageNeeds(0) for need in self.plan.needs],
            memory={w.address: limit or w.memory_bytes for w in workers},
            decision=self._decision(ledger, start),
        )

    def _decision(self, ledger: Ledger, start: int) -> Decision | None:
        """Return the decision of the step before the first, which holds the loss scale."""
        if start - 1 in ledger.records:
            return ledger.records[start - 1].decision
        stored = Snapshot.open(self.run.store, start).meta.get("decision")
        with sound(f"the snapshot of step {start} in {self.run.store!r} is damaged"):
            return Decision.from_json(stored) if stored else None

    def _tidy(self, ledger: Ledger, saving: Collection[int]) -> None:
        """After a snapshot: delete what no rebuilding will need."""
        apply_retention(self.run.store, self.config.retention, self.kept, in_flight=saving)
        since = self._needed_since()
        trim_journal(self.run.store, since)
        ledger.forget(since)

    def _needed_since(self) -> int:
        """Return the first step whose journal may be needed.

        From the snapshot before the newest on: should the newest turn out damaged, the one before
        and the journal lead to the same weights.
        """
        return first_journal_step(list_snapshots(self.run.store)) or 0

    def _feed(self, client: Client, addresses: Sequence[str], start: int) -> Feed:
        if self.token_feed is not None:
            return self.token_feed
        assert self.stream is not None
        if start < self.stream.step and isinstance(self.data, Iterator):
            raise BatchInvalid(
                "The data is an iterator, which can be read once, and the batches since the "
                f"snapshot of step {start} are gone. Call train again with a new iterator and "
                f"store={str(self.run.store)!r}, or pass a list, a DataLoader or a dataset."
            )
        self.stream.seek(start, self.seen)
        return StreamFeed(
            self.stream,
            self.dag,
            self.mathematics.num_microbatches,
            self.loss_weights,
            client,
            addresses,
            self.seen,
        )

    def _stop(self, driver: Driver, start: int) -> None:
        """After Ctrl-C: let what is in flight finish, write a snapshot, say how to go on."""
        self.events.note("Stopping: finishing the steps in flight (Ctrl-C again to stop at once).")
        done = start
        try:
            done = driver.drain()
            if done > start:
                driver.save_and_commit(done)
        except Disturbed as error:
            self.events.note(f"{error} The newest snapshot and the journal are what there is.")
        self.line.close()
        self.events.note(
            f"Stopped after step {done}. Call train again with store={str(self.run.store)!r} "
            "to go on from here."
        )


def make_plan(
    dag: OperatorDag,
    workers: Sequence[WorkerFacts],
    num_stages: int | str,
    mathematics: Mathematics,
    config: Config,
    training: TrainingMemory | None = None,
) -> Plan:
    """Cut the DAG for these workers and place the stages.

    Raises
    ------
    PlanInvalid, StageTooLarge
    """
    if isinstance(num_stages, str) and num_stages != "auto":
        raise SettingsInvalid(f"num_stages is a number or 'auto'; found {num_stages!r}.")
    names = [worker.name for worker in workers]
    if config.granularity == "operator":
        # Looking for what is useful takes long with a stage for every operator.
        slack = config.in_flight_slack or 0
        return Plan.in_turn(partition_by_operator(dag), names, mathematics.num_microbatches, slack)
    analysis = DagAnalysis(dag)
    memory_bytes = [config.memory_limit_bytes or worker.memory_bytes for worker in workers]
    split_points = config.split_points
    cut, placement = cut_and_place(
        analysis,
        memory_bytes,
        training or TrainingMemory(num_microbatches=mathematics.num_microbatches),
        num_stages=None if isinstance(num_stages, str) else num_stages,
        cuts=None if split_points is None else cuts_at_modules(analysis, split_points),
    )
    return Plan.placed(
        cut,
        placement,
        names,
        mathematics.num_microbatches,
        slack=config.in_flight_slack,
        memory_bytes=memory_bytes,
    )


def _forget(run_id: str) -> None:
    CACHE.forget(run_id)
    JOURNAL.forget(run_id)


async def _settle(run_id: str, plan: str) -> None:
    """Prepare a worker for an attempt: what other attempts left is written, or forgotten."""
    await asyncio.to_thread(JOURNAL.flush, _FLUSH_SECONDS)
    CACHE.forget(run_id, but_plan=plan)
    JOURNAL.forget(run_id, but_plan=plan)
