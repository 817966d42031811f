"""What benchmarks share: the peak of a process's memory, an S3 server, a file for what was measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@contextlib.contextmanager
def peak_extra_bytes() -> Iterator[list[int]]:
    """Put the most memory that was taken inside on the list yielded."""
    found: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmRSS")
    yield found
    found.append(_status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


@contextlib.contextmanager
def radosgw() -> Iterator[Any]:
    """Yield an S3 server that is started on this machine, as the tests do; see tests/s3_server.py."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from s3_server import radosgw_running

    with (
        tempfile.TemporaryDirectory() as folder,
        radosgw_running(Path(folder) / "radosgw") as server,
    ):
        yield server


def write_results(
    benchmark: str, measured: Mapping[str, Any], name: str = "", folder: Path = RESULTS
) -> None:
    """Write what was measured, when and on what, as JSON to a file of the benchmark's name or another."""
    document = {
        "benchmark": benchmark,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "processor": _processor(),
            "num_cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load": os.getloadavg(),
        },
        **measured,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or benchmark}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten: {path}")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
