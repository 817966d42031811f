"""Everything dagflow uses of dask that isn't public, in one place.

`tests/cluster/test_dask_internals.py` fails when dask changes any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.utils import key_split
from distributed import Client, Nanny, Worker, rpc
from distributed.comm import Comm
from distributed.comm.tcp import MAX_BUFFER_SIZE, TCP, _close_comm, convert_stream_closed_error
from distributed.core import Status
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from tornado.iostream import IOStream

__all__ = [
    "DONT_REPLY",
    "MAX_BUFFER_SIZE",
    "MEMORY_LIMIT",
    "StepTask",
    "Task",
    "TaskRef",
    "UnixComm",
    "account_together",
    "add_handler",
    "cause_of",
    "client_stream",
    "connection_arguments",
    "convert_stream_closed_error",
    "event_loop",
    "executing_seconds",
    "forget_split_keys",
    "identity",
    "keep_time",
    "memory_limit",
    "notice_retirement",
    "num_tasks_at_a_time",
    "pause",
    "registered_worker",
    "retire",
    "scheduler_streams",
    "send_at_once",
    "silent_seconds",
    "stop_profiling",
    "transfer_log",
    "who_answers",
    "worker_of",
    "worker_stream",
]

# What a handler returns that has answered by itself, or has nobody left to answer.
DONT_REPLY = Status.dont_reply


class StepTask(Task):  # type: ignore[misc]
    """A task whose key says all: keys are unique to an attempt at a run.

    dask makes a token of every graph it is handed, and for it pickles every argument of every task,
    which takes longer than everything else about the graph.
    """

    __slots__ = ()

    def __dask_tokenize__(self) -> Any:
        return ("dagflow", self.key)


class UnixComm(TCP):  # type: ignore[misc]
    """A connection over a unix-domain socket (`tests/trust/test_cluster.py` tests it).

    Frames, and how they are read and written, are those of dask's own over TCP. Its ends have the
    address of whoever listens.
    """

    def __init__(self, stream: IOStream, address: str, deserialize: bool = True) -> None:
        # What dask's class does, but for setting what only TCP has.
        Comm.__init__(self, deserialize=deserialize)
        self._closed = False
        self._local_addr = self._peer_addr = address
        self.stream = stream
        self._extra: dict[str, Any] = {}
        self._finalizer = weakref.finalize(self, self._get_finalizer())
        self._finalizer.atexit = False
        stream.set_close_callback(functools.partial(_close_comm, weakref.ref(self)))


def send_at_once(*streams: Any) -> None:
    """Let batched streams send as soon as the event loop is free, instead of 2 to 10 ms later.

    Every dependent task on another worker waits for these messages. A stream waits until its last
    message's time plus the interval, by the clock on the wall: set back by a day meanwhile, it would
    send nothing for a day. A time that is long past whatever the clock says can't do that.
    """
    for stream in streams:
        stream.interval = -math.inf


def worker_stream(worker: Worker) -> Any:
    """Return the stream in which a worker tells its scheduler what it has done."""
    return worker.batched_stream


def client_stream(client: Client) -> Any:
    """Return the stream in which a client tells its scheduler what it wants.

    Another one when the client has connected again: whoever answers at the address then knows
    nothing of plugins and of topics that were subscribed to.
    """
    return client.scheduler_comm


def scheduler_streams(scheduler: Any) -> list[Any]:
    """Return the streams in which a scheduler tells its workers and clients what there is."""
    return [*scheduler.stream_comms.values(), *scheduler.client_comms.values()]


def keep_time(node: Any) -> None:
    """Have a worker's, nanny's, scheduler's or client's timers go on when somebody sets the clock.

    tornado's run by the clock on the wall: set back by a day, no heartbeat comes for a day.
    """
    if "time" in vars(node.loop):
        return  # since a clock that was right; by now somebody may have set it
    begin = time.time() - time.monotonic()
    node.loop.time = lambda: begin + time.monotonic()


def forget_split_keys(most: int = 2000) -> None:
    """Have dask forget what it has split keys into, if these are many: it remembers 100,000 of them."""
    if key_split.cache_info().currsize > most:
        key_split.cache_clear()


def account_together(scheduler: Any, is_ours: Callable[[Any], bool]) -> None:
    """Have a scheduler keep one account of all our tasks, ever.

    It would open one for every graph, which it never forgets, nor do workers what they count for it.
    """
    spans = scheduler.extensions.get("spans")
    if spans is None:
        return
    observe = spans.observe_tasks
    span = spans._ensure_span(("dagflow",), ("dagflow",))

    def observe_others(tasks: Iterable[Any], *args: Any, **details: Any) -> Any:
        others = []
        for task in tasks:
            if is_ours(task.key):
                task.group.span_id = span.id
            else:
                others.append(task)
        return observe(others, *args, **details)

    spans.observe_tasks = observe_others


def pause(scheduler: Any, address: str, paused: bool) -> None:
    """Give a worker no results and tasks of others for a while, or give it some again.

    A worker that leaves would wait until one that is frozen has taken its results.
    """
    wanted, other = (Status.paused, Status.running)[:: 1 if paused else -1]
    worker = scheduler.workers.get(address)
    if worker is not None and worker.status is other:
        scheduler.handle_worker_status_change(wanted, worker, "dagflow-silence")


def silent_seconds(scheduler: Any) -> dict[str, float]:
    """Return how long ago each worker was heard of, by address."""
    now = time.time()
    return {address: now - worker.last_seen for address, worker in scheduler.workers.items()}


def worker_of(scheduler: Any, key: Any) -> str | None:
    """Return the worker that was given a task."""
    worker = scheduler.tasks[key].processing_on
    return None if worker is None else str(worker.address)


def executing_seconds(scheduler: Any, address: str, is_ours: Callable[[Any], bool]) -> float:
    """Return how long a worker had been running one of our tasks at its last heartbeat."""
    worker = scheduler.workers.get(address)
    running = worker.executing.items() if worker is not None else ()
    return max((seconds for task, seconds in running if is_ours(task.key)), default=0.0)


async def retire(nanny: Nanny, worker: str) -> None:
    """Let the scheduler move a worker's results elsewhere and forget it, as `dask worker` leaves."""
    await nanny.scheduler.retire_workers(
        workers=[worker], close_workers=False, remove=True, stimulus_id="dagflow-leaves"
    )


async def registered_worker(nanny: Nanny) -> str | None:
    """Return the address under which the scheduler knows a nanny's worker, if it does."""
    workers = (await nanny.scheduler.identity(n_workers=-1))["workers"]
    mine = (address for address, info in workers.items() if info["nanny"] == nanny.address)
    return next(mine, None)


def notice_retirement(worker: Worker, changed: Callable[[bool], object]) -> None:
    """Call `changed` whenever the scheduler retires a worker (True) or changes its mind (False).

    What it sends afterwards, to close it, is the same as to a worker that it took for dead.
    """
    heard = worker.stream_handlers["worker-status-change"]

    def hear(status: str, **details: Any) -> Any:
        changed(Status.lookup[status] is Status.closing_gracefully)
        return heard(status=status, **details)

    worker.stream_handlers["worker-status-change"] = hear


def stop_profiling(worker: Worker) -> None:
    """Keep a worker from looking at its tasks' stacks a hundred times a second."""
    if (profiling := worker.periodic_callbacks.pop("profile", None)) is not None:
        profiling.stop()


def add_handler(worker: Worker, operation: str, handler: Callable[..., Any]) -> None:
    """Have a worker answer whoever connects and names an operation; dask's own shuffle does so."""
    worker.handlers[operation] = handler


def cause_of(client: Client, key: Any) -> Any:
    """Return the key of the task whose failure made another fail; None if nobody knows.

    `Client.recreate_error_locally` asks the scheduler for it, too.
    """
    with contextlib.suppress(OSError):  # of a connection that is about to be noticed as lost
        return client.sync(client.scheduler.get_error_cause, keys=[key])
    return None


def connection_arguments(node: Any) -> dict[str, Any]:
    """Return what a client or a worker connects to others with: its certificates, if it has any."""
    arguments: dict[str, Any] = node.connection_args
    return arguments


def event_loop(node: Any) -> asyncio.AbstractEventLoop:
    """Return the event loop of a worker or a client."""
    loop: asyncio.AbstractEventLoop = node.loop.asyncio_loop
    return loop


async def identity(client: Client) -> dict[str, Any]:
    """Ask a client's scheduler what it says of itself and of all workers."""
    found: dict[str, Any] = await client.scheduler.identity(n_workers=-1)
    return found


async def who_answers(address: str) -> dict[str, Any]:
    """Ask whoever answers at an address what it is, and a scheduler for all its workers.

    Raises
    ------
    Exception
        Of any kind, if it isn't dask's.
    """
    arguments = Security().get_connection_args("worker")
    async with rpc(address, connection_args=arguments) as there:
        found: dict[str, Any] = await there.identity()
        return await there.identity(n_workers=-1) if found.get("type") == "Scheduler" else found


def memory_limit(worker: Worker) -> int | None:
    """Return how many bytes a worker may use, if it is limited."""
    limit: int | None = worker.memory_manager.memory_limit
    return limit or None


def num_tasks_at_a_time(worker: Worker) -> int:
    """Return how many tasks a worker runs side by side."""
    return int(worker.state.nthreads)


def transfer_log(worker: Worker) -> Any:
    """Return a worker's record of what it has sent to others: bytes, bandwidth, to whom."""
    return worker.transfer_outgoing_log
