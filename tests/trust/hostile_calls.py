"""``python -m tests.trust.hostile_calls --calls 100000``: calls all that programs may call, with anything.

Every call is made twice, from the same arguments, with other secrets around them and in memory that is
free. Results that differ know something of what isn't theirs. What is around the arguments must be as it was.
A call that ends the process, or that takes too long, is named, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from dagflow_tasks.program.allow_list import allowed
from dagflow_tasks.program.operators import ASSERTIONS, own_operators, resolve

from .hostile_arguments import Arena, Hostile, formals_of

# Beyond what the process takes by itself.
MEMORY_BYTES = 1 << 29
# Of processor time, for one call: the machine may be busy with other things.
SECONDS = 30.0
# As numbers they are neither large nor alike: a large one hides what is read beside it.
_SECRETS = (struct.pack("<f", 1.7) * 8, struct.pack("<f", -2.3) * 8)
_PERTURB = -6  # glibc's M_PERTURB: what is allocated and freed is filled with a byte
_NOT_FOUND, _LEAK, _WRITE = (
    "",
    "its result depends on memory outside of its tensors",
    ("it wrote outside of its tensors"),
)


@dataclass
class Report:
    """What hostile calls have led to.

    Attributes
    ----------
    calls, returned : int
        How many were made, and how many of them returned a result.
    found : list of (number, operator, what)
        Crashes, calls that took too long, and results that tell of foreign memory.
    """

    calls: int = 0
    returned: int = 0
    found: list[tuple[int, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {self.returned} of them returned a result"]
        lines += [f"call {number}, {op}: {what}" for number, op, what in self.found]
        by_op = Counter((op, what) for _, op, what in self.found)
        lines += [f"{count} x {op}: {what}" for (op, what), count in by_op.most_common()]
        return "\n".join(lines)


def operators() -> list[str]:
    """Return all that programs may call."""
    return sorted((set(allowed()) | set(own_operators())) - ASSERTIONS)


@dataclass(frozen=True)
class Calls:
    """Which calls are made.

    Attributes
    ----------
    calls, first : int
        Numbers from `first` on; each has its operator and, from the seed, its arguments.
    only : str
        Operators with this in their names.
    unfenced : str
        One of torch's operators, in the list or not, called as torch has it.
    """

    calls: int
    seed: int = 0
    only: str = ""
    first: int = 0
    unfenced: str = ""

    @property
    def operators(self) -> list[str]:
        return [self.unfenced] if self.unfenced else [op for op in operators() if self.only in op]

    def command(self, folder: Path, first: int) -> list[str]:
        """Return the command that makes the calls from a number on, in this process' place."""
        given = {**vars(self), "first": first}
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "tests.trust.hostile_calls", "--child", str(folder), *options]


def hostile_calls(
    calls: int, seed: int = 0, only: str = "", first: int = 0, unfenced: str = ""
) -> Report:
    """Make calls in processes of their own, and report what they led to; see `Calls`."""
    report = Report(calls - first)
    asked = Calls(calls, seed, only, first, unfenced)
    with tempfile.TemporaryDirectory() as folder:
        at = first
        while at < calls:
            at = _one_process(Path(folder), at, asked, report)
    return report


def _one_process(folder: Path, first: int, asked: Calls, report: Report) -> int:
    """Run calls from one on until they are done or the process ends; return where to go on."""
    counter, notes = folder / "counter", folder / "notes"
    counter.write_bytes(bytes(16))
    notes.write_text("")
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    command = asked.command(folder, first)
    root = Path(__file__).parents[2]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log)
    last, since, took_too_long = -1, 0.0, False
    while child.poll() is None:
        time.sleep(0.05)
        now, used = int.from_bytes(counter.read_bytes()[:8], "little"), _used_seconds(child.pid)
        if now != last:
            last, since = now, used
        elif used - since > SECONDS:
            took_too_long = True
            child.kill()
            child.wait()
    done = int.from_bytes(counter.read_bytes()[:8], "little")
    report.returned += int.from_bytes(counter.read_bytes()[8:], "little")
    report.found += [tuple(json.loads(line)) for line in notes.read_text().splitlines()]
    if child.returncode == 0:
        return asked.calls
    assert done, f"The process ended with {child.returncode} before its first call."
    if child.returncode == 1:
        raise RuntimeError(f"call {done - 1}: {(folder / 'log').read_text()[-3000:]}")
    what = "took too long" if took_too_long else f"ended the process ({child.returncode})"
    names = asked.operators
    report.found.append((done - 1, names[(done - 1) % len(names)], what))
    return done


def _used_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _child(folder: Path, asked: Calls) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    libc = ctypes.CDLL(None)
    arena = Arena()
    names = asked.operators
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (folder / "counter").open("r+b") as file, (folder / "notes").open("a") as notes:
        counter = mmap.mmap(file.fileno(), 16)
        returned = 0
        for number in range(asked.first, asked.calls):
            counter[:8] = (number + 1).to_bytes(8, "little")
            op = names[number % len(names)]
            drawn = f"{asked.seed}/{number}"
            results = [_call(op, bool(asked.unfenced), drawn, arena, s, libc) for s in _SECRETS]
            what = _verdict(results)
            if what:
                notes.write(json.dumps([number, op, what]) + "\n")
                notes.flush()
            returned += results[0][0] is not None
            counter[8:] = returned.to_bytes(8, "little")


def _verdict(results: list[tuple[list[bytes] | None, bool]]) -> str:
    (first, first_whole), (second, second_whole) = results
    if not (first_whole and second_whole):
        return _WRITE
    return _LEAK if first is not None and second is not None and first != second else _NOT_FOUND


def _call(
    op: str, unfenced: bool, seed: str, arena: Arena, secret: bytes, libc: Any
) -> tuple[list[bytes] | None, bool]:
    """Return the bytes of a call's results, None if it was refused, and whether the arena is whole."""
    arena.fill(secret)
    drawn = Hostile(seed, arena)
    function: Any = _as_torch_has_it(op) if unfenced else resolve(op)
    schema = function._schema if unfenced else None
    arguments, keywords = drawn.arguments(formals_of(op, schema))
    backwards = seed[-1] in "147"
    tensors = [t for t in _tensors([arguments, keywords]) if t.is_floating_point()]
    if backwards:
        for tensor in tensors:
            tensor.requires_grad_()
    torch.manual_seed(7)
    libc.mallopt(_PERTURB, secret[0])
    try:
        result = function(*arguments, **keywords)
        outputs = _tensors(result)
        found = [_bytes(tensor) for tensor in outputs]
        if backwards and any(tensor.requires_grad for tensor in outputs):
            found += _gradients(outputs, tensors)
    except Exception:
        return None, arena.is_whole()
    finally:
        libc.mallopt(_PERTURB, 0)
    return found, arena.is_whole()


def _as_torch_has_it(op: str) -> torch._ops.OpOverload:
    _, packet, overload = op.split(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
    return found


def _gradients(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[bytes]:
    outputs = [t for t in outputs if t.requires_grad and t.numel()]
    ones = [torch.ones_like(t) for t in outputs]
    found = torch.autograd.grad(outputs, inputs, ones, allow_unused=True)
    return [_bytes(gradient) for gradient in found if gradient is not None]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() > 1 << 16:  # most are expanded ones
        return str(tuple(tensor.shape)).encode()
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trust.hostile_calls", description=__doc__
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="operators with this in their names")
    parser.add_argument("--unfenced", default="", help="one operator, as torch has it")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    folder = options.pop("child")
    if folder:
        _child(Path(folder), Calls(**options))
        return
    report = hostile_calls(**options)
    print(report)
    sys.exit(bool(report.found))


if __name__ == "__main__":
    main()
