"""One server for all tests of the folder, started as people start it."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cluster.processes import BIN, kill_group, start
from distributed import Client, LocalCluster
from openai import OpenAI
from tiny import save_tiny

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Iterator[Served]:
    command: list[str | Path] = [BIN / "dagflow", "serve", "--model", model_folder, "--port", "0"]
    command += ["--workers", "2", "--max-running", "1", "--max-queue", "1"]
    for key in KEYS:
        command += ["--api-key", key]
    with process_of(command, model_folder.parent / "serve.log") as (url, process):
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        with (
            httpx.Client(base_url=url, headers=headers, timeout=60) as http,
            OpenAI(base_url=f"{url}/v1", api_key=KEYS[1], max_retries=0, timeout=60) as openai,
        ):
            yield Served(url, http, openai)
        kill_group(process, signal.SIGINT)  # as a terminal does


@dataclass(frozen=True)
class Swarmed:
    """A server of two stages over somebody else's workers, and a client of their scheduler."""

    http: httpx.Client
    client: Client
    pid: int


@pytest.fixture(scope="session")
def swarmed(model_folder: Path) -> Iterator[Swarmed]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        command: list[str | Path] = [BIN / "dagflow", "serve", "--model", model_folder]
        command += ["--scheduler", cluster.scheduler_address, "--stages", "2", "--port", "0"]
        command += ["--max-queue", "256"]
        with process_of(command, model_folder.parent / "swarmed.log") as (url, process):
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Swarmed(http, client, process.pid)
            kill_group(process, signal.SIGINT)


@contextmanager
def process_of(
    command: Sequence[str | Path], log: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield a server's URL and process; whoever gets it sends it a signal that ends it, without a word."""
    process = start(command, log)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"(http://\S+)/v1", said)
        assert found, said + log.read_text()
        yield found[1], process
        assert process.wait(30) == 0, log.read_text()
        assert log.read_text() == ""
    finally:
        kill_group(process)
        process.communicate()
