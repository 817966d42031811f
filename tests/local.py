"""dask's clusters on this machine, and waiting for what processes do.

Workers are copies of a process that has imported everything, and so start ten times as fast.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dask
from chaos.warm import warm
from distributed import Client, LocalCluster, Nanny


class WarmNanny(Nanny):  # type: ignore[misc]
    """Starts its worker, and starts it again, as a copy."""

    async def instantiate(self) -> Any:
        with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
            return await super().instantiate()


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
