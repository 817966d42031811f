"""A script that trains until it is interrupted; `test_interrupt.py` runs it.

Arguments: the store, the number of steps, after which step it interrupts itself and its callback
hangs from then on (0: never), and the number of workers.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from small import batches, example, train  # noqa: E402

import dagflow  # noqa: E402


def main(store: str, steps: int, interrupted_after: int, num_workers: int) -> None:
    def on_step(event: dagflow.StepEvent) -> None:
        print(f"step {event.step}", flush=True)
        if event.step == interrupted_after:
            signal.raise_signal(signal.SIGINT)
        elif interrupted_after and event.step > interrupted_after:
            # Many short waits: a signal that comes just before a wait is heeded after it.
            for _ in range(1200):
                threading.Event().wait(0.1)

    torch.set_num_threads(1)
    of = example(dropout=True)
    cluster = dagflow.ClusterSettings(num_workers, num_torch_threads=1)
    train(
        of,
        batches(of, steps),
        store,
        progress=True,
        callbacks=[on_step],
        config=dagflow.Config(cluster=cluster),
    )


if __name__ == "__main__":
    # A shell starts background jobs with Ctrl-C ignored; a terminal's user has it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
