"""Processes that tests start as people do, from the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distributed import Client
from local import local_cluster

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent


def kill_group(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
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
    with (
        local_cluster(0) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        address = cluster.scheduler_address
        workers: dict[str, subprocess.Popen[str]] = {}
        try:
            for name, command in commands.items():
                filled = [address if part == "ADDRESS" else part for part in command]
                workers[name] = start(filled, folder / f"{name}.log")
            client.wait_for_workers(len(commands), timeout=120)
            yield client, workers
        finally:
            for worker in workers.values():
                kill_group(worker)
                worker.communicate()
