"""How much memory and time a program may take on this machine.

A program's first run with new sizes is watched: before each operator it is calculated what the result
can take, and afterwards what is alive is counted, what autograd keeps included. Runs with the same sizes
take the same, and aren't watched, unless something is as large as its data says (selected rows). A single
operator isn't interrupted: what it works on is limited by the memory.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from dagflow_tasks.errors import LimitReached
from dagflow_tasks.program.result_bytes import is_sized_by_data, most_bytes

# A stage's part of a micro-batch takes seconds; whoever takes this long has been given up by the swarm.
DEFAULT_SECONDS = 1800.0


@dataclass(frozen=True)
class Limits:
    """What a run of a program may take.

    Attributes
    ----------
    memory_bytes : int | None
        Beyond what it is given; None for nine tenths of what the device has free when it begins.
    seconds : float
        After which no further operator is begun.
    """

    memory_bytes: int | None = None
    seconds: float = DEFAULT_SECONDS

    def memory_on(self, device: torch.device) -> int:
        """Return how many bytes a run that begins now may take."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return free_bytes(device) * 9 // 10  # others live here, too

    def deadline(self) -> float:
        """Return when a run that begins now has to have begun its last operator (`time.monotonic`)."""
        return time.monotonic() + self.seconds


DEFAULT_LIMITS = Limits()


def free_bytes(device: torch.device) -> int:
    """Return what a device could still give: of a CPU its memory and swap, or its container's share."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)  # torch keeps what was freed
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    return min([free, *_left_in_container()])


def _left_in_container() -> Iterator[int]:
    """Yield what Linux's control groups leave, as a container shows its own (version 2, then 1)."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((Path("/sys/fs/cgroup") / name).read_text() for name in (limit, used))
        except OSError:
            continue
        if most.strip().isdecimal():
            # What files' pages take is given back; it is counted as used.
            yield max(0, int(most) - int(now)) + _cached_bytes()


def _cached_bytes() -> int:
    try:
        rows = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(n) for name, n in map(str.split, rows) if name in ("inactive_file", "active_file")
    )


class Watch:
    """Counts what a run has made that is still alive, and refuses what would be too much.

    Parameters
    ----------
    limit_bytes : int

    Attributes
    ----------
    is_of_data : bool
        Whether a result was as large as its data said: another run may take more.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.is_of_data = False
        self._limit = limit_bytes
        self._alive = 0
        self._known: dict[int, Any] = {}

    def before(self, op: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
        """Refuse an operator whose result doesn't fit.

        Raises
        ------
        LimitReached
        """
        self.is_of_data = self.is_of_data or is_sized_by_data(op, arguments)
        most = most_bytes(op, arguments, keywords)
        if self._alive + most > self._limit:
            raise LimitReached(
                f"its result may take {most / 1e6:.0f} MB, beside {self._alive / 1e6:.0f} MB that are "
                f"in use, of {self._limit / 1e6:.0f} MB that there are. Make the batch smaller, or "
                "cut the model into more stages"
            )

    def after(self, result: Any) -> None:
        """Count a result's memory, until nobody holds it any more."""
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                num_bytes = storage.nbytes()
                self._alive += num_bytes
                # torch keeps a storage's Python object for as long as the storage itself.
                self._known[key] = weakref.ref(storage, partial(self._freed, key, num_bytes))

    def given(self, values: Sequence[Any]) -> None:
        """Pass over what a run is given: it is there already."""
        for tensor in values:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._known.setdefault(tensor.untyped_storage()._cdata, None)

    def _freed(self, key: int, num_bytes: int, _: Any) -> None:
        self._alive -= num_bytes
        self._known.pop(key, None)
