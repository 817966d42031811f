"""`dagflow.train`: a model, data, and a swarm become a trained model."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from distributed import Client

from dagflow.arguments import open_store
from dagflow.check.micro_batch import CheckReport
from dagflow.errors import (
    BatchInvalid,
    SchedulerLost,
    SettingsInvalid,
    StageTooLarge,
    StoreHoldsAnotherRun,
    TransientError,
)
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag
from dagflow.graph.loss import LossFunction
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.plan.partition import cuts_at_modules, partition_by_operator
from dagflow.plan.placement import place
from dagflow.plan.plan import Plan
from dagflow.plan.training_memory import TrainingMemory
from dagflow.runs.export import model_facts
from dagflow.runs.listing import foreign
from dagflow.swarm.clusters import ask_workers, open_cluster, reconnect, roster
from dagflow.swarm.main_guard import refuse_unguarded_main
from dagflow.swarm.membership import Membership
from dagflow.swarm.workers import WorkerFacts
from dagflow.training.arguments import check_arguments, journal_steps, observers
from dagflow.training.data import BatchStream, TokenDataset
from dagflow.training.dispatch import Disturbed
from dagflow.training.driver import Driver
from dagflow.training.events import Callback, ProgressLine, StepEvent, notify
from dagflow.training.feed import Feed, StreamFeed, TokenFeed, TokenRows
from dagflow.training.first_batch import FirstBatch, described
from dagflow.training.generators import doubts
from dagflow.training.initial_weights import (
    Leftovers,
    buffer_reader,
    initial_shard,
    initial_weights,
    read_state_dict,
    trained_weights,
)
from dagflow.training.ledger import Ledger
from dagflow.training.seen import SeenBatches, fingerprint
from dagflow.training.settings import Config, Mathematics
from dagflow.training.step_graph import Priorities, StepGraph
from dagflow_storage import (
    DamagedData,
    Lease,
    NotFound,
    RetryPolicy,
    RunDirectory,
    Snapshot,
    SnapshotFacts,
    Store,
    apply_retention,
    commit_snapshot,
    first_journal_step,
    hold_lease,
    list_snapshots,
    newest_whole_snapshot,
    set_aside_newer,
    settings_diff,
)
from dagflow_storage.lease import Waiting
from dagflow_storage.place.documents import sound
from dagflow_storage.records.journal import trim_journal
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer, Schedule
from dagflow_tasks.train.references import StageRef, TaskSettings
from dagflow_tasks.train.replay import StepRecord, reach
from dagflow_tasks.train.results import Decision
from dagflow_tasks.train.worker_journal import JOURNAL

# A run whose workers keep leaving before it gets anywhere is given up after so many attempts.
_MAX_FRUITLESS_ATTEMPTS = 5
_FLUSH_SECONDS = 20.0
_LOOK_EVERY_SECONDS = 1.0
# A store that is away for some minutes holds a run up; it doesn't end it.
_PATIENT = RetryPolicy(total_seconds=600.0)


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns; the rest is in the store.

    Attributes
    ----------
    losses : list of float
        One a step, from the run's first.
    step : int
        Steps done.
    plan : Plan
        The latest one.
    store : str
        URL of the run's directory.
    check : CheckReport
        What the check before the first step has found, and how long it took.
    """

    losses: list[float]
    step: int
    plan: Plan
    store: str = field(repr=False)  # the next one shows it, without what nobody should see
    _store: Store
    _aliases: dict[str, str]
    _names: tuple[str, ...]
    check: CheckReport = field(default_factory=CheckReport)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Read the trained weights and buffers from the store, on the CPU.

        ``model.load_state_dict(result.state_dict())`` works on the model that was given.
        """
        found = read_state_dict(self._store, self.step, self._aliases)
        # Without the buffers that the model keeps out of its own state_dict.
        return {name: found[name] for name in self._names if name in found}


def train(
    model: torch.nn.Module,
    data: Any,
    *,
    loss: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    clip_grad_norm: float | None = None,
    steps: int | None = None,
    epochs: int = 1,
    num_stages: int | str = "auto",
    num_microbatches: int = 8,
    precision: str = "fp32",
    seed: int = 0,
    store: str | Path | None = None,
    snapshot_every: int | None = 100,
    client: Client | str | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    config: Config | None = None,
    state_dict: str | Path | None = None,
    journal: bool | int = True,
) -> TrainResult:
    """Train a model on a swarm, and return its losses and weights.

    The model is captured as an operator DAG, cut into stages, and trained as a dask graph. The
    mathematics is that of a plain torch loop over the same batches: it depends neither on the
    number of stages nor on who computes them.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, or built under `empty_weights` with `state_dict=` a safetensors file or folder.
        It is put into training mode and not changed otherwise.
    data
        Iterable or map-style dataset of batches (mappings, tuples, tensors), a torch `DataLoader`,
        a Hugging Face dataset, or a `TokenDataset`. It is read in the same order when the run goes
        back or is resumed: what it draws from torch's, Python's and NumPy's global generators depends
        on `seed` and the epoch; generators that it holds are set back; ``set_epoch`` is called. All
        generators are left as they were. Batches that are read again and differ are an error.
    loss : callable, optional
        ``loss(output, target)``; without it the model returns its loss, or something with ``.loss``.
    optimizer : Optimizer
        AdamW with a learning rate of 3e-4 by default.
    schedule : Schedule, optional
        Constant by default; `total_steps` defaults to the run's number of steps.
    clip_grad_norm : float, optional
        Largest global norm of the gradients.
    steps, epochs : int
        How long: `steps` if given, else passes over the data.
    num_stages : int or "auto"
        "auto" takes one for each worker that makes a step shorter, as far as the model can be cut; the
        others are spares.
    num_microbatches : int
        Parts of a batch that go through the stages one after the other. A batch that it doesn't
        divide is split unevenly; the loss is the mean over the batch all the same.
    precision : {"fp32", "bf16", "fp16"}
        With bf16 and fp16 weights stay in fp32 and operators run under autocast; fp16 scales the
        loss.
    seed : int
    store : str or Path, optional
        Folder or fsspec URL of the run; a new folder under ``runs/`` by default. If it holds this
        run already, training resumes from its newest snapshot.
    snapshot_every : int, optional
        Steps between snapshots; None for one at the end.
    client : distributed.Client or str, optional
        The cluster, or its scheduler's address. By default one is started on this machine.
    progress : bool
        Show a progress line on stderr.
    callbacks : sequence
        Objects with ``on_step(event)``, or functions of a `StepEvent`.
    config : Config, optional
        What few runs need.
    journal : bool or int
        Write what crosses stages' boundaries to the store, behind the computation, so that a lost
        worker's stage is rebuilt alone. That is as many bytes as the stages send each other. A number
        n writes n steps at a time: fewer, larger objects, and n steps' worth of them in the workers'
        memory. Without a journal, a lost worker sends the whole run back to its newest snapshot.

    Raises
    ------
    CaptureFailed, BatchInvalid, SettingsInvalid, OptimizerInvalid, PlanInvalid, StageTooLarge
        Before any task runs.
    ResultsDiffer
        If the captured graph computes something else than the model, or the micro-batches' losses
        don't add up to the batch's; before any task runs. See `Config.check`.
    StoreNotWritable, StoreHoldsAnotherRun
        Before any task runs.
    StoreInUse, LeaseLost
        If another driver trains the same run, or has taken over because this one was away.
    WorkersLost
        If no worker joins in time, or all have left.
    NonFiniteLoss
        If the loss isn't finite; the last snapshot is good.
    """
    check_arguments(
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        client=client,
        state_dict=state_dict,
        epochs=epochs,
        steps=steps,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        snapshot_every=snapshot_every,
        seed=seed,
        clip_grad_norm=clip_grad_norm,
    )
    told = observers(callbacks)
    # NumPy's numbers are no JSON.
    epochs, num_microbatches, seed = int(epochs), int(num_microbatches), int(seed)
    steps = None if steps is None else int(steps)
    clip_grad_norm = None if clip_grad_norm is None else float(clip_grad_norm)
    config = config or Config()
    line = ProgressLine(progress)
    for doubt in doubts(data):
        line.note(f"The data's order can't be repeated: {doubt}.")
    stream = _stream(data, epochs, steps, seed, config)
    total = steps if steps is not None else _total_steps(data, stream, epochs)
    mathematics = Mathematics(
        optimizer=optimizer or Optimizer("AdamW", lr=3e-4),
        schedule=_with_total(schedule or Schedule(), total),
        clip_grad_norm=clip_grad_norm,
        num_microbatches=num_microbatches,
        precision=precision,
        seed=seed,
    )
    url = store if store is not None else _new_folder(model)
    probed = open_store(url)
    if client is None and not probed.is_process_local:
        refuse_unguarded_main()
    probed.probe()
    where = Store(str(url), retry=_PATIENT)
    first = data.rows(0, 0, data.batch_size) if stream is None else stream.peek()
    of_first = FirstBatch(
        model, loss, first, num_microbatches, buffer_reader(model, state_dict), config
    )
    with _MODELS:
        with _training_mode(model):
            check = config.check and not _is_done(where, total)
            prepared = of_first.prepare(check=check)
        dag = prepared.dag
        names = tuple(model.state_dict())
        weights = initial_weights(dag, model, state_dict)
    if check:
        line.note(described(prepared.report))
    with hold_lease(where, on_wait=_waiting_for_the_other(line)) as lease:
        run = _open_run(where, dag, mathematics, weights, fingerprint(first), names, config, line)
        if not list_snapshots(where):
            with _MODELS:
                shard = initial_shard(where, dag, model, state_dict)
            meta = {"decision": None, "run_id": run.run_id, "loss": None}
            commit_snapshot(where, 0, [shard], meta)
        session = _Session(
            dag=dag,
            loss_weights=prepared.loss_weights,
            report=prepared.report,
            mathematics=mathematics,
            run=run,
            lease=lease,
            data=data,
            stream=stream,
            seen=SeenBatches(strict=not config.force),
            total=total,
            config=config,
            num_stages=num_stages,
            snapshot_every=snapshot_every,
            line=line,
            callbacks=told,
            names=names,
            journal=journal_steps(journal),
            has_own_client=isinstance(client, str),
        )
        try:
            while True:
                with open_cluster(client, config.cluster, where, line.note) as connected:
                    try:
                        return session.train(connected)
                    except SchedulerLost:
                        if not session.has_own_client:
                            raise
        finally:
            line.close()


# While a model is traced, its modules hold no real tensors and are in a mode that isn't theirs;
# another thread may have the same model.
_MODELS = threading.RLock()


@contextmanager
def _training_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into training mode, and every module back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _is_done(store: Store, total: int | None) -> bool:
    """Tell whether the store has the run's last snapshot already."""
    snapshots = list_snapshots(store)
    return bool(snapshots) and total is not None and snapshots[-1] >= total


def _waiting_for_the_other(line: ProgressLine) -> Callable[[Waiting], None]:
    """Return what says, once, that another driver's lease is waited out."""
    told: set[int] = set()

    def tell(waiting: Waiting) -> None:
        if waiting.holder.epoch not in told:
            told.add(waiting.holder.epoch)
            line.note(
                f"{waiting.holder} has trained this run and has fallen silent; taking over once that "
                f"has lasted {waiting.patience_seconds:g} s."
            )

    return tell


@dataclass
class _Session:
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
    callbacks: tuple[Callback, ...]
    names: tuple[str, ...]
    journal: int
    has_own_client: bool
    plan: Plan | None = None
    kept: dict[int, SnapshotFacts] = field(default_factory=dict)
    turns: Iterator[int] = field(default_factory=partial(itertools.count, 1))

    def train(self, client: Client) -> TrainResult:
        self.line.total = self.total
        self.line.note(f"dashboard: {client.dashboard_link}")
        try:
            step = self._until_done(client)
        finally:
            # The workers stay, and have other things to remember.
            if client.status == "running":
                with contextlib.suppress(OSError):
                    ask_workers(client, _forget, self.run.run_id)
        metrics = self.run.read_metrics()
        assert self.plan is not None
        aliases = _aliases(self.dag)
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
                self.line.note(f"{error} Going on from an earlier step.")
                if isinstance(error, SchedulerLost):
                    if self.has_own_client:
                        raise  # a fresh client is there at once, one that reconnects after seconds
                    reconnect(client, self.config.cluster.wait_seconds)

    def _newest(self) -> int:
        """Return the step of the newest snapshot that is whole and of this run."""
        settings, run_id = self.run.settings(), self.run.run_id
        newest = newest_whole_snapshot(
            self.run.store, note=self.line.note, check=lambda s: foreign(s, settings, run_id)
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
            self.line.note(str(self.plan))
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
                    self.line.note(f"{error} Waiting for others (dagflow join {address}).")
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
            self.line.note(
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
        estimates = self.plan.partition.estimates
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
            on_step=self._on_step,
            note=self.line.note,
            write_extra=leftovers.write,
            after_commit=lambda step, saving: self._tidy(ledger, saving),
            wait_seconds=self.config.cluster.wait_seconds,
            turns=self.turns,
            stage_bytes=[e.memory_bytes if is_coarse else 0 for e in estimates],
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

    def _on_step(self, event: StepEvent) -> None:
        self.line.update(event)
        notify(self.callbacks, event)

    def _stop(self, driver: Driver, start: int) -> None:
        """After Ctrl-C: let what is in flight finish, write a snapshot, say how to go on."""
        self.line.note("Stopping: finishing the steps in flight (Ctrl-C again to stop at once).")
        done = start
        try:
            done = driver.drain()
            if done > start:
                driver.save_and_commit(done)
        except Disturbed as error:
            self.line.note(f"{error} The newest snapshot and the journal are what there is.")
        self.line.close()
        self.line.note(
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
    cut, placement = place(
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


def _open_run(
    store: Store,
    dag: OperatorDag,
    mathematics: Mathematics,
    weights: str | None,
    first_batch: str,
    names: Sequence[str],
    config: Config,
    line: ProgressLine,
) -> RunDirectory:
    """Create the run's directory, or check that it holds this run.

    Raises
    ------
    StoreHoldsAnotherRun
        If settings differ that change the mathematics; lists them.
    """
    run = RunDirectory(store)
    wanted = {
        "model": {**_model_settings(dag), **({"initial_weights": weights} if weights else {})},
        "data": {"first_batch": first_batch},
        **mathematics.to_json(),
    }
    wanted = json.loads(json.dumps(wanted))
    if not run.exists():
        facts = model_facts(names, _aliases(dag))
        run.create(wanted, {**facts, "origin": dict(config.origin) if config.origin else None})
        line.note(f"Writing to {store}.")
        return run
    difference = _differences(run.settings(), wanted, dag, store)
    if difference and not config.force:
        raise StoreHoldsAnotherRun(
            f"{store} holds a run with other settings, which change what is computed:\n  "
            + "\n  ".join(difference)
            + "\nUse another store=, the old settings, or Config(force=True) to go on regardless."
        )
    newest = (list_snapshots(store) or [0])[-1]
    line.note(f"Resuming {store} from the snapshot of step {newest}.")
    return run


def _differences(
    known: dict[str, Any], wanted: dict[str, Any], dag: OperatorDag, store: Store
) -> list[str]:
    """Say how a run's settings differ from those in the store, a line each.

    A model has the weights that the run began with, or those of its newest snapshot: whoever has
    loaded the result goes on from it.
    """
    begun, given = known.get("model"), wanted["model"]
    begun = begun if isinstance(begun, dict) else {}
    if "initial_weights" not in begun or "initial_weights" not in given:
        # Begun by an older dagflow, or unknown now.
        begun.pop("initial_weights", None)
        given.pop("initial_weights", None)
    elif begun["initial_weights"] != given["initial_weights"]:
        try:
            newest = Snapshot.open(store, newest_whole_snapshot(store))
            if trained_weights(dag, newest) == given["initial_weights"]:
                given["initial_weights"] = begun["initial_weights"]
        except (NotFound, DamagedData):  # nothing that the weights could be of
            pass
    return [
        f"{line} (neither the weights that the run began with nor those of its newest snapshot)"
        if line.startswith("model.initial_weights:")
        else line
        for line in settings_diff(known, wanted)
    ]


def _aliases(dag: OperatorDag) -> dict[str, str]:
    """Return the first name of each tied parameter by its further names."""
    return {alias: p.name for p in dag.parameters for alias in p.aliases}


def _model_settings(dag: OperatorDag) -> dict[str, Any]:
    parameters = {p.name: f"{p.dtype}{list(p.shape)}" for p in dag.parameters}
    trainable = sum(p.num_elements for p in dag.parameters if p.trainable)
    return {
        "parameters": parameters,
        "num_trainable": trainable,
        "num_operators": len(dag.nodes),
    }


def _forget(run_id: str) -> None:
    CACHE.forget(run_id)
    JOURNAL.forget(run_id)


async def _settle(run_id: str, plan: str) -> None:
    """Prepare a worker for an attempt: what other attempts left is written, or forgotten."""
    await asyncio.to_thread(JOURNAL.flush, _FLUSH_SECONDS)
    CACHE.forget(run_id, but_plan=plan)
    JOURNAL.forget(run_id, but_plan=plan)


def _stream(
    data: Any, epochs: int, steps: int | None, seed: int, config: Config
) -> BatchStream | None:
    if isinstance(data, TokenDataset):
        return None
    return BatchStream(data, None if steps is not None else epochs, seed, config.batch_size)


def _total_steps(data: Any, stream: BatchStream | None, epochs: int) -> int | None:
    per_epoch = len(data) if stream is None else stream.steps_per_epoch()
    return None if per_epoch is None else per_epoch * epochs


def _with_total(schedule: Schedule, total: int | None) -> Schedule:
    if schedule.kind == "constant" or schedule.total_steps is not None:
        return schedule
    if total is None:
        raise SettingsInvalid(
            f"The schedule {schedule.kind!r} needs to know how long the run is, and the data has no "
            "length: pass steps=, or total_steps= in the schedule."
        )
    return replace(schedule, total_steps=total)


def _new_folder(model: torch.nn.Module) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return str(Path("runs") / f"{type(model).__name__.lower()}-{stamp}-{uuid.uuid4().hex[:4]}")
