"""Processes that tests start as people do, from the command line, or as copies where that is no matter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from chaos import warm
from distributed import Client
from local import local_cluster

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent


class Process(Protocol):
    """A process in a group of its own."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float) -> int | None: ...

    def send_signal(self, number: int) -> None: ...

    def communicate(self) -> Any: ...


@dataclass(frozen=True)
class Copy:
    """A process that was copied from one that has imported everything."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def communicate(self) -> None:
        """Wait until it has ended."""
        self.process.join()

    def wait(self, timeout: float) -> int | None:
        """Return its exit status, or None if it still runs after so many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def dagflow_command(said: Path, arguments: Sequence[str]) -> None:
    """Run ``dagflow`` in this process, with what it prints in a file."""
    from dagflow.cli import main

    os.chdir(said.parent)
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    main(list(arguments), prog_name="dagflow")


def dask_worker(arguments: Sequence[str]) -> None:
    """Run ``dask worker`` in this process."""
    from distributed.cli.dask_worker import main

    main(list(arguments))


def kill_group(process: Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all that it has started, as a terminal does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def start(command: Sequence[str | Path], log: Path) -> subprocess.Popen[str]:
    """Start a process in a group of its own, with its stderr in a file."""
    with log.open("w") as stderr:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            cwd=log.parent,
        )


@contextlib.contextmanager
def swarm(
    commands: dict[str, Sequence[str | Path]], folder: Path
) -> Iterator[tuple[Client, dict[str, subprocess.Popen[str]]]]:
    """Yield a client of a scheduler, and the workers that were started from the command line.

    ``ADDRESS`` in a command becomes the scheduler's.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    with own_scheduler() as (client, address):
        try:
            for name, command in commands.items():
                filled = [address if part == "ADDRESS" else part for part in command]
                workers[name] = start(filled, folder / f"{name}.log")
            client.wait_for_workers(len(commands), timeout=120)
            yield client, workers
        finally:
            _end(workers.values())


@contextlib.contextmanager
def volunteers(
    names: Sequence[str], options: Sequence[str], folder: Path
) -> Iterator[tuple[Client, dict[str, Copy]]]:
    """Yield a client of a scheduler, and a ``dask worker`` of each name, ready without importing anything."""
    workers: dict[str, Copy] = {}
    with own_scheduler() as (client, address):
        try:
            for name in names:
                arguments = [address, "--name", name, *options]
                workers[name] = Copy(warm.start(dask_worker, folder / f"{name}.log", arguments))
            client.wait_for_workers(len(names), timeout=120)
            yield client, workers
        finally:
            _end(workers.values())


@contextlib.contextmanager
def own_scheduler() -> Iterator[tuple[Client, str]]:
    """Yield a client of a scheduler in this process, and its address."""
    with local_cluster(0) as cluster, Client(cluster, set_as_default=False) as client:
        yield client, cluster.scheduler_address


def _end(workers: Iterable[Copy | subprocess.Popen[str]]) -> None:
    for worker in workers:
        kill_group(worker)
        worker.communicate()
