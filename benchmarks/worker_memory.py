"""Peak memory of each worker against what 1F1B needs: weights, gradients, optimizer, activations.

Trains the throughput benchmark's GPT on two workers and compares every worker's peak (beyond what
Python and torch take before the run) with the sum of

- its stage's weights, gradients and AdamW moments, and
- what autograd saves in one micro-batch's forward, measured, times the micro-batches in flight.

    python benchmarks/worker_memory.py [--microbatches 8 64]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from common import write_results
from workload import Workload

import dagflow
from dagflow.plan.schedule import in_flight_limits
from dagflow.run.allocator import allocator_path
from dagflow.run.clusters import ClusterSettings, open_cluster, scheduler_info
from dagflow_storage import Store
from dagflow_tasks.interpreter import Executable, RandomAddress
from dagflow_tasks.program import StageProgram

STATE_COPIES = 4  # weights, gradients, two moments


def saved_bytes(program: StageProgram, values: dict[str, Any], sizes: dict[str, int]) -> int:
    """Return the bytes that autograd keeps after one forward, parameters aside."""
    parameters = {values[use.value].untyped_storage().data_ptr() for use in program.parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = Executable(program, torch.device("cpu")).run(
            values, sizes, RandomAddress(0, 0, 0)
        )
        for tensor in outputs.values():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


def needed_bytes(workload: Workload) -> list[int]:
    """Return what each stage needs by the book."""
    rows, length = workload.rows_per_microbatch, workload.context
    ids = torch.randint(0, workload.vocab_size, (rows, length))
    batch = {"input_ids": ids, "labels": ids.clone()}
    dag = dagflow.capture(workload.model().train(), batch)
    cut = dagflow.partition(dag, workload.num_stages)
    limits = in_flight_limits(workload.num_stages)
    sizes = {s.name: s.hint for s in dag.symbols}
    available: dict[str, Any] = {f"in.{name}": tensor for name, tensor in batch.items()}
    needed = []
    for program, limit in zip(cut.programs, limits, strict=True):
        values = {i.value.name: available[i.value.name] for i in program.inputs}
        values = {
            name: t.detach().requires_grad_(t.is_floating_point()) for name, t in values.items()
        }
        for use in program.parameters:
            values[use.value] = torch.randn(use.shape).mul_(0.02).requires_grad_()
        weights = sum(values[use.value].numel() * 4 for use in program.parameters)
        needed.append(weights * STATE_COPIES + saved_bytes(program, values, sizes) * limit)
        outputs = Executable(program, torch.device("cpu")).run(
            values, sizes, RandomAddress(0, 0, 0)
        )
        available.update({name: tensor.detach() for name, tensor in outputs.items()})
    return needed


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    # Not getrusage's ru_maxrss: that begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024


def measure(workload: Workload, steps: int) -> list[dict[str, Any]]:
    """Train, and return a row for each worker."""
    needed = needed_bytes(workload)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_cluster(None, ClusterSettings(workload.num_stages), Store(folder)) as client,
    ):
        batch = next(iter(workload.batches()))
        options = {"client": client, "progress": False, "num_stages": workload.num_stages}
        # A first run of a small model of the same kind loads the code, torch's kernels included, that
        # any such run loads.
        small = replace(workload, num_layers=2, width=64, num_heads=2, num_microbatches=2)
        data = [next(iter(small.batches()))]
        dagflow.train(small.model(), data, num_microbatches=2, store=f"{folder}/small", **options)
        before = client.run(_resident)
        result = dagflow.train(
            workload.model(),
            [batch],
            steps=steps,
            optimizer=dagflow.Optimizer("AdamW", lr=3e-4),
            num_microbatches=workload.num_microbatches,
            snapshot_every=None,
            store=f"{folder}/run",
            **options,
        )
        peak = client.run(_peak)
        info = scheduler_info(client)["workers"]
        address_of = {str(worker["name"]): address for address, worker in info.items()}
    rows = []
    for stage, name in enumerate(result.plan.workers):
        address = address_of[name]
        used = peak[address] - before[address]
        rows.append(
            {
                "microbatches": workload.num_microbatches,
                "stage": stage,
                "needed_mb": round(needed[stage] / 1e6),
                "peak_mb": round(used / 1e6),
                "ratio": round(used / needed[stage], 3),
                "before_mb": round(before[address] / 1e6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for count in options.microbatches:
        workload = Workload(num_stages=2, num_microbatches=count)
        rows += measure(workload, options.steps)
        for row in rows[-2:]:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    write_results(
        "worker_memory", {"allocator": Path(allocator_path() or "libc").name, "rows": rows}
    )


if __name__ == "__main__":
    main()
