"""How long a step's graph takes to build and hand over, and what it costs the scheduler.

One step of 64 stages and 256 micro-batches, for workers that don't exist, so that nothing runs: the
time is that of building the graph, sending it, and the scheduler taking it in.

    python benchmarks/graph_scale.py [--stages 64] [--microbatches 256]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import dask
import psutil
import torch
from common import write_results
from distributed import Client
from torch import nn

import dagflow
from dagflow.plan.plan import Plan
from dagflow.training.dask_tasks import Places, Priorities
from dagflow.training.step_graph import StepGraph
from dagflow.training.step_inputs import StepInputs
from dagflow_storage import Store
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.optimizer import Optimizer
from dagflow_tasks.train.references import Microbatch, StageRef, TaskSettings


def deep_model(num_stages: int) -> nn.Module:
    layers = [layer for _ in range(num_stages) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers)


def step_graph(num_stages: int, num_microbatches: int) -> tuple[StepGraph, Plan]:
    """Return the builder for a chain of stages, each on a worker of its own."""
    batch = (torch.randn(4, 8), torch.randn(4, 8))
    dag = dagflow.capture(deep_model(num_stages), batch, loss=nn.functional.mse_loss)
    cut = dagflow.partition(dag, num_stages)
    settings = TaskSettings(0, "fp32", Optimizer("AdamW", lr=1e-3))
    refs = [StageRef(Store("runs/none"), "run", "plan", s, settings) for s in range(num_stages)]
    plan = Plan.in_turn(cut, [f"worker-{s}" for s in range(num_stages)], num_microbatches)
    graph = StepGraph("0123abcd", cut.programs, refs, plan.limits, plan.halved)
    return graph, plan


def measure(num_stages: int, num_microbatches: int) -> dict[str, Any]:
    graph, plan = step_graph(num_stages, num_microbatches)
    begin = time.perf_counter()
    plan.pipeline.schedule()
    scheduled = time.perf_counter() - begin
    priorities = Priorities(plan.pipeline)
    places = Places([f"tcp://10.0.{s // 250}.{s % 250 + 1}:4000" for s in range(num_stages)])
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", "scheduler", "--port", "0", "--no-dashboard"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "Scheduler at:" in line)
        with Client(address, set_as_default=False) as client:
            # The scheduler imports what the graph is made of when the first one arrives.
            client.run_on_scheduler(_warm_up)
            before = psutil.Process(process.pid).memory_info().rss
            begin = time.perf_counter()
            inputs = StepInputs(
                0,
                tuple(Microbatch(0, m, 1 / num_microbatches) for m in range(num_microbatches)),
                lambda stage, index: TensorDict(),
                1.0,
                first=True,
            )
            dsk = graph.step(inputs)
            built = time.perf_counter() - begin
            with dask.annotate(workers=places, priority=priorities):
                futures = client.get(dsk, [graph.report_key(0)], sync=False)
            known = 0
            while known < len(dsk):
                known = client.run_on_scheduler(_num_tasks)
            handed_over = time.perf_counter() - begin
            after = psutil.Process(process.pid).memory_info().rss
            del futures
    finally:
        process.terminate()
        process.wait()
    return {
        "stages": num_stages,
        "microbatches": num_microbatches,
        "tasks": len(dsk),
        "schedule_seconds": round(scheduled, 2),
        "build_seconds": round(built, 2),
        "build_and_hand_over_seconds": round(handed_over, 2),
        "scheduler_bytes_per_task": round((after - before) / len(dsk)),
    }


def _warm_up() -> None:
    import dagflow.training.step_graph  # noqa: F401


def _num_tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = [measure(options.stages, options.microbatches) for _ in range(options.rounds)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    name = f"graph_scale_{options.stages}x{options.microbatches}"
    write_results("graph_scale", {"rows": rows}, name)


if __name__ == "__main__":
    main()
