"""How cutting a model grows with its operators, against exporting it.

A chain of layers of the wanted number of operators is exported and cut into 64 stages, each in a
process of its own, whose CPU and peak of memory are taken:

    python benchmarks/growth_partition.py [--operators 3000] [--stages 64]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from common import peak_extra_bytes, write_results
from torch import nn

import dagflow
from dagflow.plan.analysis import DagAnalysis
from dagflow.plan.memory import TrainingMemory
from dagflow.plan.partition import balanced_cuts


class Chain(nn.Module):
    """Residual blocks of ten operators."""

    def __init__(self, num_blocks: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)])
            for _ in range(num_blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, wide, narrow in self.blocks:
            h = torch.tanh(wide(norm(x)) * 0.5)
            x = x + narrow(torch.sigmoid(h) * h + 0.1) * 0.5
        return x


def measure(num_operators: int, num_stages: int) -> dict[str, Any]:
    """Export and cut in this process."""
    model = Chain(num_operators // 10)
    batch = (torch.randn(4, 16), torch.randn(4, 16))
    begin = time.process_time()
    torch.export.export(model, batch[:1], strict=False)
    exported = time.process_time() - begin
    dag = dagflow.capture(model, batch, loss=nn.functional.mse_loss)
    begin = time.process_time()
    with peak_extra_bytes() as peak:
        cut = dagflow.partition(dag, num_stages)
    partitioned = time.process_time() - begin
    analysis = DagAnalysis(dag)
    balanced_cuts(analysis, num_stages, None, TrainingMemory())
    begin = time.process_time()
    balanced_cuts(analysis, num_stages, None, TrainingMemory())
    return {
        "operators": len(dag.nodes),
        "stages": len(cut),
        "export_seconds": round(exported, 2),
        "partition_seconds": round(partitioned, 2),
        "of_these_cuts_seconds": round(time.process_time() - begin, 3),
        "partition_to_export": round(partitioned / exported, 3),
        "peak_megabytes": round(peak[0] / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", type=int, default=3000)
    parser.add_argument("--stages", type=int, default=64)
    parser.add_argument("--here", action="store_true", help="measure once, in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.operators, options.stages)))
        return
    rows = []
    for num_operators in (options.operators // 2, options.operators):
        command = [sys.executable, __file__, "--here", "--operators", str(num_operators)]
        found = subprocess.run(
            [*command, "--stages", str(options.stages)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(found.stdout.splitlines()[-1]))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    growth = rows[1]["peak_megabytes"] / max(rows[0]["peak_megabytes"], 0.1)
    print(f"memory grows by {growth:.2f} when operators double")
    write_results("growth_partition", {"rows": rows, "memory_growth": round(growth, 2)})


if __name__ == "__main__":
    main()
