"""What grows with a run or a model, and how much: one section each, a table, and JSON.

::

    python benchmarks/growth.py                    every section
    python benchmarks/growth.py scheduler --json growth.json
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from distributed import Client

import dagflow

# A scheduler's memory is looked at from here on: its logs of bounded length are full by then.
FIRST_STEP, LAST_STEP, EVERY_STEPS = 1000, 3000, 500
NUM_OPERATORS, NUM_STAGES = 3000, 64


@dataclass(frozen=True)
class Growth:
    """One figure, and the most that it may be."""

    what: str
    value: float
    unit: str
    most: float


def scheduler() -> list[Growth]:
    """Train in tiny steps, and weigh the scheduler's process meanwhile."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    batch = (torch.ones(4, 4), torch.zeros(4, 4))
    seen: dict[int, tuple[int, int]] = {}
    with (
        swarm() as (address, process),
        tempfile.TemporaryDirectory() as folder,
        Client(address, set_as_default=False) as client,
    ):

        def weigh(event: dagflow.StepEvent) -> None:
            if event.step % EVERY_STEPS == 0:
                client.run_on_scheduler(gc.collect)
                objects = client.run_on_scheduler(num_objects)
                seen[event.step] = (process.memory_full_info().uss, objects)

        dagflow.train(
            model,
            [batch] * LAST_STEP,
            loss=torch.nn.functional.mse_loss,
            client=address,
            store=folder,
            num_stages=2,
            num_microbatches=2,
            callbacks=[weigh],
            progress=False,
        )
    for step, (num_bytes, objects) in sorted(seen.items()):
        print(f"step {step}: {num_bytes / 1e6:.2f} MB, {objects} objects", file=sys.stderr)
    first, last = seen[FIRST_STEP], seen[LAST_STEP]
    steps = LAST_STEP - FIRST_STEP
    return [
        Growth("scheduler's memory", (last[0] - first[0]) / 1000 / steps, "KB a step", 1.0),
        Growth("scheduler's objects", (last[1] - first[1]) / steps, "a step", 1.0),
    ]


def num_objects() -> int:
    """Return how many objects a process has that the garbage collector knows."""
    return len(gc.get_objects())


@contextmanager
def swarm() -> Iterator[tuple[str, psutil.Process]]:
    """Yield the address of a scheduler with a worker, each a process of its own, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "dask"]
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL}
    listen = ["--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show"]
    work = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--preload", "dagflow.worker"]
    processes = [subprocess.Popen([*dask, "scheduler", *listen], **quiet)]
    try:
        processes.append(subprocess.Popen([*dask, "worker", address, *work], **quiet))
        yield address, psutil.Process(processes[0].pid)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def partition() -> list[Growth]:
    """Export and cut a long chain of operators, and one of twice the length."""
    program = str(Path(__file__).with_name("growth_partition.py"))
    rows = []
    for num_operators in (NUM_OPERATORS // 2, NUM_OPERATORS):
        command = [sys.executable, program, str(num_operators), str(NUM_STAGES)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr)
    half, whole = rows
    # Of next to nothing the double is noise.
    memory = max(whole["peak_megabytes"], 1.0) / max(half["peak_megabytes"], 1.0)
    return [
        Growth("cutting", whole["partition_to_export"], "x export", 0.2),
        Growth("its memory, operators doubled", memory, "x", 2.5),
    ]


SECTIONS: dict[str, Callable[[], list[Growth]]] = {"scheduler": scheduler, "partition": partition}


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, and return 1 if anything grows more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    found = {name: SECTIONS[name]() for name in options.sections or SECTIONS}
    for name, rows in found.items():
        for row in rows:
            mark = "ok" if row.value <= row.most else "TOO MUCH"
            print(
                f"{name:12} {row.what:28} {row.value:10.3f} {row.unit:12} <= {row.most:g}  {mark}"
            )
    if options.json is not None:
        figures = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(row.value > row.most for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
