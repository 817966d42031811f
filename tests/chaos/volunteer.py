"""A worker's process: dask's own, with an ear at every task.

Each task of a stage is noted in a file when it begins and when it ends, and the harness is asked at
its beginning if the script has something for it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker
from distributed.cli.dask_worker import main as dask_worker

from chaos.faults import Fault, InTask
from dagflow_tasks.program.interpreter import Executable
from dagflow_tasks.train import call as calling
from dagflow_tasks.train import replay
from dagflow_tasks.train.arguments import Arguments
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import StageRef

COMPUTING = ("forward", "backward", "weight_gradients", "forward_backward", "update")
REBUILDING = "restore"
REPLAYING = "replay"
GO_ON = "go on"


class FanFellOff(RuntimeError):
    """What an exception in a task is called here."""


class Instruments:
    """Notes what a worker's process does, and does to it what the script says."""

    def __init__(self, log: Path, ask: Connection, moments: frozenset[InTask]) -> None:
        self._file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._ask = ask
        self._moments = moments
        self._lock = threading.Lock()
        self._spoiled = threading.local()

    def install(self) -> None:
        """Stand between dask and dagflow's tasks."""
        call, replay_step, run = calling.call, replay.replay_step, Executable.run

        def listening(function: Callable[..., Any], layout: Any, *results: Any) -> Any:
            place = _place(function, layout)
            if place is None:
                return call(function, layout, *results)
            return self._noted(place, lambda: call(function, layout, *results))

        def listening_replay(ref: StageRef, record: Any, *more: Any) -> None:
            place = (REPLAYING, record.step, ref.stage, 0)
            self._noted(place, lambda: replay_step(ref, record, *more))

        def spoiling(executable: Executable, *arguments: Any) -> Any:
            outputs = run(executable, *arguments)
            return self._spoil(outputs)

        calling.call = listening
        replay.replay_step = listening_replay
        Executable.run = spoiling  # type: ignore[method-assign, assignment]

    def _noted(self, place: tuple[str, int, int, int], work: Callable[[], Any]) -> Any:
        recomputed = CACHE.recomputed
        self._note("begin", place, _attempt())
        try:
            self._suffer(place)
            result = work()
        except BaseException as error:
            self._note("failed", place, repr(error))
            raise
        finally:
            self._spoiled.how = None
        self._note("end", place, CACHE.recomputed - recomputed)
        return result

    def _note(self, phase: str, place: tuple[str, int, int, int], more: Any) -> None:
        # One write, past every buffer: it is there, whole, when the process is killed.
        line = json.dumps([time.monotonic(), phase, *place, more]) + "\n"
        os.write(self._file, line.encode())

    def _suffer(self, place: tuple[str, int, int, int]) -> None:
        if place[0] not in (REBUILDING, REPLAYING) and InTask(*place) not in self._moments:
            return
        with self._lock:
            self._ask.send(place)
            order = self._ask.recv()
        if order is Fault.EXCEPTION:
            raise FanFellOff(f"in {place}")
        if order is Fault.OUT_OF_MEMORY:
            torch.empty(1 << 50)
        self._spoiled.how = order

    def _spoil(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        how = getattr(self._spoiled, "how", None)
        if how is Fault.NOT_FINITE:
            return {n: t * torch.nan if t.is_floating_point() else t for n, t in outputs.items()}
        if how is Fault.WRONG_SHAPE:
            return {n: t[..., :-1] if t.dim() else t[None] for n, t in outputs.items()}
        return outputs


def _attempt() -> str:
    """Return which attempt at the run the task at hand belongs to, as its key says."""
    name: str = get_worker().get_current_task()[0]
    return name.rpartition("-")[2]


def _place(function: Callable[..., Any], layout: Any) -> tuple[str, int, int, int] | None:
    """Return what is computed, if it is work of a stage: function, step, stage, micro-batch."""
    name = getattr(function, "__name__", "")
    if name == REBUILDING:
        return name, int(layout[1]), layout[0].stage, 0
    if name not in COMPUTING:
        return None
    work = layout[0]
    assert isinstance(work, Arguments)
    step, index = work.place
    return name, step, work.ref.stage, index


def volunteer(
    address: str, name: str, folder: Path, ask: Connection, moments: frozenset[InTask]
) -> None:
    """Run ``dask worker`` as a volunteer would, until it is told to go or killed."""
    Instruments(folder / f"{name}.tasks", ask, moments).install()
    arguments = [address, "--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    arguments += ["--memory-limit", "0", "--local-directory", str(folder / "scratch")]
    arguments += ["--preload", "dagflow.worker", "--torch-threads", "1"]
    dask_worker(arguments)
