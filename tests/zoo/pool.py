"""Tries models in forked processes, each with its own memory and time; nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .case import Case
from .record import Record, short

MEMORY_BYTES = 8 << 30


@dataclass
class _Running:
    case: Case
    process: BaseProcess
    receiver: Connection
    deadline: float
    last: dict[str, Any]


def try_all(
    cases: Sequence[Case], work: Callable[[Case, Record], None], jobs: int, seconds: int
) -> Iterator[dict[str, Any]]:
    """Yield a record for each case, as they come.

    Parameters
    ----------
    jobs
        How many processes at a time.
    seconds
        Of processor time, for each; ten times as much by the clock.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(cases), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(context, waiting.pop(0), work, seconds))
        ready = wait([r.receiver for r in running], timeout=1.0)
        for one in list(running):
            done = _receive(one) if one.receiver in ready else False
            late = time.monotonic() > one.deadline
            if done or late:
                running.remove(one)
                yield _ended(one, late and not done)


def _start(
    context: Any, case: Case, work: Callable[[Case, Record], None], seconds: int
) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, case, work, seconds), daemon=True)
    process.start()
    sender.close()
    last = {"group": case.group, "name": case.name}
    return _Running(case, process, receiver, time.monotonic() + 10 * seconds, last)


def _child(
    sender: Connection, case: Case, work: Callable[[Case, Record], None], seconds: int
) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    record = Record(case.group, case.name, sender.send)
    try:
        work(case, record)
    except BaseException as error:
        record.note(built=record.get("built", False), zoo_failed=short(error))
    sender.send(dict(record) | {"seconds": round(time.process_time(), 1), "done": True})
    sender.close()
    os._exit(0)


def _receive(one: _Running) -> bool:
    """Take what a process has said; True if it has ended."""
    try:
        while one.receiver.poll():
            one.last = one.receiver.recv()
    except EOFError:
        return True
    return bool(one.last.get("done"))


def _ended(one: _Running, late: bool) -> dict[str, Any]:
    if late:
        one.process.kill()
    one.process.join()
    one.receiver.close()
    found = dict(one.last)
    if not found.pop("done", False):
        reason = "took too long" if late or one.process.exitcode in (-9, -24) else "died"
        doing = "serving" if "training" in found else "training"
        found.setdefault("training", "stopped")
        if doing == "serving":
            found["serving"] = "stopped"
        found["stopped"] = f"{reason} (exit code {one.process.exitcode}) while {doing}"
    return found
