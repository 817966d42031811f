"""What joining machines cost a run that is on: a hundred at once, and one that comes and goes.

Both parts train a GPT of two stages on two worker processes of this machine, with a journal and snapshots.

- crowd: a hundred workers join at once. The longest time between two steps from then on, against the
  median step before.
- flapping: a worker joins and is killed, again every two seconds. Tokens/s with and without it, in turn.

    python benchmarks/joining.py [--part crowd flapping]

The hundred are dask workers in one process: a hundred with torch each are too many for a small machine.
Each has the preload, the plugins and the memory of a volunteer's, so the driver takes them for spares, and
those it chooses read stages' weights. The process has imported everything before, and it and the flapping
worker, a copy of a process that has, run with the lowest priority: at home they would have processors of
their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent / "tests"))

from chaos import warm
from common import write_results
from distributed import Client, LocalCluster, Worker
from distributed.cli.dask_worker import main as dask_worker
from workload import Workload

import dagflow

# A step takes about half a second of both cores.
SMALL = Workload(num_layers=4, width=256, context=128)
NUM_JOINING = 100
STEPS_BEFORE, STEPS_AFTER = 12, 25
FLAP_SECONDS = 2.0
WORKER_BYTES = 2 << 30
_LOWEST_PRIORITY = 19


@contextlib.contextmanager
def two_workers() -> Iterator[Client]:
    """Yield a client of a scheduler in this process, with two workers of one thread each."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=WORKER_BYTES, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def train(workload: Workload, client: Client, on_step: Callable[[Any], None]) -> None:
    """Train on the client's workers, with a snapshot every ten steps."""
    with tempfile.TemporaryDirectory() as folder:
        dagflow.train(
            workload.model(),
            list(workload.batches()),
            optimizer=dagflow.Optimizer("AdamW", **workload.optimizer_options()),
            num_stages=workload.num_stages,
            num_microbatches=workload.num_microbatches,
            store=folder,
            client=client,
            progress=False,
            snapshot_every=10,
            callbacks=[on_step],
            config=dagflow.Config(check=False),
        )


# A crowd


def join_all(address: str, turn: Connection) -> None:
    """Wait for a word, then have all workers join; say when they have, and wait for another to leave."""
    os.nice(_LOWEST_PRIORITY)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    asyncio.run(_join_all(address, turn))


async def _join_all(address: str, turn: Connection) -> None:
    turn.send("ready")
    await asyncio.to_thread(turn.recv)
    workers = [
        Worker(
            address,
            nthreads=1,
            name=f"joining-{number}",
            memory_limit=WORKER_BYTES,
            dashboard=False,
            preload=["dagflow.worker"],
        )
        for number in range(NUM_JOINING)
    ]
    await asyncio.gather(*workers)
    turn.send(time.perf_counter())
    await asyncio.to_thread(turn.recv)
    await asyncio.gather(*(worker.close() for worker in workers))


def crowd(workload: Workload) -> dict[str, Any]:
    """Return the seconds of each step before and after a hundred workers begin to join."""
    ends: list[float] = []
    with two_workers() as client:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        joining = context.Process(target=join_all, args=(client.scheduler.address, theirs))
        joining.start()
        ours.recv()
        began: list[float] = []

        def on_step(event: dagflow.StepEvent) -> None:
            ends.append(time.perf_counter())
            if event.step == STEPS_BEFORE:
                began.append(time.perf_counter())
                ours.send("join")

        try:
            train(workload, client, on_step)
            joined = ours.recv()
        finally:
            ours.send("leave")
            joining.join()
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    before = seconds[workload.num_warmup_steps - 1 : STEPS_BEFORE - 1]
    after = seconds[STEPS_BEFORE - 1 :]
    if joined > ends[-1]:
        raise RuntimeError("The run was over before all had joined.")
    return {
        "seconds_to_join": joined - began[0],
        "step_seconds": median(before),
        "longest_gap_before": max(before),
        "longest_gap_after": max(after),
        "gap_in_steps": max(after) / median(before),
        "before": before,
        "after": after,
    }


# A worker that flaps


def flapping_worker(address: str, folder: str, number: int) -> None:
    os.nice(_LOWEST_PRIORITY)
    arguments = [address, "--name", f"flapping-{number}", "--nthreads", "1", "--no-nanny"]
    arguments += ["--no-dashboard", "--memory-limit", str(WORKER_BYTES)]
    arguments += [
        "--local-directory",
        folder,
        "--preload",
        "dagflow.worker",
        "--torch-threads",
        "1",
    ]
    dask_worker(arguments)


@contextlib.contextmanager
def flapping(address: str) -> Iterator[list[int]]:
    """Have a worker join and be killed, again and again; yield a list of one number for each time."""
    is_over = threading.Event()
    times: list[int] = []

    def flap(folder: str) -> None:
        while not is_over.is_set():
            log = Path(folder, "log")
            process = warm.start(flapping_worker, log, address, folder, len(times))
            is_over.wait(FLAP_SECONDS)
            process.kill()
            process.join()
            times.append(len(times))

    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=flap, args=(folder,))
        thread.start()
        try:
            yield times
        finally:
            is_over.set()
            thread.join()


def tokens_per_second(workload: Workload, client: Client) -> float:
    """Return the rate of the timed steps: of their sum, as a median sees no pause."""
    ends: list[float] = []
    train(workload, client, lambda _: ends.append(time.perf_counter()))
    seconds = ends[-1] - ends[workload.num_warmup_steps - 1]
    return workload.tokens_per_step * workload.num_timed_steps / seconds


def flaps(workload: Workload, num_rounds: int) -> dict[str, Any]:
    """Return rates with and without a worker that flaps, in turn."""
    warm.warm()
    rates: dict[str, list[float]] = {"with": [], "without": []}
    num_flaps = 0
    with two_workers() as client:
        tokens_per_second(workload, client)  # the first run in a process is slower
        for number in range(num_rounds):
            for name in ("with", "without") if number % 2 == 0 else ("without", "with"):
                if name == "with":
                    with flapping(client.scheduler.address) as times:
                        rates[name].append(tokens_per_second(workload, client))
                    num_flaps += len(times)
                else:
                    rates[name].append(tokens_per_second(workload, client))
                print(f"  {name:8} {rates[name][-1]:8.0f} tokens/s", flush=True)
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    return {
        "tokens_per_second": rates,
        "num_flaps": num_flaps,
        "cost_of_rounds": [1 - ratio for ratio in ratios],
        "cost": 1 - median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", nargs="+", choices=("crowd", "flapping"), default=["crowd", "flapping"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if "crowd" in options.part:
        write_results("joining", measure_crowd(options.rounds), "joining_crowd")
    if "flapping" in options.part:
        write_results("joining", measure_flapping(options.rounds), "joining_flapping")


def measure_crowd(num_rounds: int) -> dict[str, Any]:
    """Print a line for each round, and return all."""
    steps = STEPS_BEFORE + STEPS_AFTER
    workload = replace(SMALL, num_timed_steps=steps - SMALL.num_warmup_steps)
    rounds = []
    print(f"{NUM_JOINING} workers join at once")
    for _ in range(num_rounds):
        found = crowd(workload)
        rounds.append(found)
        print(
            f"  joined in {found['seconds_to_join']:.1f} s; a step {found['step_seconds']:.3f} s, the "
            f"longest {found['longest_gap_before']:.3f} s before, {found['longest_gap_after']:.3f} s "
            f"after: {found['gap_in_steps']:.2f} steps",
            flush=True,
        )
    worst = max(found["gap_in_steps"] for found in rounds)
    print(f"the longest gap is {worst:.2f} steps")
    return {"gap_in_steps": worst, "rounds": rounds, "workload": asdict(workload)}


def measure_flapping(num_rounds: int) -> dict[str, Any]:
    """Print the rate of each run, and return all."""
    workload = replace(SMALL, width=128, num_timed_steps=30)
    print(f"a worker joins and is killed every {FLAP_SECONDS:g} s")
    found = flaps(workload, num_rounds)
    print(f"it costs {found['cost']:.1%}, with {found['num_flaps']} of them")
    return {**found, "workload": asdict(workload)}


if __name__ == "__main__":
    main()
