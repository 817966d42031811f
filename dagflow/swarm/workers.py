"""Makes a dask worker fit to run stages, and says what it is.

Runs on workers: through the preload ``dagflow.worker``, and again through a plugin that
`dagflow.train` registers, so that a plain ``dask worker`` serves, too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import platform
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from distributed import SchedulerPlugin, Worker, WorkerPlugin, get_worker
from tornado.ioloop import PeriodicCallback

from dagflow.swarm import wire
from dagflow.swarm.allocator import keep_freed_memory
from dagflow.swarm.dask_internals import (
    account_together,
    executing_seconds,
    forget_split_keys,
    keep_time,
    memory_limit,
    num_tasks_at_a_time,
    pause,
    scheduler_streams,
    send_at_once,
    silent_seconds,
    stop_profiling,
    transfer_log,
    worker_of,
    worker_stream,
)
from dagflow.swarm.health import LOOK_SECONDS, is_frozen
from dagflow.swarm.watch import TOPIC, StallWatch, is_ours
from dagflow_tasks.device import choose_device, current_device
from dagflow_tasks.limits import RECEIVING
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import DAGFLOW_VERSION


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself.

    Attributes
    ----------
    address, name : str
    dagflow, torch, python : str
        Versions.
    device : str
    num_threads : int
        Tasks at a time.
    num_torch_threads : int
        Threads inside an operator.
    memory_bytes : int
        What stages may use: dask's limit for the worker, or the GPU's memory.
    host : str
    """

    address: str
    name: str
    dagflow: str
    torch: str
    python: str
    device: str
    num_threads: int
    num_torch_threads: int
    memory_bytes: int
    host: str


def prepare_process(num_torch_threads: int | None = None, device: str = "auto") -> None:
    """Set this process up for stages: memory, threads, device, serializers. Safe to call again."""
    keep_freed_memory()
    if num_torch_threads is not None:
        torch.set_num_threads(num_torch_threads)
    choose_device(device)
    wire.register()


def prepare_worker(worker: Worker) -> None:
    """Connect a worker with what its process was prepared for."""
    keep_time(worker)
    send_at_once(worker_stream(worker))
    if sys.version_info < (3, 12):
        # `sys._current_frames` can lock a process up there for good (python/cpython#106883). dask does
        # without it in its own threads (dask/distributed#8616), but not in the workers' profiler.
        stop_profiling(worker)
    if worker.nanny:
        # A process of its own: let it end at once. Python's last collection over torch's modules
        # takes more than a second, and a nanny kills what hasn't ended after four.
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)
    CACHE.tell = _tell_driver
    wire.POLICY.bandwidth = wire.bandwidth_from_log(transfer_log(worker))
    limit = memory_limit(worker)
    if worker.nanny and limit is not None:  # in a user's process it isn't the limit
        RECEIVING.num_bytes = limit // 2


def _tell_driver(message: Mapping[str, Any]) -> None:
    """Tell whoever drives a run something, from within one of its tasks."""
    with contextlib.suppress(ValueError):  # in a process that has workers, but not in a task
        worker = get_worker()
        worker.log_event(TOPIC, {**message, "worker": worker.address})


class StageWorker(WorkerPlugin):  # type: ignore[misc]
    """Prepares every worker of a cluster, those that join later included.

    Parameters
    ----------
    num_torch_threads : int, optional
        None leaves torch's setting, or the preload's, alone.
    embedded : bool
        True in a cluster that `dagflow.train` started: Ctrl-C then is the driver's business alone.
    """

    name = "dagflow-stage-worker"

    def __init__(self, num_torch_threads: int | None = None, embedded: bool = False) -> None:
        self.num_torch_threads = num_torch_threads
        self.embedded = embedded

    def setup(self, worker: Worker) -> None:
        if not getattr(worker, "_dagflow_prepared", False):
            prepare_process(self.num_torch_threads)
        if self.embedded and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        prepare_worker(worker)


class StageScheduler(SchedulerPlugin):  # type: ignore[misc]
    """Lets the scheduler send tasks at once instead of collecting them for 5 ms, and watches them.

    Tells on the topic `watch.TOPIC` of tasks that failed and of workers that have stalled. Workers
    that are silent get nothing from those that leave.
    """

    name = "dagflow-stage-scheduler"
    idempotent = True

    def __init__(self) -> None:
        self._given: dict[Any, str] = {}
        self._paused: set[str] = set()

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._watch = StallWatch(lambda message: scheduler.log_event(TOPIC, dict(message)))
        keep_time(scheduler)
        account_together(scheduler, is_ours)
        send_at_once(*scheduler_streams(scheduler))
        self._looking = PeriodicCallback(self._look, 1000 * LOOK_SECONDS)
        self._looking.start()

    async def close(self) -> None:
        self._looking.stop()

    def add_client(self, scheduler: Any, client: str) -> None:
        # It gets its stream after this.
        scheduler.loop.add_callback(lambda: send_at_once(*scheduler_streams(scheduler)))

    def add_worker(self, scheduler: Any, worker: str) -> None:
        send_at_once(*scheduler_streams(scheduler))
        known = scheduler.workers[worker]
        facts = {"name": str(known.name), "memory_limit": known.memory_limit}
        scheduler.log_event(TOPIC, {"action": "add-worker", "worker": worker, **facts})

    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        self._watch.gone(worker)
        scheduler.log_event(TOPIC, {"action": "remove-worker", "worker": worker})

    def transition(self, key: Any, start: str, finish: str, *_: Any, **kwargs: Any) -> None:
        if "processing" not in (start, finish) or not is_ours(key):
            return
        if finish == "processing":
            worker = worker_of(self._scheduler, key)
            if worker is not None:
                self._given[key] = worker
                self._watch.given(worker, key)
            return
        address = self._given.pop(key, "")
        spans = kwargs.get("startstops") or () if finish == "memory" else ()
        seconds = [s["stop"] - s["start"] for s in spans if s["action"] == "compute"]
        self._watch.back(address, key, sum(seconds) if seconds else None)
        if finish == "erred":
            self._scheduler.log_event(
                TOPIC, {"action": "erred", "key": [*map(str, key)], "worker": address}
            )

    def _look(self) -> None:
        forget_split_keys()
        silence = silent_seconds(self._scheduler)
        silent = {address for address, seconds in silence.items() if is_frozen(seconds)}
        for address in silent ^ self._paused:
            pause(self._scheduler, address, address in silent)
        self._paused = silent

        def running(address: str) -> float:
            return executing_seconds(self._scheduler, address, is_ours)

        self._watch.look(lambda address: silence.get(address, 0.0), running)


def describe(dask_worker: Worker) -> dict[str, Any]:
    """Return a worker's facts; runs on the worker."""
    device = current_device()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = memory_limit(dask_worker) or _system_memory()
    return asdict(
        WorkerFacts(
            address=dask_worker.address,
            name=str(dask_worker.name),
            dagflow=DAGFLOW_VERSION,
            torch=torch.__version__,
            python=platform.python_version(),
            device=str(device),
            num_threads=num_tasks_at_a_time(dask_worker),
            num_torch_threads=torch.get_num_threads(),
            memory_bytes=int(memory),
            host=platform.node(),
        )
    )


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
