"""One server for all tests of the folder, started as people start it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cluster.processes import BIN, kill_group
from distributed import Client
from local import local_cluster
from openai import OpenAI
from serving import KEYS, Served, Swarmed, process_of
from tiny import save_tiny


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


@pytest.fixture(scope="session")
def swarmed(model_folder: Path) -> Iterator[Swarmed]:
    with (
        local_cluster(2) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        command: list[str | Path] = [BIN / "dagflow", "serve", "--model", model_folder]
        command += ["--scheduler", cluster.scheduler_address, "--stages", "2", "--port", "0"]
        # Beginnings that are kept for others would look like sessions that are left behind.
        command += ["--max-queue", "256", "--no-prefix-reuse"]
        with process_of(command, model_folder.parent / "swarmed.log") as (url, process):
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Swarmed(http, client, process.pid)
            kill_group(process, signal.SIGINT)
