"""`dagflow serve` under fire: many clients, and a worker killed every so often.

    python benchmarks/serve.py [--part undisturbed kills] [--requests 1000] [--kill-every 10]

A scheduler, volunteers (`dagflow join`, which starts a killed worker again) and `dagflow serve` are
processes of this machine. The model is a Llama of random weights, hidden 64, 6 layers. Requests are
chats of random words and lengths; half are streamed, half are sampled with a seed, the others greedy.
They are asked twice over: first undisturbed, then with SIGKILL for the worker of a random stage every
so often. Each answer is compared with that of the uncut model in this process (transformers, its own
cache). *lost* are requests without a whole answer, *wrong* those with another one.

The exit status is 1 if anything was lost, wrong, or left behind on a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent / "tests" / "server"))

import httpx
import numpy as np
import psutil
import torch
from common import RESULTS, write_results
from distributed import Client
from openai import AsyncOpenAI
from tiny import save_tiny

from dagflow.server.conversation import to_prompt
from dagflow.serving.sampling import Sampling
from dagflow.serving.stage_server import sessions_open

PARTS = ("undisturbed", "kills")
BIN = Path(sys.executable).parent
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
TEXT = "a machine leaves the stage and another comes back with every token of its last volunteer"
START_SECONDS = 120.0
# A request without an end by then is lost: it would wait for ever.
LOST_SECONDS = 300.0
SAMPLE_SECONDS = 2.0
# What a worker's memory does while it starts says nothing about what it does afterwards.
YOUNG_SECONDS = 20.0


# What is asked, and what must come of it


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    is_streamed: bool

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]


def requests(count: int, seed: int) -> list[Asked]:
    chance, words = random.Random(seed), TEXT.split()
    return [
        Asked(
            prompt=" ".join(chance.choices(words, k=chance.randint(1, 40))),
            max_tokens=chance.randint(4, 64),
            temperature=number // 2 % 2 * chance.uniform(0.5, 1.0),
            seed=chance.getrandbits(31),
            is_streamed=number % 2 == 0,
        )
        for number in range(count)
    ]


class Uncut:
    """The model in this process."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @torch.inference_mode()
    def answer(self, asked: Asked) -> str:
        sampling = Sampling(temperature=asked.temperature, seed=asked.seed)
        tokens, _ = to_prompt(self.tokenizer, asked.messages)
        feed, cache, begin = tokens, None, len(tokens)
        for _ in range(asked.max_tokens):
            found = self.model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            token = sampling.choose(found.logits[0, -1].float(), tokens)
            if token == self.tokenizer.eos_token_id:
                break
            tokens, feed = [*tokens, token], [token]
        return self.tokenizer.decode(tokens[begin:], skip_special_tokens=True)


def say_something(folder: Path) -> None:
    """Scale a model's weights up, so that what it says depends on what it was told."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)


# Processes


@contextlib.contextmanager
def started(command: Sequence[Any], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process, and end all that it has started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [str(part) for part in command],
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
            **options,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Swarm:
    """Volunteers of a scheduler, and who of them has which stage."""

    def __init__(self, client: Client, joined: Sequence[subprocess.Popen[str]]) -> None:
        self._client = client
        self._joined = joined

    def sessions(self) -> dict[str, dict[tuple[str, int], int]]:
        """How many sessions each stage on each worker has, by the worker's address."""
        return self._client.run(sessions_open, on_error="ignore")

    def kill(self, chance: random.Random) -> str | None:
        """Kill the worker of a random stage, the whole process group; return its address."""
        busy = sorted(
            (stage, address)
            for address, found in self.sessions().items()
            for (_, stage), count in found.items()
            if count
        )
        if not busy:
            return None
        stage = chance.choice(sorted({stage for stage, _ in busy}))
        address = chance.choice([a for s, a in busy if s == stage])
        pids = self._client.run(os.getpid, workers=[address], on_error="ignore")
        if address not in pids:
            return None
        os.killpg(os.getpgid(pids[address]), signal.SIGKILL)
        return address

    def memory(self) -> dict[int, int]:
        """Return the resident bytes of each worker by its process id."""
        found = {}
        for process in self._joined:
            with contextlib.suppress(psutil.Error, ValueError):
                children = psutil.Process(process.pid).children(recursive=True)
                worker = max(children, key=lambda child: child.memory_info().rss)
                found[worker.pid] = worker.memory_info().rss
        return found


@contextlib.contextmanager
def volunteers(count: int, folder: Path) -> Iterator[tuple[str, Swarm]]:
    """Yield a scheduler's address, and the volunteers that have joined it."""
    with contextlib.ExitStack() as stack:
        place = folder / "scheduler.json"
        command = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0"]
        command += ["--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(place)]
        stack.enter_context(started(command, folder / "scheduler.log"))
        wait_until(place.exists, "a scheduler")
        address = json.loads(place.read_text())["address"]
        joined = []
        for number in range(count):
            command = [BIN / "dagflow", "join", address, "--name", f"volunteer-{number}"]
            command += ["--torch-threads", "1"]
            joined.append(stack.enter_context(started(command, folder / f"volunteer-{number}.log")))
        try:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(count, timeout=START_SECONDS)
                yield address, Swarm(client, joined)
        finally:
            for process in joined:  # all at once
                process.terminate()


@contextlib.contextmanager
def served(
    folder: Path, address: str, options: argparse.Namespace
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Yield the URL of a server, and its process."""
    command = [BIN / "dagflow", "serve", "--model", folder / "tiny", "--store", folder / "store"]
    command += ["--scheduler", address, "--stages", options.stages, "--port", 0]
    command += ["--max-running", options.max_running, "--max-queue", options.clients]
    # So that what is left on workers at the end is a leak, and nothing that was kept for others.
    command.append("--no-prefix-reuse")
    with started(command, folder / "serve.log", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"(http://\S+)/v1", said)
        if found is None:
            raise RuntimeError(said + (folder / "serve.log").read_text())
        noting = subprocess.Popen(
            ["cat"], stdin=process.stdout, stdout=(folder / "notes.log").open("w")
        )
        try:
            yield found[1], process
        finally:
            noting.kill()
            noting.wait()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {START_SECONDS:g} s")
        time.sleep(0.1)


# Clients


@dataclass
class Told:
    """What came of a request: text, and when it came, in seconds since the request was sent."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str | None = None


async def ask(client: AsyncOpenAI, asked: Asked) -> Told:
    told = Told()
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(LOST_SECONDS):
            await _ask(client, asked, told, begin)
    except Exception as error:
        told.error = f"{type(error).__name__}: {error}"
    told.seconds = time.perf_counter() - begin
    if told.error is None and told.finish_reason is None:
        told.error = "It broke off."
    return told


async def _ask(client: AsyncOpenAI, asked: Asked, told: Told, begin: float) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": asked.messages,
        "max_completion_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
    }
    if not asked.is_streamed:
        whole = await client.chat.completions.create(**options)
        told.text = whole.choices[0].message.content
        told.finish_reason = whole.choices[0].finish_reason
        told.num_tokens = whole.usage.completion_tokens
        return
    stream = await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    async for piece in stream:
        for choice in piece.choices:
            if choice.delta.content:
                told.times.append(time.perf_counter() - begin)
                told.text += choice.delta.content
            told.finish_reason = choice.finish_reason or told.finish_reason
        if piece.usage is not None:
            told.num_tokens = piece.usage.completion_tokens


async def ask_all(
    url: str, asked: Sequence[Asked], num_clients: int, answered: Callable[[], None]
) -> list[Told]:
    """Ask all, so many at a time, each by a client of its own."""
    told: dict[int, Told] = {}
    left = iter(enumerate(asked))

    async def one() -> None:
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=None
        ) as client:
            for number, each in left:
                told[number] = await ask(client, each)
                answered()

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return [told[number] for number in range(len(asked))]


# A phase: all requests, with kills or without


@dataclass
class Phase:
    """What was seen while all requests were asked."""

    told: list[Told]
    seconds: float
    killed: list[float]
    server_bytes: list[tuple[float, int]]
    worker_bytes: dict[int, list[tuple[float, int]]]


async def phase(
    url: str,
    server: int,
    swarm: Swarm,
    asked: Sequence[Asked],
    options: argparse.Namespace,
    kills: bool,
) -> Phase:
    begin = time.perf_counter()
    found = Phase([], 0.0, [], [], {})
    num_answered = itertools.count(1)
    is_due = asyncio.Event()

    def answered() -> None:
        if options.kill_every_requests and next(num_answered) % options.kill_every_requests == 0:
            is_due.set()

    async def due() -> AsyncIterator[None]:
        while True:
            if options.kill_every_requests:
                await is_due.wait()
                is_due.clear()
            else:
                await asyncio.sleep(options.kill_every)
            yield

    async def kill() -> None:
        chance = random.Random(options.seed)
        async for _ in due():
            if await asyncio.to_thread(swarm.kill, chance) is not None:
                found.killed.append(time.perf_counter() - begin)

    async def watch() -> None:
        process = psutil.Process(server)
        while True:
            now = time.perf_counter() - begin
            found.server_bytes.append((now, process.memory_info().rss))
            for pid, size in (await asyncio.to_thread(swarm.memory)).items():
                found.worker_bytes.setdefault(pid, []).append((now, size))
            await asyncio.sleep(SAMPLE_SECONDS)

    others = [asyncio.create_task(each()) for each in ([watch, kill] if kills else [watch])]
    try:
        found.told = await ask_all(url, asked, options.clients, answered)
        found.seconds = time.perf_counter() - begin
    finally:
        for other in others:
            other.cancel()
        for ended in await asyncio.gather(*others, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise ended
    return found


# Report


def summary(found: Phase, wanted: Sequence[str]) -> dict[str, Any]:
    told = found.told
    streams = [t for t in told if t.times]
    gaps = [b - a for t in streams for a, b in itertools.pairwise(t.times)]
    return {
        "requests": len(told),
        "lost": sum(t.error is not None for t in told),
        "wrong": sum(t.error is None and t.text != w for t, w in zip(told, wanted, strict=True)),
        "kills": len(found.killed),
        "seconds": found.seconds,
        "tokens_per_second": sum(t.num_tokens for t in told) / found.seconds,
        "first_token_seconds": percentiles([t.times[0] for t in streams]),
        "whole_seconds": percentiles([t.seconds for t in told]),
        "gap_seconds": percentiles(gaps),
        "server_mb": growth(found.server_bytes),
        "worker_mb": largest_growth(found.worker_bytes.values()),
        "errors": sorted({t.error for t in told if t.error is not None}),
        "killed_at": found.killed,
        "server_bytes": found.server_bytes,
        "worker_bytes": list(found.worker_bytes.values()),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    named = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: float(np.percentile(values, share)) for name, share in named.items()}


def growth(series: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Megabytes, as the mean of the first and of the last tenth of what was seen, and the most."""
    sizes = [size / 1e6 for _, size in series]
    tenth = max(1, len(sizes) // 10)
    return {
        "first": float(np.mean(sizes[:tenth])),
        "last": float(np.mean(sizes[-tenth:])),
        "most": max(sizes),
    }


def largest_growth(lives: Iterable[Sequence[tuple[float, int]]]) -> dict[str, float]:
    """Growth of the worker that grew most, once it was no longer young; empty if all died young."""
    grown = [life for life in map(without_youth, lives) if len(life) >= 10]
    return max(map(growth, grown), key=lambda one: one["last"] - one["first"], default={})


def without_youth(life: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    return [(when, size) for when, size in life if when - life[0][0] > YOUNG_SECONDS]


def show(name: str, found: dict[str, Any]) -> None:
    counts = "  ".join(f"{key} {found[key]}" for key in ("requests", "lost", "wrong", "kills"))
    print(f"{name}: {counts}  {found['tokens_per_second']:.0f} tokens/s")
    for key in ("first_token_seconds", "whole_seconds", "gap_seconds", "server_mb", "worker_mb"):
        cells = "  ".join(f"{part} {value:9.3f}" for part, value in found[key].items())
        print(f"  {key:20} {cells}")
    for error in found["errors"]:
        print(f"  lost: {error}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    save_tiny(folder / "tiny", **SIZES)
    say_something(folder / "tiny")
    asked = requests(options.requests, options.seed)
    uncut = Uncut(folder / "tiny")
    wanted = [uncut.answer(each) for each in asked]
    with (
        volunteers(options.stages + options.spares, folder) as (address, swarm),
        served(folder, address, options) as (url, server),
    ):
        document: dict[str, Any] = {}
        for name in options.part:
            found = asyncio.run(phase(url, server.pid, swarm, asked, options, name == "kills"))
            document[name] = summary(found, wanted)
            show(name, document[name])
            for a, t, w in zip(asked, found.told, wanted, strict=True):
                if t.error is None and t.text != w:
                    print(f"  wrong: {a}\n    told   {t.text!r}\n    wanted {w!r}")
        if options.part == list(PARTS):
            before, after = (document[name]["tokens_per_second"] for name in PARTS)
            print(f"with kills: {after / before:.3f} of the undisturbed speed")
            document["kills_of_undisturbed"] = after / before
        document["health"] = httpx.get(f"{url}/health").json()
        document["sessions_left"] = sum(
            count for found in swarm.sessions().values() for count in found.values()
        )
        print(f"sessions left on workers: {document['sessions_left']}")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--spares", type=int, default=3)
    parser.add_argument("--max-running", type=int, default=8, help="Of `dagflow serve`.")
    parser.add_argument("--kill-every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument(
        "--kill-every-requests", type=int, metavar="N", help="Count answers instead of seconds."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--logs", type=Path, help="Keep the processes' logs in this folder.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        document = measure(folder, options)
    chosen = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
    write_results("serve", {**document, "options": chosen}, folder=options.to)
    bad = any(document[name]["lost"] or document[name]["wrong"] for name in options.part)
    return int(bad or document["sessions_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
