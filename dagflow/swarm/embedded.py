"""A dask cluster on this machine, started for one run, that nobody but its own user can reach.

dask unpickles what its peers send, from their first message on: whoever can connect runs code as the
user. So the processes talk over unix-domain sockets in a folder that is closed to everybody else, and
where there are none (Windows) over TLS with keys that only these processes have. What dask puts on
``sys.path`` is in that folder, too. The dashboard alone listens on a port of this machine, and only
shows what there is to see.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.security import Security

from dagflow.swarm import unix_comm
from dagflow.swarm.allocator import with_allocator
from dagflow.swarm.interrupts import Interrupts

_DASHBOARD_PORT = 8787
_LOOPBACK = "127.0.0.1"

# An embedded cluster runs one thing only. Nothing is stolen, moved, spilled or profiled.
_SETTINGS = {
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.tick.limit": "30s",
    # Every process looks at its own event loop's health fifty times a second otherwise, which takes
    # three percent of two cores.
    "distributed.admin.tick.interval": "1s",
    # Nor does it ask the system twice a second how it is: scheduler, nannies and workers alike do.
    "distributed.admin.system-monitor.interval": "2s",
    # What goes wrong in a task comes back as an exception; dask's own log would say it again.
    "logging": {"distributed": "critical"},
    # Weights and activations stay where they are; a big literal is a user's batch, not an accident.
    "distributed.admin.large-graph-warning-threshold": "200MB",
    # Pages to look at. Left out are dask's proxy, which connects to wherever it is told to, and what
    # a user's own configuration may have added: its API closes workers.
    "distributed.scheduler.http.routes": [
        "distributed.http.scheduler.prometheus",
        "distributed.http.scheduler.info",
        "distributed.http.scheduler.json",
        "distributed.http.health",
        "distributed.http.statics",
    ],
    "distributed.worker.http.routes": [],
}
_WEBSOCKET_ORIGINS = "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin"


@contextmanager
def embedded_cluster(
    num_workers: int,
    num_threads: int,
    prepare: Callable[[Client], None],
    *,
    processes: bool,
) -> Iterator[Client]:
    """Yield a client of a cluster that ends with the block.

    Parameters
    ----------
    num_workers : int
    num_threads : int
        Inside an operator, of each worker process.
    prepare : callable
        Is given the client before anybody may interrupt.
    processes : bool
        Whether workers are processes of their own, or threads of this one.
    """
    environment = _environment(num_threads) if processes else {}
    port = _free_dashboard_port()
    config = {
        **_SETTINGS,
        "distributed.nanny.pre-spawn-environ": environment,
        _WEBSOCKET_ORIGINS: _websocket_origins(port),
    }
    with ExitStack() as stack:
        # dask puts a folder that anybody might have made before on the path that modules are
        # imported from, in this process and in workers.
        folder = stack.enter_context(_private_folder())
        config["temporary-directory"] = folder
        stack.callback(_forget_modules_in, folder)
        stack.enter_context(dask.config.set(config))
        stack.callback(_restore_environment, {name: os.environ.get(name) for name in environment})
        stack.enter_context(warnings.catch_warnings())
        # Somebody may take the dashboard's port just before we do: dask finds another.
        warnings.filterwarnings("ignore", message=r"(?s)\s*Port .* is already in use")
        transport = stack.enter_context(_private_transport(folder)) if processes else {}
        with _interrupts_held():
            cluster = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=processes,
                dashboard_address=f"{_LOOPBACK}:{port}",
                # What goes wrong in a task comes back as an exception.
                silence_logs=logging.CRITICAL,
                **transport,
            )
            stack.enter_context(cluster)
            client = Client(cluster, set_as_default=False, direct_to_workers=True)
            stack.enter_context(client)
            prepare(client)
        yield client


def _environment(num_threads: int) -> dict[str, Any]:
    environment = {
        **dask.config.get("distributed.nanny.pre-spawn-environ"),
        "OMP_NUM_THREADS": num_threads,
        "MKL_NUM_THREADS": num_threads,
    }
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    return with_allocator(environment)


@contextmanager
def _private_folder() -> Iterator[str]:
    """Yield a folder for sockets and dask's files that only this user may enter."""
    prefix = "dagflow-"
    usual = os.path.join(tempfile.gettempdir(), prefix)
    # A socket's path must be short, and a colon ends it.
    is_usable = len(os.fsencode(usual)) < unix_comm.MOST_FOLDER_BYTES and ":" not in usual
    where = None if is_usable or not unix_comm.is_available() else "/tmp"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=where, ignore_cleanup_errors=True) as path:
        yield path


def _forget_modules_in(folder: str) -> None:
    """Import nothing more from a folder that is gone: anybody may make another of its name."""
    sys.path[:] = [path for path in sys.path if not path.startswith(folder)]


@contextmanager
def _private_transport(folder: str) -> Iterator[dict[str, Any]]:
    """Yield how a cluster of processes listens, for `LocalCluster`."""
    if not unix_comm.is_available():
        yield {"host": _LOOPBACK, "security": Security.temporary()}
        return
    with dask.config.set(
        {
            # It must know the protocol before it listens.
            "distributed.worker.preload": [
                *dask.config.get("distributed.worker.preload"),
                unix_comm.__name__,
            ],
            # dask takes the host from the scheduler's address, which is a folder here.
            "distributed.dashboard.link": dask.config.get("distributed.dashboard.link").replace(
                "{host}", _LOOPBACK
            ),
        }
    ):
        yield {"host": folder, "protocol": unix_comm.PREFIX}


def _restore_environment(before: Mapping[str, str | None]) -> None:
    """Put back what dask sets in this process for the workers that it starts from it."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, and for good in processes that it starts.

    A terminal interrupts the whole group of processes: a worker that is still importing torch
    would show a traceback, and dask can't close a cluster that is half-way up.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Whoever starts multiprocessing's tracker lets SIGINT through again afterwards.
    resource_tracker.ensure_running()
    interrupts = Interrupts()
    with interrupts.noted():  # another thread, of a library, may take the signal all the same
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    interrupts.heed()


def _free_dashboard_port() -> int:
    """Return dask's own port, or another if it is taken: dask would find one, but leave a socket open."""
    with socket.socket() as probe:
        if probe.connect_ex((_LOOPBACK, _DASHBOARD_PORT)) != 0:
            return _DASHBOARD_PORT
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _websocket_origins(port: int) -> list[str]:
    """Return which pages may look at the dashboard through somebody's browser: its own.

    dask allows those of all sites, and so whatever a user has set instead is an addition.
    """
    own = [f"{_LOOPBACK}:{port}", f"localhost:{port}"]
    return own + [host for host in dask.config.get(_WEBSOCKET_ORIGINS) if host != "*"]
