"""Servers for tests: one as people start it, and copies that start in no time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from chaos import warm
from cluster.processes import BIN, Copy, Process, dagflow_command, kill_group, start
from distributed import Client
from local import wait_until
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
def started(arguments: Sequence[str | Path], log: Path) -> Iterator[tuple[str, Process]]:
    """Yield the URL and process of a ``dagflow serve``, and kill it with all that it has started.

    It is a copy of a process that has imported everything, so it starts in no time, and can start no
    workers of its own: `arguments` name a scheduler.
    """
    said = log.with_suffix(".said")
    said.touch()
    command = ["serve", *map(str, arguments)]
    process = Copy(warm.start(dagflow_command, log, said, command))
    try:
        wait_until(
            lambda: "/v1" in said.read_text() or process.wait(0) is not None, "the server starts"
        )
        yield _url(said.read_text(), log), process
    finally:
        kill_group(process)
        process.communicate()


@contextmanager
def as_people_start_it(arguments: Sequence[str | Path], log: Path) -> Iterator[tuple[str, Process]]:
    """Yield the URL and process of a ``dagflow serve``, and kill it with all that it has started."""
    process = start([BIN / "dagflow", "serve", *arguments], log)
    try:
        assert process.stdout is not None
        yield _url(process.stdout.readline(), log), process
    finally:
        kill_group(process)
        process.communicate()


def _url(said: str, log: Path) -> str:
    found = re.search(r"(http://\S+)/v1", said)
    assert found, said + log.read_text()
    return found[1]


@contextmanager
def ended_without_a_word(process: Process, log: Path) -> Iterator[None]:
    """Whoever has a server sends it a signal that ends it inside the block; it ends well."""
    yield
    assert process.wait(30) == 0, log.read_text()
    assert log.read_text() == ""
