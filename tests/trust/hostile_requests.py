"""A server under hostile requests: does it answer, stay small, and hold up nobody?

    python -m tests.trust.hostile_requests [--requests 100000] [--seed 0] [--json FILE]

Starts `dagflow serve` with a tiny model and two keys, and sends requests that were changed in all ways
(`request_mutations`), many at a time. Meanwhile others hold connections open, send bodies that never
end, with a key and without; streams run; and a process of its own asks for ``/health`` on a new
connection each time, and next to it a bare server of a few lines, which shows what the machine adds. So
does how long the server's thread that hears requests waited for a core.

The exit status is 1 if the server answered 5xx, reset a connection or left it without an answer, broke a
stream off, logged an error, took more memory than it may, or let ``/health`` wait longer than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "server")]

import psutil
from request_mutations import KEYS, attack, request

PATIENCE_SECONDS = 40.0
_PAUSE_SECONDS = 0.01
_POLL_SECONDS = 0.05
NUM_UNFINISHED, NUM_IDLE, NUM_STREAMS = 40, 200, 3


@dataclass
class Found:
    """What came of all attacks.

    Attributes
    ----------
    statuses : Counter
        By kind of attack and status; 0 for a connection that was closed without one.
    wrong : list of str
        What must not be: the first of each kind of attack and outcome.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    num_streams: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return self.statuses.total()


async def attack_all(port: int, count: int, seed: int, num_clients: int = 16) -> Found:
    """Send so many attacks, while streams run and others hold connections."""
    found = Found()
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await _attack(port, random.Random(f"{seed}/{number}"), number, found)

    holding = [asyncio.create_task(_hold(port, n)) for n in range(NUM_UNFINISHED + NUM_IDLE)]
    ended = asyncio.Event()
    streams = [asyncio.create_task(_stream(port, found, ended)) for _ in range(NUM_STREAMS)]
    try:
        await asyncio.gather(*(client() for _ in range(num_clients)))
        ended.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*streams)
    finally:
        for task in [*holding, *streams]:
            task.cancel()
        results = await asyncio.gather(*holding, *streams, return_exceptions=True)
    for error in results:
        if isinstance(error, Exception):
            raise error
    return found


async def _attack(port: int, chance: random.Random, number: int, found: Found) -> None:
    each = attack(chance)
    status = 0
    try:
        async with asyncio.timeout(PATIENCE_SECONDS if each.is_whole else 0.2):
            status = await _sent(port, each.pieces)
    except TimeoutError:
        if each.is_whole:
            found.wrong[f"{each.kind}: no answer (attack {number})"] += 1
    except OSError as error:
        found.wrong[f"{each.kind}: {type(error).__name__} (attack {number})"] += 1
    found.statuses[each.kind, status] += 1
    if status >= 500 or (status == 0 and each.is_whole):
        found.wrong[f"{each.kind}: answered {status} (attack {number})"] += 1


async def _sent(port: int, pieces: tuple[bytes, ...]) -> int:
    """Send an attack, read until the answer's end, and return its status; 0 for none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if piece is not pieces[-1]:
                await asyncio.sleep(_PAUSE_SECONDS)
        line = await reader.readline()
        if not line:
            return 0
        status = int(line.split()[1])
        length, is_chunked = 0, False
        while (line := (await reader.readline()).lower()).strip():
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
            is_chunked |= line.startswith(b"transfer-encoding: chunked")
        if is_chunked:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        elif not pieces[0].startswith(b"HEAD"):
            await reader.readexactly(length)
        return status
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("broken off") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _hold(port: int, number: int) -> None:
    """Hold a connection open for ever: idle, or in a head or body that never ends."""
    chance = random.Random(number)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if number < NUM_UNFINISHED:
                    key = KEYS[0] if number % 2 else "wrong"
                    changed = {"Content_Length": "9000000", "Authorization": f"Bearer {key}"}
                    writer.write(request(chance, "/v1/completions", b" " * 2**17, **changed))
                elif number % 2:
                    writer.write(b"GET /health HT")
                await reader.read()
            finally:
                writer.close()
        await asyncio.sleep(0.1)


async def _stream(port: int, found: Found, ended: asyncio.Event) -> None:
    """Read one stream after the other until it is ended; each comes whole, or is refused for want of room."""
    body = {
        "model": "tiny",
        "prompt": "Stages",
        "max_tokens": 64,
        "stream": True,
        "temperature": 1.2,
    }
    data = json.dumps({**body, "logit_bias": {"0": -100}}).encode()
    while not ended.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request(random.Random(0), "/v1/completions", data, Connection="close"))
            told, last = b"", time.perf_counter()
            while part := await reader.read(2**16):
                now = time.perf_counter()
                found.gaps.append(now - last)
                told, last = told + part, now
        except OSError:
            told = b"HTTP/1.1 0"
        finally:
            writer.close()
        status = int(told.split()[1]) if told else 0
        if status == 200 and b"data: [DONE]" in told:
            found.num_streams += 1
        elif status != 429:
            found.wrong[f"a stream broke off ({status})"] += 1
        await asyncio.sleep(0.01)


# How long others wait


def poll(ports: dict[str, int], ended: Any, told: Any) -> None:
    """Ask servers in turn until it is ended, and tell how many seconds each answer took."""
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    while not ended.wait(_POLL_SECONDS):
        for name, port in ports.items():
            begin = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as client:
                client.sendall(
                    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                answer = b""
                while part := client.recv(2**16):
                    answer += part
            is_well = answer.startswith(b"HTTP/1.1 200")
            seconds[name].append(time.perf_counter() - begin if is_well else float("inf"))
    told.put(seconds)


def bare_server(told: Any) -> None:
    """Answer everything with 200, as little as can be."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        told.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def polled(port: int) -> Iterator[dict[str, list[float]]]:
    """Poll a server's health while the block runs; what was measured is there at its end."""
    context = multiprocessing.get_context("spawn")
    ended, told = context.Event(), context.Queue()
    bare = context.Process(target=bare_server, args=(told,), daemon=True)
    bare.start()
    ports = {"health": port, "bare server": told.get(timeout=60)}
    poller = context.Process(target=poll, args=(ports, ended, told), daemon=True)
    poller.start()
    measured: dict[str, list[float]] = {}
    try:
        yield measured
        ended.set()
        measured.update(told.get(timeout=60))
    finally:
        for process in (bare, poller):
            process.kill()
            process.join()


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Measure a process's resident bytes ten times a second while the block runs."""
    process, ended = psutil.Process(pid), threading.Event()
    measured = [process.memory_info().rss]

    def watch() -> None:
        while not ended.wait(0.1):
            with suppress(psutil.Error):
                measured.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield measured
    finally:
        ended.set()
        thread.join()


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the port and process id of a server of a tiny model, as people start it; it logs to a file."""
    from tiny import save_tiny

    command: list[str | Path] = [Path(sys.executable).parent / "dagflow", "serve", "--port", "0"]
    command += ["--model", save_tiny(folder / "tiny"), "--store", folder / "store", "--no-check"]
    command += ["--workers", "1", "--max-queue", "256"]
    for key in KEYS:
        command += ["--api-key", key]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = re.search(r"http://[^/]*:(\d+)/v1", said)
        if url is None:
            raise RuntimeError(said + (folder / "log").read_text())
        yield int(url[1]), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"It ended with {process.returncode}.")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its workers
        process.wait()


def thread_seconds(pid: int) -> tuple[float, float]:
    """Return how long a process's first thread has computed, and waited for a core to compute on.

    Both are 0 where the system doesn't say (Linux does).
    """
    try:
        computed, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    except OSError:
        return 0.0, 0.0
    return int(computed) / 1e9, int(waited) / 1e9


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return milliseconds: the median, what 99 and 99.9 of a hundred are below, and the most."""
    ordered = sorted(seconds) or [float("nan")]
    places = {"median": 0.5, "p99": 0.99, "p99.9": 0.999, "most": 1.0}
    last = len(ordered) - 1
    return {name: 1000 * ordered[round(share * last)] for name, share in places.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--most-megabytes", type=int, default=256, help="by which it may grow")
    parser.add_argument("--most-milliseconds", type=float, default=100.0, help="of /health")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        with served(Path(temporary)) as (port, pid):
            begin, before = time.perf_counter(), thread_seconds(pid)
            with polled(port) as measured, watched(pid) as sizes:
                attacking = attack_all(port, options.requests, options.seed, options.clients)
                found = asyncio.run(attacking)
            seconds = time.perf_counter() - begin
            computed, waited = (b - a for a, b in zip(before, thread_seconds(pid), strict=True))
            end_bytes = psutil.Process(pid).memory_info().rss
        if said := Path(temporary, "log").read_text():
            print(said, file=sys.stderr)
            found.wrong["the server has logged errors"] += 1
    figures = {
        "requests": found.num_requests,
        "seconds": seconds,
        "requests_per_second": found.num_requests / seconds,
        "thread_computed_seconds": computed,
        "thread_waited_for_a_core_seconds": waited,
        "statuses": {
            str(status): sum(n for (_, s), n in found.statuses.items() if s == status)
            for status in sorted({status for _, status in found.statuses})
        },
        "by_kind": {f"{kind} {status}": n for (kind, status), n in sorted(found.statuses.items())},
        "streams": found.num_streams,
        "gap_milliseconds": percentiles(found.gaps),
        **{f"{name}_milliseconds": percentiles(told) for name, told in measured.items()},
        "health_polls": len(measured["health"]),
        "health_polls_above": sum(
            1000 * told > options.most_milliseconds for told in measured["health"]
        ),
        "megabytes": {
            "before": sizes[0] / 2**20,
            "most": max(sizes) / 2**20,
            "after": end_bytes / 2**20,
        },
        "wrong": dict(found.wrong),
    }
    for name, value in figures.items():
        print(f"{name:28} {json.dumps(value) if isinstance(value, dict) else value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    grown = max(sizes) - sizes[0] > options.most_megabytes * 2**20
    slow = bool(figures["health_polls_above"])
    for is_so, what in ((grown, "took more memory"), (slow, "let /health wait longer")):
        if is_so:
            print(f"The server {what} than it may.")
    return int(bool(found.wrong) or grown or slow)


if __name__ == "__main__":
    sys.exit(main())
