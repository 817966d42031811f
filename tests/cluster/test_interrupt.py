"""Ctrl-C in a terminal ends a run cleanly, and a second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client
from local import wait_until
from processes import TESTS, kill_group, start
from small import assert_same_run, batches, example, train

from dagflow_storage import Store, list_snapshots

STEPS = 30


@contextmanager
def training(
    folder: Path, interrupted_after: int = 0, num_workers: int = 1
) -> Iterator[subprocess.Popen[str]]:
    numbers = [str(number) for number in (STEPS, interrupted_after, num_workers)]
    script = [sys.executable, TESTS / "interrupted.py", folder / "run"]
    process = start([*script, *numbers], folder / "stderr")
    # A line that never comes must not hang the test.
    deadline = threading.Timer(120, kill_group, [process])
    deadline.start()
    try:
        yield process
    finally:
        deadline.cancel()
        kill_group(process)
        process.communicate()


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    seen = []
    for found in process.stdout:
        seen.append(found.strip())
        if found.strip() == line:
            return
    pytest.fail(f"{line!r} never came: {seen}")


def group_size(process: subprocess.Popen[str]) -> int:
    """Count the processes of a process's group, as Linux lists them."""
    size = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            size += int(stat.read_text().rpartition(")")[2].split()[2]) == process.pid
    return size


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_while_the_workers_start_is_as_quiet(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        # The script, multiprocessing's tracker, and a worker that has just begun to import.
        wait_until(lambda: group_size(process) >= 3, "a worker is starting")
        kill_group(process, signal.SIGINT)
        process.communicate(timeout=60)
        wait_until(lambda: group_is_gone(process), "no process of the run is left", 10)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list_snapshots(Store(str(tmp_path / "run"))) == [0]


def test_ctrl_c_leaves_a_snapshot_no_processes_and_the_way_to_go_on(
    client: Client, tmp_path: Path
) -> None:
    with training(tmp_path, num_workers=2) as process:
        read_until(process, "step 7")
        kill_group(process, signal.SIGINT)
        process.communicate(timeout=60)
        wait_until(lambda: group_is_gone(process), "no process of the run is left", 10)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 130
    assert "Stopping" in said
    assert f"Call train again with store={str(tmp_path / 'run')!r}" in said
    assert "Traceback" not in said
    newest = list_snapshots(Store(str(tmp_path / "run")))[-1]
    assert 7 <= newest < STEPS
    assert f"Stopped after step {newest}." in said
    of = example(dropout=True)
    data = batches(of, STEPS)
    resumed = train(of, data, tmp_path / "run", client=client)
    assert_same_run(resumed, train(of, data, tmp_path / "whole", client=client))


def test_a_second_ctrl_c_ends_at_once(client: Client, tmp_path: Path) -> None:
    with training(tmp_path, interrupted_after=4) as process:
        read_until(process, "step 5")  # a step in flight comes back, and its callback hangs
        kill_group(process, signal.SIGINT)
        process.communicate(timeout=30)
        wait_until(lambda: group_is_gone(process), "no process of the run is left", 10)
    said = (tmp_path / "stderr").read_text()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list_snapshots(Store(str(tmp_path / "run"))) == [0]
    of = example(dropout=True)
    assert train(of, batches(of, STEPS), tmp_path / "run", client=client, steps=6).step == 6
