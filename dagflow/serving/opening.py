"""Has one worker open one stage: a dask task that reads the weights and leaves the stage on the worker."""

from __future__ import annotations

import asyncio

from distributed import Client, Future

from dagflow.serving.stage_server import StageSpec, open_stage
from dagflow.swarm.links import CommClosedError, Link


async def opened(client: Client, spec: StageSpec, address: str, link: Link) -> Future:
    """Return the task that has opened a stage; the stage is there for as long as somebody holds it.

    Raises
    ------
    CommClosedError
        If the worker leaves meanwhile.
    """
    future = client.submit(
        open_stage, spec, key=spec.opening, workers=[address], pure=False, retries=0
    )
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    waiting = [asyncio.ensure_future(event.wait()) for event in (ended, link.closed)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waiting:
            wait.cancel()
    if link.closed.is_set() or future.status in ("lost", "cancelled"):
        raise CommClosedError(f"The worker {address} left while it opened stage {spec.stage}.")
    if future.status == "error":
        raise await loop.run_in_executor(None, future.exception)
    return future
