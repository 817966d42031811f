"""Preload that makes a dask worker a dagflow worker.

::

    dask worker tcp://SCHEDULER:8786 --nthreads 1 --preload dagflow.worker

Options go after the preload: ``--preload dagflow.worker --torch-threads 4 --device cuda:0``.
"""

from __future__ import annotations

import logging

import click
import torch
from distributed import Worker

from dagflow.run.workers import prepare_process, prepare_worker

logger = logging.getLogger("dagflow.worker")


@click.command()
@click.option("--torch-threads", type=int, default=None, help="Threads inside an operator.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, ... or auto.")
def dask_setup(worker: Worker, torch_threads: int | None, device: str) -> None:
    """Prepare the process and the worker; dask calls this when it loads the module."""
    prepare_process(torch_threads, device)
    prepare_worker(worker)
    worker._dagflow_prepared = True
    if worker.state.nthreads > 1:
        logger.warning(
            "This worker runs %d tasks at a time; stages want one (--nthreads 1), and torch uses the "
            "other cores inside it.",
            worker.state.nthreads,
        )
    logger.info("dagflow worker on %s, %d torch threads", device, torch.get_num_threads())
