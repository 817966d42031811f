"""Feeds hostile inputs to all parsers, each in a process whose memory is capped.

::

    python -m tests.trust.fuzz --inputs 1000000
    python -m tests.trust.fuzz --inputs 20000 --only manifest journal --seed 7

Prints a table: what was let through, and how often each error of ours came. Exits with 1 upon any
other exception, a process that died, or an input that took more than a second; each is shown with the
seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 1.0
MOST_SHOWN = 5
# Above what a process has taken before the first input.
ROOM_BYTES = 2**30
_POSITION_BYTES = 8


def main() -> int:
    options = _options()
    if options.child is not None:
        print(json.dumps(_fuzz(options.child, options.inputs, options.seed, options.position)))
        return 0
    names = _names(options.only)
    shares = _shares(names, options.inputs)
    bad = 0
    print(f"{'parser':<24}{'inputs':>9}{'read':>9}{'slowest':>10}{'CPU':>8}  errors", flush=True)
    for name in names:
        bad += _show(name, shares[name], _run_child(name, shares[name], options.seed))
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--inputs", type=int, default=100_000, help="over all parsers")
    parser.add_argument("--only", nargs="*", default=[], help="names of parsers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--position", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(only: list[str]) -> list[str]:
    from trust.parsers import PARSERS

    if unknown := set(only) - PARSERS.keys():
        sys.exit(f"no parsers: {', '.join(sorted(unknown))}; there are {', '.join(PARSERS)}")
    return only or list(PARSERS)


def _shares(names: list[str], num_inputs: int) -> dict[str, int]:
    from trust.parsers import PARSERS

    weights = {name: PARSERS[name]().weight for name in names}
    total = sum(weights.values())
    return {name: max(1, round(num_inputs * weight / total)) for name, weight in weights.items()}


def _run_child(name: str, num_inputs: int, seed: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as position:
        position.write(bytes(_POSITION_BYTES))
        position.flush()
        command = [sys.executable, "-m", "tests.trust.fuzz", "--child", name]
        command += ["--inputs", str(num_inputs), "--seed", str(seed), "--position", position.name]
        done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        number = int.from_bytes(Path(position.name).read_bytes(), "little")
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        return {"died": f"exit status {done.returncode} at input {number}: {last}"}


def _environment() -> dict[str, str]:
    folders = [ROOT, ROOT / "tasks", ROOT / "storage", ROOT / "tests"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    quiet = {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def _show(name: str, num_inputs: int, found: dict[str, Any]) -> int:
    if "died" in found:
        print(f"{name:<24}{num_inputs:>9}  DIED: {found['died']}", flush=True)
        return 1
    errors = ", ".join(f"{kind} {count}" for kind, count in found["errors"].items())
    print(
        f"{name:<24}{num_inputs:>9}{found['read']:>9}{1000 * found['slowest']:>7.0f} ms"
        f"{found['seconds']:>6.0f} s  {errors}",
        flush=True,
    )
    for bad in found["bad"]:
        print(f"    input {bad['number']}: {bad['what']}", flush=True)
    return int(found["num_bad"])


def _fuzz(name: str, num_inputs: int, seed: int, position: str) -> dict[str, Any]:
    """Read inputs in this process; runs in a child."""
    from trust.parsers import PARSERS

    from dagflow_tasks.limits import RECEIVING

    warnings.simplefilter("ignore")
    parser = PARSERS[name]()
    parser.read(parser.right)
    _cap_memory()
    RECEIVING.num_bytes = ROOM_BYTES // 4
    errors = Counter[str]()
    bad: list[dict[str, Any]] = []
    num_read, num_bad, slowest, begin = 0, 0, 0.0, time.process_time()
    with open(position, "r+b") as file, mmap.mmap(file.fileno(), _POSITION_BYTES) as at:
        for number in range(num_inputs):
            at[:] = number.to_bytes(_POSITION_BYTES, "little")
            given = parser.hostile(random.Random(f"{name} {seed} {number}"))
            what = ""
            started = time.process_time()
            try:
                parser.read(given)
                num_read += 1
            except parser.errors as error:
                errors[type(error).__name__] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                errors[f"FOREIGN {type(error).__name__}"] += 1
                what = "".join(traceback.format_exception(error)[-2:])
            seconds = time.process_time() - started
            slowest = max(slowest, seconds)
            what = what or (f"took {seconds:.1f} s" if seconds > MOST_SECONDS else "")
            if what:
                num_bad += 1
                if len(bad) < MOST_SHOWN:
                    bad.append({"number": number, "what": f"{what} {_shown(given)}"})
    return {
        "read": num_read,
        "errors": dict(errors.most_common()),
        "slowest": slowest,
        "seconds": time.process_time() - begin,
        "num_bad": num_bad,
        "bad": bad,
    }


def _cap_memory() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) < 600 else f"{text[:600]}..."


if __name__ == "__main__":
    sys.exit(main())
