"""`dagflow.train`: a model, data, and a swarm become a trained model."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed import Client

from dagflow.arguments import open_store
from dagflow.errors import SchedulerLost, SettingsInvalid
from dagflow.graph.loss import LossFunction
from dagflow.swarm.clusters import open_cluster
from dagflow.swarm.events import EventStream
from dagflow.swarm.main_guard import refuse_unguarded_main
from dagflow.training.arguments import check_arguments, journal_steps, observers
from dagflow.training.attempts import Attempts
from dagflow.training.data import BatchStream, TokenDataset
from dagflow.training.event_log import EventLog
from dagflow.training.events import Callback, ProgressLine, notify
from dagflow.training.first_batch import FirstBatch, described
from dagflow.training.generators import doubts
from dagflow.training.initial_weights import buffer_reader, initial_shard, initial_weights
from dagflow.training.opening import open_run
from dagflow.training.result import TrainResult
from dagflow.training.seen import SeenBatches, fingerprint
from dagflow.training.settings import Config, Mathematics
from dagflow_storage import RetryPolicy, Store, commit_snapshot, hold_lease, list_snapshots
from dagflow_storage.lease import Waiting
from dagflow_tasks.train.optimizer import Optimizer, Schedule

# A store that is away for some minutes holds a run up; it doesn't end it.
_PATIENT = RetryPolicy(total_seconds=600.0)


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
        Objects with ``on_step(event)``, or functions of a `StepEvent`. An object that has
        ``on_event(event)``, too, hears of all other events, see `dagflow.swarm.events`.
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
    events = EventStream(line.show, partial(notify, told))
    for doubt in doubts(data):
        events.note(f"The data's order can't be repeated: {doubt}.")
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
        events.note(described(prepared.report))
    with hold_lease(where, on_wait=_waiting_for_the_other(events)) as lease:
        run = open_run(where, dag, mathematics, weights, fingerprint(first), names, config, events)
        if not list_snapshots(where):
            with _MODELS:
                shard = initial_shard(where, dag, model, state_dict)
            meta = {"decision": None, "run_id": run.run_id, "loss": None}
            commit_snapshot(where, 0, [shard], meta)
        session = Attempts(
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
            events=events,
            names=names,
            journal=journal_steps(journal),
            has_own_client=isinstance(client, str),
        )
        log = EventLog(run)
        events.listen(log)
        try:
            with log.writing():
                while True:
                    with open_cluster(client, config.cluster, where, events.note) as connected:
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


def _waiting_for_the_other(events: EventStream) -> Callable[[Waiting], None]:
    """Return what says, once, that another driver's lease is waited out."""
    told: set[int] = set()

    def tell(waiting: Waiting) -> None:
        if waiting.holder.epoch not in told:
            told.add(waiting.holder.epoch)
            events.note(
                f"{waiting.holder} has trained this run and has fallen silent; taking over once that "
                f"has lasted {waiting.patience_seconds:g} s."
            )

    return tell


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
