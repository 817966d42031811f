"""Where tasks run: a cluster that the user names, or an embedded one started for the run."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from distributed import Client, WorkerPlugin
from distributed.comm import CommClosedError

from dagflow.errors import SchedulerLost, SettingsInvalid, WorkerIncompatible, WorkersLost
from dagflow.swarm import wire
from dagflow.swarm.dask_internals import (
    client_stream,
    event_loop,
    identity,
    keep_time,
    send_at_once,
)
from dagflow.swarm.embedded import embedded_cluster
from dagflow.swarm.health import frozen_now
from dagflow.swarm.join import why_nobody_answers
from dagflow.swarm.main_guard import refuse_unguarded_main
from dagflow.swarm.workers import (
    StageScheduler,
    StageWorker,
    WorkerFacts,
    describe,
    prepare_process,
)
from dagflow_storage import Store
from dagflow_tasks.train.references import DAGFLOW_VERSION

T = TypeVar("T")

_ANSWER_SECONDS = 10.0
_LOOK_EVERY_SECONDS = 0.2
# How often somebody who waits for a scheduler is told how long that will be.
_TELL_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class ClusterSettings:
    """How to start an embedded cluster, and how long to wait for workers.

    Attributes
    ----------
    num_workers : int | None
        One a core by default, at most four.
    num_torch_threads : int | None
        Threads inside an operator of each embedded worker: its share of the cores by default.
    wait_seconds : float
        How long to wait for the first worker, or for all embedded ones.
    """

    num_workers: int | None = None
    num_torch_threads: int | None = None
    wait_seconds: float = 60.0


@contextmanager
def open_cluster(
    client: Client | str | None,
    settings: ClusterSettings,
    store: Store,
    note: Callable[[str], None] | None = None,
) -> Iterator[Client]:
    """Yield a client of the user's cluster, or of an embedded one that is closed afterwards.

    Parameters
    ----------
    note
        Is told at once, and then again and again, for which scheduler this waits, and how long; by
        default whoever reads stderr.

    Raises
    ------
    SettingsInvalid
        If the store is inside this process and the workers aren't.
    WorkersLost
        If nobody answers at the address.
    """
    if isinstance(client, Client):
        _refuse_process_local(store, client)
        wire.register()
        _register_plugins(client, StageWorker(), settings.wait_seconds)
        yield client
        return
    if isinstance(client, str):
        connected = _connected(client, settings.wait_seconds, note or _tell)
        with connected, open_cluster(connected, settings, store) as prepared:
            yield prepared
        return
    with _embedded(settings, store) as local:
        yield local


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _connected(address: str, seconds: float, note: Callable[[str], None]) -> Client:
    """Return a client of the scheduler at an address; say what is wrong while nobody answers."""
    deadline = time.monotonic() + seconds
    told = -_TELL_EVERY_SECONDS
    try:
        while (why := why_nobody_answers(address)) is not None:
            left = deadline - time.monotonic()
            if left < 0:
                raise TimeoutError(why)
            if time.monotonic() - told >= _TELL_EVERY_SECONDS:
                told = time.monotonic()
                note(
                    f"No dask scheduler answers at {address} ({why}); trying for {left:.0f} s more."
                )
            time.sleep(min(left, 5 * _LOOK_EVERY_SECONDS))
        return Client(address, timeout=max(1.0, deadline - time.monotonic()), set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise WorkersLost(
            f"No dask scheduler answers at {address} within {seconds:g} s ({error}). Start one with "
            "`dask scheduler`, or leave client= out for a local cluster."
        ) from error
    except ValueError as error:
        raise SettingsInvalid(
            f"{address!r} is no scheduler's address ({error}): wanted one like 'tcp://10.0.0.1:8786'."
        ) from error


@contextmanager
def _embedded(settings: ClusterSettings, store: Store) -> Iterator[Client]:
    cores = os.cpu_count() or 1
    num_workers = settings.num_workers or min(cores, 4)
    processes = not store.is_process_local
    if processes:
        refuse_unguarded_main()
        threads = settings.num_torch_threads or max(1, cores // num_workers)
    else:
        threads = settings.num_torch_threads or torch.get_num_threads()
        prepare_process(None, "auto")

    def prepare(client: Client) -> None:
        wire.register()
        plugin = StageWorker(threads, embedded=processes)
        _register_plugins(client, plugin, settings.wait_seconds, are_ours=True)

    with embedded_cluster(num_workers, threads, prepare, processes=processes) as client:
        yield client


def reconnect(client: Client, seconds: float) -> None:
    """Wait until a client's scheduler, or another at its address, is there, and prepare it.

    Raises
    ------
    SchedulerLost
        If none comes in time.
    """
    deadline = time.monotonic() + seconds
    scheduler = client.scheduler  # a client that has given up has none
    where = f" at {scheduler.address}" if scheduler is not None else ""
    while client.status != "running":
        if client.status in ("closed", "closing") or time.monotonic() > deadline:
            raise SchedulerLost(
                f"No scheduler has come back{where} within {seconds:g} s. Start it again, and go on "
                "with the same store."
            )
        time.sleep(_LOOK_EVERY_SECONDS)
    _register_plugins(client, StageWorker(), seconds)


def _register_plugins(
    client: Client, worker_plugin: StageWorker, seconds: float, *, are_ours: bool = False
) -> None:
    keep_time(client)
    send_at_once(client_stream(client))
    try:
        client.register_plugin(StageScheduler())
        register_on_workers(client, worker_plugin, seconds, are_ours=are_ours)
    except ModuleNotFoundError as error:
        raise WorkerIncompatible(
            f"The scheduler or a worker has no module {error.name!r}: install the same dagflow there "
            f"as here ({DAGFLOW_VERSION}): pip install dagflow."
        ) from error


def register_on_workers(
    client: Client, plugin: WorkerPlugin, seconds: float, *, are_ours: bool = False
) -> None:
    """Register a plugin, and wait until all workers have it, but not for frozen ones.

    Those have it when they wake, as those that join later.

    Parameters
    ----------
    seconds
        To wait at most: who has to import torch first may take long. If the scheduler hasn't heard
        of a worker for long, though of others, it is ten.
    are_ours
        This process has just started the workers: one that is silent imports torch on a busy machine,
        and is waited for all the same.
    """
    begin = time.monotonic()

    def is_long_enough() -> bool:
        waited = time.monotonic() - begin
        if waited > seconds:
            return True
        return not are_ours and waited > _ANSWER_SECONDS and bool(_frozen(client))

    async def register() -> None:
        await client.register_plugin(plugin)

    while True:
        registering = in_background(client, register())
        while not wait([registering], _LOOK_EVERY_SECONDS).done:
            if is_long_enough():
                return
        try:
            registering.result()
            return
        except OSError:  # a worker may have left this moment
            if client.status != "running" or is_long_enough():
                raise
            time.sleep(_LOOK_EVERY_SECONDS)


def scheduler_info(client: Client) -> dict[str, Any]:
    """Return what the scheduler says of itself and of all workers.

    dask's own function returns what it finds in the client afterwards, which now and then is the
    answer to another question: every two seconds the client asks for everything but the workers.
    """

    if client.status == "running":
        with suppress(OSError):  # of a connection that is about to be noticed as lost
            return client.sync(partial(identity, client))  # type: ignore[no-any-return]
    return client.scheduler_info()  # type: ignore[no-any-return]


def _frozen(client: Client) -> set[str]:
    """Return the workers that the scheduler hasn't heard of for long, though it has of others."""
    workers = scheduler_info(client)["workers"]
    return frozen_now({address: info["last_seen"] for address, info in workers.items()})


def _refuse_process_local(store: Store, client: Client) -> None:
    if store.is_process_local:
        raise SettingsInvalid(
            f"The store {store} lives in this process's memory, and the workers of "
            f"{client.scheduler.address} can't reach it. Use a folder they share or an s3:// URL; "
            "memory:// works with the embedded cluster."
        )


def in_background(client: Client, doing: Coroutine[Any, Any, T]) -> Future[T]:
    """Let a client do something that may take for ever, and return at once."""
    return asyncio.run_coroutine_threadsafe(doing, event_loop(client))


def ask_workers(
    client: Client,
    function: Callable[..., Any],
    *args: Any,
    seconds: float | None = None,
    addresses: Collection[str] | None = None,
) -> dict[str, Any]:
    """Run a function on every worker, or on some, and return the answers, or errors, by address.

    Who doesn't answer in time (10 s by default), because it is frozen or has just left, isn't in it.
    Nobody waits for those that the scheduler hasn't heard of for long.
    """
    frozen = _frozen(client)
    pending: dict[str, Future[Any]] = {}
    for address in addresses or scheduler_info(client)["workers"]:
        run = client.run(function, *args, workers=[address], on_error="return", asynchronous=True)
        pending[address] = in_background(client, run)
    awaited = [future for address, future in pending.items() if address not in frozen]
    wait(awaited, _ANSWER_SECONDS if seconds is None else seconds)
    answers: dict[str, Any] = {}
    for future in pending.values():
        if not future.done():
            future.cancel()
        elif future.exception() is None:
            answers |= future.result()
    return answers


def roster(client: Client, num_workers: int, wait_seconds: float) -> list[WorkerFacts]:
    """Wait for workers and return their facts, sorted by name.

    So many must be there and answer, or the time be up; then those that do are enough.

    Raises
    ------
    WorkersLost
        If fewer than `num_workers` come in time, or none of them answers.
    WorkerIncompatible
        If one of them runs another dagflow, or none at all.
    """
    address = client.scheduler.address
    deadline = time.monotonic() + wait_seconds
    known: Mapping[str, Any] = {}
    answers: Mapping[str, Any] = {}
    here: Mapping[str, Any] = {}
    while True:
        try:
            client.wait_for_workers(num_workers, timeout=max(0.1, deadline - time.monotonic()))
        except TimeoutError as error:
            found = len(scheduler_info(client)["workers"])
            if found < num_workers:  # or the answer was late
                raise WorkersLost(
                    f"{found} of {num_workers} workers joined {address} within {wait_seconds:g} s. "
                    f"On each machine that should help run: dagflow join {address}"
                ) from error
        known = scheduler_info(client)["workers"]
        answers = ask_workers(client, describe, addresses=known)
        # One that left a moment ago may still be listed; who can't be reached doesn't count.
        here = {w: a for w, a in answers.items() if not isinstance(a, CommClosedError)}
        is_late = time.monotonic() > deadline
        if len(here) >= num_workers or (here and is_late):
            break
        if is_late:
            raise WorkersLost(
                f"The workers connected to {address} don't answer: are they frozen? Start them "
                f"again, or have others join: dagflow join {address}"
            )
        time.sleep(_LOOK_EVERY_SECONDS)  # those that have been silent for long aren't waited for
    for worker in sorted(known.keys() - answers.keys()):
        warnings.warn(
            f"The worker {known[worker]['name']} ({worker}) doesn't answer; this starts without it.",
            stacklevel=2,
        )
    facts = [_checked(worker, answer) for worker, answer in here.items()]
    _warn_of_versions(facts)
    return sorted(facts, key=lambda f: (len(f.name), f.name, f.address))


def _checked(worker: str, answer: Any) -> WorkerFacts:
    if isinstance(answer, Exception):
        raise WorkerIncompatible(
            f"The worker {worker} can't run stages: {type(answer).__name__}: {answer}. Install dagflow "
            f"{DAGFLOW_VERSION} on it: pip install dagflow=={DAGFLOW_VERSION}."
        ) from answer
    facts = WorkerFacts(**answer)
    if facts.dagflow != DAGFLOW_VERSION:
        raise WorkerIncompatible(
            f"The worker {facts.name} ({worker}) runs dagflow {facts.dagflow}, this is "
            f"{DAGFLOW_VERSION}; programs and results may not fit. Install the same version on both."
        )
    return facts


def _warn_of_versions(facts: Sequence[WorkerFacts]) -> None:
    for worker in facts:
        if worker.torch != torch.__version__:
            warnings.warn(
                f"The worker {worker.name} ({worker.address}) has torch {worker.torch}, this is "
                f"{torch.__version__}: results may differ in the last bits.",
                stacklevel=2,
            )
