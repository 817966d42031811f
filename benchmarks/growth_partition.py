"""One measurement of how long cutting a model takes, in a process of its own: see `growth.py`.

python benchmarks/growth_partition.py OPERATORS STAGES
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from common import peak_extra_bytes
from torch import nn

import dagflow
from dagflow.graph.analysis import DagAnalysis
from dagflow.plan.partition import balanced_cuts
from dagflow.plan.training_memory import TrainingMemory


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


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
