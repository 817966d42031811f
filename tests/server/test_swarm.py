"""What a server does with workers that aren't its own: it forgets sessions there, and says who is missing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import serve as benchmark
import torch
from cluster.processes import volunteers
from local import wait_until
from served import Swarmed, started
from test_openai_client import GOES_ON
from tiny import save_tiny

from dagflow.serving.stage_server import sessions_open

REPOSITORY = Path(__file__).parent.parent.parent
SHORT = {"model": "tiny", "prompt": "A", "max_tokens": 4, "logit_bias": GOES_ON}
# Random text takes ten times as long as what can be guessed.
LONG = {**SHORT, "max_tokens": 4000, "stream": True, "temperature": 1.2}
WORKER = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--preload", "dagflow.worker"]
NUM_DEAF = 200
MOST_BYTES_OF_ONE = 2**18
# Values of JSON are some tens of bytes each in Python; without care they were a gigabyte here.
MOST_BYTES_OF_A_LONG_BODY = 400 * 2**20


def sessions(swarmed: Swarmed) -> dict[int, int]:
    """How many sessions each stage has, asked where it is."""
    found = swarmed.client.run(sessions_open)
    return {stage: n for held in found.values() for (_, stage), n in held.items() if n}


def test_a_client_that_leaves_in_mid_answer_leaves_nothing_on_the_workers(swarmed: Swarmed) -> None:
    with swarmed.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert sessions(swarmed) == {0: 1, 1: 1}
    wait_until(lambda: not sessions(swarmed), "the session is forgotten")
    assert swarmed.http.get("/health").json()["running"] == 0


def test_two_hundred_who_never_read_hold_nobody_up_and_cost_little(swarmed: Swarmed) -> None:
    url = swarmed.http.base_url
    body = json.dumps({**LONG, "max_tokens": 8, "logprobs": 5}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    process = psutil.Process(swarmed.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(NUM_DEAF):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((url.host, url.port))
            deaf.sendall(head.encode() + body)
        answer = swarmed.http.post("/v1/completions", json={**SHORT, "max_tokens": 8})
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert process.memory_info().rss - before < NUM_DEAF * MOST_BYTES_OF_ONE
    wait_until(lambda: not sessions(swarmed), "their sessions are forgotten")


@pytest.mark.parametrize(
    "prompt",
    ["A machine leaves. " * 580_000, [1] * 4_000_000, ["A", *[1] * 4_000_000], [[1]] * 2_000_000],
    ids=["text", "tokens", "mixed", "prompts"],
)
def test_a_body_of_ten_megabytes_is_refused_before_it_costs_anything(
    swarmed: Swarmed, prompt: Any
) -> None:
    process = psutil.Process(swarmed.pid)
    before = process.memory_info().rss
    body = json.dumps({"model": "tiny", "prompt": prompt}, separators=(",", ":"))
    assert 8_000_000 < len(body) < 10 * 2**20
    with ThreadPoolExecutor(1) as thread:
        refused = thread.submit(swarmed.http.post, "/v1/completions", content=body)
        assert swarmed.http.post("/v1/completions", json=SHORT).status_code == 200
    assert refused.result().status_code == 400
    assert refused.result().json()["error"]["param"] == "prompt"
    assert process.memory_info().rss - before < MOST_BYTES_OF_A_LONG_BODY


def test_health_says_which_stages_have_no_worker(swarmed: Swarmed) -> None:
    pids = swarmed.client.run(os.getpid)
    well = {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}
    assert swarmed.http.get("/health").json() == {**well, "workers": 2, "missing": []}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: swarmed.http.get("/health").status_code == 503, "nobody is there")
        found = swarmed.http.get("/health").json()
        assert found["status"] == "unavailable"
        assert found["missing"]
        wait_until(lambda: swarmed.http.get("/health").json()["workers"] == 0, "all are gone")
        assert swarmed.http.get("/health").json()["missing"] == ["No worker is there."]
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: swarmed.http.get("/health").status_code == 200, "they are back")
    assert swarmed.http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_killed_worker_costs_no_request_and_changes_none(tmp_path: Path) -> None:
    """What `benchmarks/serve.py` does, on processes that start in no time."""
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "tiny", **benchmark.SIZES)
    benchmark.say_something(folder)
    asked = benchmark.requests(30, seed=0)
    uncut = benchmark.Uncut(folder)
    wanted = [uncut.answer(each) for each in asked]
    options = Namespace(clients=10, kill_every_requests=20, seed=0)
    with volunteers(("first", "second", "spare"), WORKER, tmp_path) as (client, workers):
        arguments = ["--model", folder, "--scheduler", client.scheduler.address, "--port", "0"]
        arguments += ["--stages", "2", "--max-queue", "10", "--no-prefix-reuse"]
        swarm = benchmark.Swarm(client, list(workers.values()))
        with started(arguments, tmp_path / "serve.log") as (url, process):
            disturbed = asyncio.run(
                benchmark.phase(url, process.pid, swarm, asked, options, kills=True)
            )
            found = benchmark.summary(disturbed, wanted)
            assert (found["kills"], found["lost"], found["wrong"]) == (1, 0, 0), found["errors"]
            left = [n for held in swarm.sessions().values() for n in held.values()]
            assert sum(left) == 0


@pytest.mark.slow
def test_a_short_run_of_the_benchmark_finds_nothing_lost_or_wrong(tmp_path: Path) -> None:
    """Its clients are many, and all of its processes start as people start them."""
    command = [sys.executable, REPOSITORY / "benchmarks" / "serve.py", "--part", "kills"]
    command += ["--requests", "30", "--clients", "10", "--stages", "2", "--spares", "1"]
    command += ["--kill-every-requests", "20", "--to", tmp_path]
    found = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    disturbed = json.loads((tmp_path / "serve.json").read_text())["kills"]
    assert (disturbed["kills"], disturbed["lost"], disturbed["wrong"]) == (1, 0, 0)
