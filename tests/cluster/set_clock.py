"""A worker on a machine whose clock somebody sets while it works."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

from processes import dask_worker

_ahead_seconds = 0.0


def worker(arguments: Sequence[str]) -> None:
    """Run ``dask worker`` in this process; dask and tornado read a clock that can be set."""
    import set_clock  # what workers are asked to run is imported by its name

    real = time.time

    def now() -> float:
        return real() + set_clock._ahead_seconds

    time.time = now
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "distributed" and getattr(module, "time", None) is real:
            module.time = now  # type: ignore[attr-defined]
    dask_worker(arguments)


async def set_while_sending(seconds: float, dask_worker: Any) -> None:
    """Set a worker's clock at the worst time: just after a message, with another that waits.

    dask still counts the pause until the next one then.
    """
    global _ahead_seconds
    stream = dask_worker.batched_stream
    num_sent = stream.batch_count
    stream.send({"op": "keep-alive"})
    while stream.batch_count == num_sent:
        await asyncio.sleep(0)
    _ahead_seconds += seconds
    stream.send({"op": "keep-alive"})
