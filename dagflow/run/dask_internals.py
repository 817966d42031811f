"""Everything dagflow uses of dask that isn't public, in one place.

`tests/cluster/test_dask_internals.py` fails when dask changes any of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from dask._task_spec import Task, TaskRef
from distributed import Nanny, Worker, get_worker
from distributed.core import Status

__all__ = [
    "StepTask",
    "Task",
    "TaskRef",
    "add_handler",
    "connection_arguments",
    "executing_seconds",
    "notice_retirement",
    "registered_worker",
    "retire",
    "run_next",
    "set_scheduler_send_interval",
    "set_worker_send_interval",
    "stop_profiling",
]


class StepTask(Task):  # type: ignore[misc]
    """A task whose key says all: keys are unique to an attempt at a run.

    dask makes a token of every graph it is handed, and for it pickles every argument of every task,
    which takes longer than everything else about the graph.
    """

    __slots__ = ()

    def __dask_tokenize__(self) -> Any:
        return ("dagflow", self.key)


def set_worker_send_interval(worker: Worker, seconds: float) -> None:
    """Let a worker report finished tasks after `seconds` instead of dask's 2 ms.

    Every dependent task on another worker waits for this message.
    """
    worker.batched_stream.interval = seconds


def set_scheduler_send_interval(scheduler: Any, address: str, seconds: float) -> None:
    """Let the scheduler send tasks to one worker after `seconds` instead of dask's 2 ms."""
    scheduler.stream_comms[address].interval = seconds


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


def run_next(work: Callable[[], None]) -> None:
    """Have the thread of the task that calls this run something after it, before other tasks.

    Outside tasks it does nothing.
    """
    with contextlib.suppress(ValueError):
        get_worker().executors["default"].submit(work)


def stop_profiling(worker: Worker) -> None:
    """Keep a worker from looking at its tasks' stacks a hundred times a second."""
    if (profiling := worker.periodic_callbacks.pop("profile", None)) is not None:
        profiling.stop()


def add_handler(worker: Worker, operation: str, handler: Callable[..., Any]) -> None:
    """Have a worker answer whoever connects and names an operation; dask's own shuffle does so."""
    worker.handlers[operation] = handler


def connection_arguments(node: Any) -> dict[str, Any]:
    """Return what a client or a worker connects to others with: its certificates, if it has any."""
    arguments: dict[str, Any] = node.connection_args
    return arguments
