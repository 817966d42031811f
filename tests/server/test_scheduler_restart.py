"""A scheduler that is ended and started again under a server costs its open streams time, and no token."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos import warm
from cluster.processes import Copy, dask_worker, kill_group
from distributed import Client
from local import wait_until
from served import started
from test_openai_client import GOES_ON

import dagflow
from dagflow.errors import SchedulerLost, WorkersLost

WORKER = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--preload", "dagflow.worker"]
# Random text takes longer than what can be guessed: long enough to be interrupted.
BODY = {"model": "tiny", "prompt": "A", "max_tokens": 1200, "logit_bias": GOES_ON}
BODY |= {"temperature": 1.2, "seed": 7}


def dask_scheduler(arguments: Sequence[str]) -> None:
    """Run ``dask scheduler`` in this process."""
    from distributed.cli.dask_scheduler import main

    main(list(arguments))


class Broker:
    """A scheduler in a process of its own, at one address however often it is started, and workers."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{self._port}"
        self._folder = folder
        self._processes: list[Copy] = []

    def start(self) -> None:
        options = ["--host", "127.0.0.1", "--port", self._port, "--no-dashboard"]
        log = self._folder / "scheduler.log"
        self._processes = [Copy(warm.start(dask_scheduler, log, options))]
        for name in "ab":
            options = [self.address, "--name", name, *WORKER]
            log = self._folder / f"{name}.log"
            self._processes.append(Copy(warm.start(dask_worker, log, options)))
        with Client(self.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)

    def end(self) -> None:
        """Kill the scheduler; its workers end by themselves."""
        if self._processes:
            kill_group(self._processes[0])
        for process in self._processes:
            assert process.wait(30) is not None
        self._processes = []


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    found = Broker(tmp_path)
    found.start()
    try:
        yield found
    finally:
        found.end()


@contextmanager
def stream(http: httpx.Client) -> Iterator[Iterator[str]]:
    """Yield the texts of a streamed answer as they come."""
    with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        chunks: Iterator[Any] = (json.loads(event) for event in events if event != "[DONE]")
        yield (chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.slow
def test_open_streams_go_on_when_a_scheduler_is_started_again(
    broker: Broker, model_folder: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["--model", model_folder, "--port", "0", "--stages", "2"]
    arguments += ["--scheduler", broker.address]
    log = tmp_path / "serve.log"
    with started(arguments, log) as (url, _), httpx.Client(base_url=url, timeout=120) as http:
        whole = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
        with stream(http) as texts:
            found = [next(texts) for _ in range(10)]
            broker.end()
            wait_until(lambda: http.get("/health").status_code == 503, "nobody is there")
            broker.start()
            found += texts
        assert "".join(found) == whole
        wait_until(lambda: http.get("/health").status_code == 200, "all is well")
        assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == whole
    assert log.read_text() == ""


def test_a_scheduler_that_stays_away_ends_what_waits_with_one_error(
    broker: Broker, model_folder: Path, tmp_path: Path
) -> None:
    model = dagflow.load(model_folder, store=tmp_path / "models", check=False)
    settings = dagflow.ClusterSettings(wait_seconds=2.0)
    with dagflow.Deployment(model, broker.address, cluster=settings) as deployment:
        broker.end()
        with pytest.raises(WorkersLost, match=f"{broker.address} within 2 s"):
            list(deployment.stream([deployment.request([5, 17, 3], max_new_tokens=8)]))
        wait_until(lambda: deployment.engine.is_over, "the scheduler is given up")
        with pytest.raises(SchedulerLost, match=f"come back at {broker.address} within 2 s"):
            list(deployment.stream([deployment.request([5, 17, 3], max_new_tokens=8)]))
