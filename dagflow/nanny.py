"""Preload for a dask worker's nanny: before it closes, the worker hands over what it has.

::

    dask worker tcp://SCHEDULER:8786 --preload dagflow.worker --preload-nanny dagflow.nanny

A nanny that is interrupted just closes its worker, and whatever results only that one had must be
computed again. `dagflow join` loads this, and leaves through it.
"""

from __future__ import annotations

import asyncio
import logging

from distributed import Nanny

from dagflow.swarm.dask_internals import keep_time, registered_worker, retire
from dagflow.swarm.join import when_parent_leaves

logger = logging.getLogger("dagflow.nanny")
# Whoever presses Ctrl-C wants the machine back. Results that take longer are computed again.
HAND_OVER_SECONDS = 10.0


def dask_setup(nanny: Nanny) -> None:
    """Leave when `dagflow join` says so, or has been killed."""
    keep_time(nanny)
    when_parent_leaves(lambda: nanny.loop.add_callback(nanny.close, reason="dagflow-join-leaves"))


async def dask_teardown(nanny: Nanny) -> None:
    """Hand over; dask calls this before it stops the worker."""
    if not nanny.is_alive():
        return  # the worker has ended before
    try:
        async with asyncio.timeout(HAND_OVER_SECONDS):
            # A worker can have results before its nanny has heard that it started.
            address = nanny.worker_address or await registered_worker(nanny)
            if address is not None:
                await retire(nanny, address)
    except (OSError, TimeoutError) as error:
        logger.info("Leaving without handing over: %s", error)
