"""Processes that start at once: copies of one that has imported torch, dask and dagflow already."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = ["chaos.warmth"]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS", "MKL_NUM_THREADS")


def start(
    function: Callable[..., None], log: Path, *arguments: Any, cold: bool = False
) -> BaseProcess:
    """Start a process that runs a function, with what it says in a file.

    A cold one imports everything anew, as on a machine that was just switched on.
    """
    context = multiprocessing.get_context("spawn") if cold else warm()
    process = context.Process(target=_begin, args=(function, log, arguments), daemon=True)
    process.start()
    return process


@cache
def warm() -> Any:
    """Start the process that is copied, and return what starts copies of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # It leaves out what it can't import, without a word, and knows this process' path from here.
    path = os.pathsep.join(part for part in sys.path if part)
    with _environment({**dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(function: Callable[..., None], log: Path, arguments: tuple[Any, ...]) -> None:
    os.setsid()  # signals to the harness's group aren't for its swarm
    if sys.platform == "linux":
        # With the process that it is a copy of, which ends with the harness, however that ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    function(*arguments)
