"""Peak memory of each worker against what the plan says that its stages take.

Trains the throughput benchmark's GPT on two workers, with snapshots written meanwhile, and compares
every worker's peak, beyond what Python and torch take before the run, with what
`dagflow.plan.memory` counts for all its stages: weights, gradients, the optimizer's moments, the
copy for a snapshot, what waits for the journal, and activations.

    python benchmarks/worker_memory.py [--optimizers SGD AdamW] [--adapters 0 8] [--stages 1 2 4]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from common import write_results
from torch import nn
from workload import Workload

import dagflow
from dagflow.plan.memory import bytes_by_worker
from dagflow.plan.plan import Plan
from dagflow.swarm.allocator import allocator_path
from dagflow.swarm.clusters import ClusterSettings, open_cluster, scheduler_info
from dagflow_storage import Store

_NUM_WORKERS = 2
_SNAPSHOT_EVERY = 2
_OPTIONS = {"SGD": {"lr": 0.01}, "AdamW": {"lr": 3e-4}}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes
    ----------
    adapter_rank : int
        0 trains all weights; otherwise those of low-rank adapters beside frozen ones.
    stages_a_worker : int
    """

    workload: Workload
    optimizer: str
    adapter_rank: int
    stages_a_worker: int

    def model(self) -> nn.Module:
        model = self.workload.model()
        return with_adapters(model, self.adapter_rank) if self.adapter_rank else model


class Adapted(nn.Module):
    """A frozen linear layer and a product of two narrow ones that is trained (LoRA, 2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = self.frozen(hidden) + self.up(self.down(hidden))
        return adapted


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model, and put an adapter beside each of its linear layers."""
    model.requires_grad_(False)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        model.set_submodule(name, Adapted(linear, rank))
    return model


def planned_bytes(plan: Plan) -> dict[str, float]:
    """Return what the plan says of each worker, by name."""
    totals = bytes_by_worker(plan.needs, plan.placement)
    return {plan.workers[worker]: total for worker, total in totals.items()}


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    # Not getrusage's ru_maxrss: that begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


def measure(case: Case, steps: int) -> list[dict[str, Any]]:
    """Train, and return a row for each worker."""
    workload = case.workload
    with (
        tempfile.TemporaryDirectory() as folder,
        open_cluster(None, ClusterSettings(_NUM_WORKERS), Store(folder)) as client,
    ):
        options: dict[str, Any] = {
            "client": client,
            "progress": False,
            "optimizer": dagflow.Optimizer(case.optimizer, **_OPTIONS[case.optimizer]),
            "snapshot_every": _SNAPSHOT_EVERY,
        }
        # A first run of a small model of the same kind loads the code, torch's kernels included, that
        # any such run loads.
        tiny = replace(workload, num_layers=2, width=64, num_heads=2, num_microbatches=2)
        small = replace(case, workload=tiny)
        data = [next(iter(tiny.batches()))]
        dagflow.train(
            small.model(),
            data,
            steps=_SNAPSHOT_EVERY,
            num_microbatches=2,
            num_stages=_NUM_WORKERS,
            store=f"{folder}/small",
            **options,
        )
        before = client.run(_resident)
        result = dagflow.train(
            case.model(),
            [next(iter(workload.batches()))],
            steps=steps,
            num_microbatches=workload.num_microbatches,
            num_stages=_NUM_WORKERS * case.stages_a_worker,
            store=f"{folder}/run",
            **options,
        )
        peak = client.run(_peak)
        info = scheduler_info(client)["workers"]
        address_of = {str(worker["name"]): address for address, worker in info.items()}
    rows = []
    for name, planned in planned_bytes(result.plan).items():
        address = address_of[name]
        used = peak[address] - before[address]
        rows.append(
            {
                "optimizer": case.optimizer,
                "adapter_rank": case.adapter_rank,
                "stages": case.stages_a_worker,
                "worker": name,
                "planned_mb": round(planned / 1e6),
                "peak_mb": round(used / 1e6),
                "ratio": round(used / planned, 3),
                "before_mb": round(before[address] / 1e6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "AdamW"], choices=_OPTIONS)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 8], help="ranks; 0: none")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4], help="of each worker")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    workload = Workload(num_stages=_NUM_WORKERS, num_microbatches=options.microbatches)
    rows = []
    for optimizer, rank, stages in product(options.optimizers, options.adapters, options.stages):
        found = measure(Case(workload, optimizer, rank, stages), options.steps)
        for row in found:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows += found
    write_results(
        "worker_memory", {"allocator": Path(allocator_path() or "libc").name, "rows": rows}
    )


if __name__ == "__main__":
    main()
