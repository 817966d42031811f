"""Preload that makes a dask worker a dagflow worker.

::

    dask worker tcp://SCHEDULER:8786 --nthreads 1 --preload dagflow.worker

Options go after the preload: ``--preload dagflow.worker --torch-threads 4 --device cuda:0``.
"""

from __future__ import annotations

import logging
import signal
import threading

import click
from distributed import Worker

logger = logging.getLogger("dagflow.worker")


@click.command()
@click.option("--torch-threads", type=int, default=None, help="Threads inside an operator.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, ... or auto.")
def dask_setup(worker: Worker, torch_threads: int | None, device: str) -> None:
    """Prepare the process and the worker; dask calls this when it loads the module."""
    # Here, because the nanny imports this module as well, to check the options: it would need two
    # seconds and 200 MB for torch.
    import torch

    from dagflow.swarm.dask_internals import notice_retirement, num_tasks_at_a_time
    from dagflow.swarm.join import set_retired
    from dagflow.swarm.workers import prepare_process, prepare_worker

    prepare_process(torch_threads, device)
    prepare_worker(worker)
    worker._dagflow_prepared = True
    notice_retirement(worker, set_retired)
    if worker.nanny and threading.current_thread() is threading.main_thread():
        # A terminal sends Ctrl-C to the nanny, too, which then closes this worker. One that was
        # interrupted itself can't be closed any more: the nanny kills it after eight seconds.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (num_tasks := num_tasks_at_a_time(worker)) > 1:
        logger.warning(
            "This worker runs %d tasks at a time; stages want one (--nthreads 1), and torch uses the "
            "other cores inside it.",
            num_tasks,
        )
    logger.info("dagflow worker on %s, %d torch threads", device, torch.get_num_threads())
