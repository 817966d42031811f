"""A script that trains until it is interrupted; `test_interrupt.py` runs it.

Arguments: the store, the number of steps, and from which step on its callback hangs (0: never).
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from small import batches, example, train

import dagflow


def main(store: str, steps: int, hangs_at: int) -> None:
    def on_step(event: dagflow.StepEvent) -> None:
        print(f"step {event.step}", flush=True)
        if hangs_at and event.step >= hangs_at:
            threading.Event().wait(120)

    torch.set_num_threads(1)
    of = example(dropout=True)
    cluster = dagflow.ClusterSettings(num_workers=2, num_torch_threads=1)
    train(
        of,
        batches(of, steps),
        store,
        progress=True,
        callbacks=[on_step],
        config=dagflow.Config(cluster=cluster),
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except KeyboardInterrupt:
        sys.exit(130)
