"""dask's clusters on this machine, and waiting for what processes do.

Workers are copies of a process that has imported everything: starting them costs little.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dask
from chaos.warm import warm
from distributed import Client, LocalCluster, Nanny


class WarmNanny(Nanny):  # type: ignore[misc]
    """Starts its worker, and starts it again, as a copy."""

    # dask's configuration is everybody's, and nannies that start at once end in any order: only the
    # first changes it, and only the last changes it back.
    _lock = threading.Lock()
    _num_starting = 0
    _change = ExitStack()

    async def instantiate(self) -> Any:
        with self._copying():
            return await super().instantiate()

    @classmethod
    @contextmanager
    def _copying(cls) -> Iterator[None]:
        with cls._lock:
            if not cls._num_starting:
                cls._change.enter_context(
                    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
                )
            cls._num_starting += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._num_starting -= 1
                if not cls._num_starting:
                    cls._change.close()


def local_cluster(num_workers: int, **options: Any) -> LocalCluster:
    """Start workers of one thread each, that say nothing; in processes of their own by default."""
    options = {"memory_limit": 0, "silence_logs": logging.CRITICAL, **options}
    if options.setdefault("processes", True):
        warm()
        options["worker_class"] = WarmNanny
    return LocalCluster(
        n_workers=num_workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", **options
    )


@contextmanager
def local_client(num_workers: int, **options: Any) -> Iterator[Client]:
    with (
        local_cluster(num_workers, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def wait_until(
    condition: Callable[[], bool], what: str | Callable[[], str], seconds: float = 60.0
) -> None:
    """Look again and again until a condition holds; fail at the deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what() if callable(what) else what}: not within {seconds:g} s")
        pause.wait(0.02)


def wait_until_forgotten(cluster: LocalCluster) -> None:
    """Wait until a scheduler knows no task."""
    tasks = cluster.scheduler.tasks
    wait_until(lambda: not tasks, lambda: f"the tasks {list(tasks)[:5]} are forgotten")
