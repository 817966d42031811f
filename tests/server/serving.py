"""Servers that tests start as people start them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cluster.processes import kill_group, start
from distributed import Client
from openai import OpenAI

KEYS = ("first key", "second")


@dataclass(frozen=True)
class Served:
    """Where the server is, and clients of it."""

    url: str
    http: httpx.Client
    openai: OpenAI

    @property
    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@dataclass(frozen=True)
class Swarmed:
    """A server of two stages over somebody else's workers, and a client of their scheduler."""

    http: httpx.Client
    client: Client
    pid: int


@contextmanager
def started(
    command: Sequence[str | Path], log: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield a server's URL and process, and kill it with all that it has started."""
    process = start(command, log)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"(http://\S+)/v1", said)
        assert found, said + log.read_text()
        yield found[1], process
    finally:
        kill_group(process)
        process.communicate()


@contextmanager
def process_of(
    command: Sequence[str | Path], log: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield a server's URL and process; whoever gets it sends it a signal that ends it, without a word."""
    with started(command, log) as (url, process):
        yield url, process
        assert process.wait(30) == 0, log.read_text()
        assert log.read_text() == ""
