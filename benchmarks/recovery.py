"""What a lost worker costs, and what being ready for it costs when nothing happens.

Three parts, each on real processes of this machine (the harness of tests/chaos):

- latency: seconds from SIGKILL to the next task of that stage, with a warm spare, and with a worker
  that has just been switched on; split into what they are spent on;
- goodput: useful over total computing time with a worker killed every so often, with the journal, and
  without, where every loss sends the run back to its newest snapshot;
- overhead: throughput with journal and snapshots against none.

    python benchmarks/recovery.py [--part latency goodput overhead overhead_s3]

``overhead_s3`` is done when it is named: it starts Ceph's radosgw on this machine (root, `make s3-server`),
which takes its share of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent / "tests"))

import psutil
from chaos import accounting
from chaos.accounting import COMPUTING, Execution
from chaos.driving import Recipe, Size
from chaos.faults import AfterStep, Extent, Fault, Incident
from chaos.harness import Harness, Outcome
from common import radosgw, write_results
from workload import Timing, Workload

import dagflow
from dagflow.swarm.clusters import ClusterSettings, open_cluster
from dagflow_storage import Store

PARTS = ("detection", "placing", "reading", "replay", "first_task")
SIZE = Size(width=256, num_layers=8, num_heads=4, context=128)


@dataclass(frozen=True)
class Recovery:
    """Seconds from the end of one worker to its stage's next task, by what they were spent on."""

    detection: float
    placing: float
    reading: float
    replay: float
    first_task: float
    num_replayed: int

    @property
    def total(self) -> float:
        return self.detection + self.placing + self.reading + self.replay + self.first_task


# Latency


def latencies(*, cold: bool, num_kills: int) -> list[Recovery]:
    """Kill the worker of one stage after the other, and time what follows.

    Cold means that there is one worker, with all stages, and another one that is switched on when
    it is killed: nobody else could take its stages meanwhile.
    """
    steps = [6 + 7 * n for n in range(num_kills)]
    extent = Extent(num_steps=steps[-1] + 6)
    recipe = Recipe(extent, SIZE, options={"snapshot_every": 10})
    kills = [
        Incident(n, Fault.KILL, AfterStep(step), (n % extent.num_stages,))
        for n, step in enumerate(steps)
    ]
    with tempfile.TemporaryDirectory() as folder:
        volunteers = 1 if cold else extent.num_stages + 1
        harness = Harness(Path(folder), recipe, kills, num_volunteers=volunteers, cold=cold)
        outcome = harness.run()
        notes = _notes(Path(folder) / "driver.log")
        return [_recovery(outcome, notes, n, kills[n].stages[0]) for n in range(num_kills)]


def _notes(log: Path) -> list[tuple[float, str]]:
    text = log.read_text(errors="replace")
    return [(float(t), said) for t, said in re.findall(r"^\[([\d.]+)\] (.*)$", text, re.M)]


def _recovery(
    outcome: Outcome, notes: list[tuple[float, str]], number: int, stage: int
) -> Recovery:
    killed = outcome.hits[number].begin
    noticed = _first(notes, killed, r"The worker .* left")
    placed = _first(notes, noticed, r"Rebuilding stage")
    after = [e for e in outcome.executions if e.place[2] == stage and e.end is not None]
    restored = next(e for e in after if e.place[0] == "restore" and e.begin >= placed)
    replays = [
        e for e in after if e.place[0] == "replay" and restored.begin <= e.begin <= _end(restored)
    ]
    first = next(e for e in after if e.place[0] in COMPUTING and e.begin >= _end(restored))
    read = replays[0].begin if replays else _end(restored)
    return Recovery(
        detection=noticed - killed,
        placing=restored.begin - noticed,
        reading=read - restored.begin,
        replay=_end(restored) - read,
        first_task=_end(first) - _end(restored),
        num_replayed=len(replays),
    )


def _first(notes: list[tuple[float, str]], since: float, pattern: str) -> float:
    return next(t for t, said in notes if t >= since and re.match(pattern, said))


def _end(execution: Execution) -> float:
    assert execution.end is not None
    return execution.end


# Goodput


def goodput(*, every_seconds: float, journal: bool, num_steps: int) -> dict[str, Any]:
    """Train with a worker killed every so often, each of which comes back at once."""
    options = {"snapshot_every": 10, "journal": journal}
    recipe = Recipe(Extent(num_steps=num_steps), SIZE, options=options)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), recipe, kill_every_seconds=every_seconds)
        outcome = harness.run()
    begin = min(e.begin for e in outcome.executions)
    end = max(e.end for e in outcome.executions if e.end is not None)
    return {
        "goodput": accounting.useful_share(outcome.executions),
        "seconds": end - begin,
        "kills": len(outcome.hits),
        "steps_repeated": outcome.steps_repeated,
    }


# Overhead


def overhead(store: str, rounds: int) -> dict[str, Any]:
    """Return tokens per second with and without journal and snapshots, taking turns.

    On S3 the server works on the same cores as those who train; its part of them is told apart.
    """
    workload = Workload(num_layers=8, width=256, num_warmup_steps=5, num_timed_steps=40)
    with_both = {"journal": True, "snapshot_every": 20}
    without = {"journal": False, "snapshot_every": None}
    rates: dict[str, list[float]] = {"with": [], "without": []}
    servers: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds):
        turns = [("with", with_both), ("without", without)]
        for name, options in turns if number % 2 == 0 else turns[::-1]:
            rate, server = _tokens_per_second(workload, store, options)
            rates[name].append(rate)
            servers[name].append(server)
            print(f"  {name:8} {rate:8.0f} tokens/s", flush=True)
    pairs = list(zip(rates["with"], rates["without"], strict=True))
    return {
        "tokens_per_second": rates,
        "cost": 1 - median(a / b for a, b in pairs),
        "cost_of_rounds": [1 - a / b for a, b in pairs],
        "server_share_of_cores": {name: median(shares) for name, shares in servers.items()},
        "workload": asdict(workload),
    }


def _tokens_per_second(
    workload: Workload, store: str, options: dict[str, Any]
) -> tuple[float, float]:
    """Return the rate, and the part of the machine's cores that a server of S3 took meanwhile."""
    ends: list[float] = []
    worked: list[float] = []

    def end_step(_: dagflow.StepEvent) -> None:
        ends.append(time.perf_counter())
        worked.append(_server_seconds())

    place = f"{store.rstrip('/')}/{uuid.uuid4().hex[:8]}"
    with open_cluster(None, ClusterSettings(2), Store(place)) as client:
        result = dagflow.train(
            workload.model(),
            list(workload.batches()),
            optimizer=dagflow.Optimizer("AdamW", **workload.optimizer_options()),
            num_stages=workload.num_stages,
            num_microbatches=workload.num_microbatches,
            store=place,
            client=client,
            progress=False,
            callbacks=[end_step],
            **options,
        )
    Store(store).delete(place.rpartition("/")[2])
    seconds = Timing.from_ends(workload, result.losses, ends).seconds
    # The mean: a median of steps doesn't see a pause every twenty.
    share = (worked[-1] - worked[0]) / (ends[-1] - ends[0]) / (os.cpu_count() or 1)
    return workload.tokens_per_step * len(seconds) / sum(seconds), share


def _server_seconds() -> float:
    """Return the processor time of the S3 server so far."""
    total = 0.0
    for process in psutil.process_iter(["name", "cpu_times"]):
        if process.info["name"] in ("ceph-osd", "ceph-mon", "radosgw"):
            total += process.info["cpu_times"].user + process.info["cpu_times"].system
    return total


# Report


def show_latency(name: str, found: list[Recovery]) -> dict[str, Any]:
    """Print a line of medians, and return everything."""
    medians = {part: median(getattr(r, part) for r in found) for part in PARTS}
    total = median(r.total for r in found)
    beyond = median(r.total - r.reading - r.replay for r in found)
    cells = "  ".join(f"{part} {seconds:.3f}" for part, seconds in medians.items())
    print(f"{name:5} {cells}  total {total:.3f}  beyond reading and replay {beyond:.3f} s")
    return {"medians": medians, "total": total, "each": [asdict(r) for r in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ("latency", "goodput", "overhead", "overhead_s3")
    parser.add_argument("--part", nargs="+", choices=every, default=list(every[:3]))
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measures = {
        "latency": lambda: {
            name: show_latency(name, latencies(cold=name == "cold", num_kills=options.kills))
            for name in ("warm", "cold")
        },
        "goodput": lambda: measure_goodput(options.steps),
        "overhead": lambda: measure_overhead("folder", options.rounds),
        "overhead_s3": lambda: measure_overhead("s3", options.rounds),
    }
    for part in options.part:
        measured = {"size": asdict(SIZE), **measures[part]()}
        write_results("recovery", measured, f"recovery_{part}")


def measure_goodput(num_steps: int) -> dict[str, Any]:
    """Print and return a table of goodputs."""
    found = {}
    for every in (10.0, 30.0):
        of_kind = {}
        for name, journal in (("journal", True), ("from_snapshot", False)):
            of_kind[name] = goodput(every_seconds=every, journal=journal, num_steps=num_steps)
            told = "  ".join(f"{k} {round(v, 3)}" for k, v in of_kind[name].items())
            print(f"a kill every {every:.0f} s, {name:13} {told}", flush=True)
        ratio = of_kind["from_snapshot"]["seconds"] / of_kind["journal"]["seconds"]
        print(f"  {ratio:.2f} times as fast as from the snapshot")
        found[f"every_{every:.0f}_s"] = {**of_kind, "speedup": ratio}
    return found


def measure_overhead(kind: str, rounds: int) -> dict[str, Any]:
    """Print and return what journal and snapshots cost, on a store of some kind."""
    with bucket() if kind == "s3" else tempfile.TemporaryDirectory() as url:
        found = overhead(url, rounds)
    servers = found["server_share_of_cores"]
    print(f"journal and snapshots cost {found['cost']:.1%} on {kind}")
    if kind == "s3":
        print(f"  the server takes {servers['with'] - servers['without']:.1%} of the cores for it")
    return found


@contextlib.contextmanager
def bucket() -> Iterator[str]:
    """Yield the URL of a bucket on a radosgw of this machine, whose keys are in the environment."""
    with radosgw() as server:
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint_url,
            "AWS_ACCESS_KEY_ID": server.key,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield server.new_store().url


if __name__ == "__main__":
    main()
