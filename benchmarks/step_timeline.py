"""Where each second of a training step goes, worker by worker.

Trains the throughput benchmark's GPT on two embedded workers, reads dask's task stream, and prints
for each worker the seconds a step that it spends on every kind of task, in the pipeline's bubble,
and idle beyond it. The bubble is that of the timetable simulated with the measured durations.

    python benchmarks/step_timeline.py [--stages 4 --microbatches 32] [--precision bf16]
"""

from __future__ import annotations

import argparse
import ast
import itertools
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from common import write_results
from workload import Workload

import dagflow
from dagflow.plan.plan import Plan
from dagflow.plan.schedule import one_forward_one_backward
from dagflow.swarm.clusters import ClusterSettings, open_cluster
from dagflow_storage import Store

NUM_WORKERS = 2
PIPELINE = ("forward", "backward", "weights")


@dataclass(frozen=True)
class Span:
    """One task on a worker's thread."""

    worker: str
    kind: str
    step: int
    stage: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def train(workload: Workload) -> tuple[list[Span], list[float], Plan]:
    """Return what ran, the clock at the end of each step, and the plan."""
    ends: list[float] = []

    def at_step_end(event: dagflow.StepEvent) -> None:
        ends.append(time.time())

    with (
        tempfile.TemporaryDirectory() as folder,
        open_cluster(None, ClusterSettings(NUM_WORKERS), Store(folder)) as client,
    ):
        client.get_task_stream(count=0)  # from here on the scheduler keeps one
        begin = time.time()
        result = dagflow.train(
            workload.model(),
            list(workload.batches()),
            optimizer=dagflow.Optimizer("AdamW", **workload.optimizer_options()),
            num_stages=workload.num_stages,
            num_microbatches=workload.num_microbatches,
            precision=workload.precision,
            snapshot_every=None,
            store=f"{folder}/run",
            client=client,
            progress=False,
            callbacks=[at_step_end],
        )
        spans = [s for entry in client.get_task_stream(start=begin) for s in _spans(entry)]
    return spans, ends, result.plan


def _spans(entry: dict[str, Any]) -> list[Span]:
    key = entry["key"]
    kind, step, stage, *_ = ast.literal_eval(key) if isinstance(key, str) else key
    return [
        Span(entry["worker"], kind.partition("-")[0], step, stage, part["start"], part["stop"])
        for part in entry["startstops"]
        if part["action"] == "compute"
    ]


def ideal_seconds(spans: list[Span], plan: Plan) -> float:
    """Return the length of a step whose tasks take what they took and messages no time."""
    by_kind: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in spans:
        by_kind[span.kind, span.stage].append(span.seconds)
    costs = []
    for stage in range(plan.num_stages):
        kinds = [by_kind[kind, stage] for kind in ("backward", "weights")]
        backward = sum(map(sum, kinds)) / len(kinds[0])
        forward = mean(by_kind.get(("forward", stage), [backward / 3]))
        last = stage == plan.num_stages - 1
        costs.append((forward, backward - forward if last else backward))
    return one_forward_one_backward(
        plan.placement, plan.num_microbatches, plan.limits, plan.halved, costs
    ).length


def account(workload: Workload, spans: list[Span], ends: list[float], plan: Plan) -> list[Any]:
    """Return a row for each worker: seconds a step by what they were spent on."""
    first, last = workload.num_warmup_steps, workload.num_steps
    num_steps = last - first
    timed = [span for span in spans if first <= span.step < last and span.kind != "save"]
    period = (ends[-1] - ends[first - 1]) / num_steps
    ideal = ideal_seconds(timed, plan)
    rows = []
    for worker in sorted({span.worker for span in timed if span.kind in PIPELINE}):
        own = sorted((s for s in timed if s.worker == worker), key=lambda span: span.begin)
        busy = Counter[str]()
        for span in own:
            busy[span.kind if span.kind in PIPELINE else "other"] += span.seconds / num_steps
        waits = [max(0.0, after.begin - before.end) for before, after in itertools.pairwise(own)]
        tasks = len(own) / num_steps
        rows.append(
            {
                "stages": sorted({s.stage for s in own if s.kind in PIPELINE}),
                "step_s": round(period, 3),
                **{kind: round(busy[kind], 3) for kind in (*PIPELINE, "other")},
                "bubble_s": round(ideal - sum(busy.values()), 3),
                "beyond_s": round(period - ideal, 3),
                "tasks": round(tasks, 1),
                "beyond_ms_a_task": round(1e3 * (period - ideal) / tasks, 2),
                "median_wait_ms": round(1e3 * median(waits), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    workload = Workload(
        num_stages=options.stages,
        num_microbatches=options.microbatches,
        precision=options.precision,
        num_warmup_steps=2,
        num_timed_steps=options.steps,
    )
    spans, ends, plan = train(workload)
    rows = account(workload, spans, ends, plan)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    name = (
        f"{workload.precision}_{workload.num_stages}stages_{workload.num_microbatches}microbatches"
    )
    measured = {"workload": asdict(workload), "rows": rows}
    write_results("step_timeline", measured, f"step_timeline_{name}")


if __name__ == "__main__":
    main()
