"""Servers for all tests of the folder, over workers that are there already."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cluster.processes import kill_group
from distributed import Client
from local import local_client
from openai import OpenAI
from served import KEYS, Served, Swarmed, ended_without_a_word, started
from tiny import save_tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Iterator[Served]:
    """A server of one answer at a time, on two workers that nobody else uses."""
    with local_client(2) as client:
        arguments: list[str | Path] = ["--model", model_folder, "--port", "0"]
        arguments += ["--scheduler", client.scheduler.address]
        arguments += ["--max-running", "1", "--max-queue", "1"]
        for key in KEYS:
            arguments += ["--api-key", key]
        log = model_folder.parent / "serve.log"
        with started(arguments, log) as (url, process), ended_without_a_word(process, log):
            headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
            with (
                httpx.Client(base_url=url, headers=headers, timeout=60) as http,
                OpenAI(base_url=f"{url}/v1", api_key=KEYS[1], max_retries=0, timeout=60) as openai,
            ):
                yield Served(url, http, openai)
            kill_group(process, signal.SIGINT)  # as a terminal does


@pytest.fixture(scope="session")
def workers() -> Iterator[Client]:
    """A client of two workers that belong to no server."""
    with local_client(2) as client:
        yield client


@pytest.fixture
def of_the_swarm(model_folder: Path, workers: Client) -> list[str | Path]:
    """Return what `dagflow serve` is told to serve the model on these workers."""
    scheduler = workers.scheduler.address
    return ["--model", model_folder, "--scheduler", scheduler, "--port", "0"]


@pytest.fixture(scope="session")
def swarmed(model_folder: Path, workers: Client) -> Iterator[Swarmed]:
    arguments: list[str | Path] = ["--model", model_folder, "--port", "0", "--stages", "2"]
    arguments += ["--scheduler", workers.scheduler.address]
    # Beginnings that are kept for others would look like sessions that are left behind.
    arguments += ["--max-queue", "256", "--no-prefix-reuse"]
    log = model_folder.parent / "swarmed.log"
    with started(arguments, log) as (url, process), ended_without_a_word(process, log):
        headers = {"Content-Type": "application/json"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            yield Swarmed(http, workers, process.pid)
        kill_group(process, signal.SIGINT)
