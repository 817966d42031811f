"""Workers that run short of something in the middle of a run: descriptors, memory, a fast store."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client
from processes import kill_group, volunteers
from small import assert_same_run, batches, example, train
from zoo import Example

import dagflow
from dagflow.errors import TaskFailed
from dagflow.swarm.clusters import scheduler_info
from dagflow_storage import Store, list_snapshots
from dagflow_storage.place.backends import FolderBackend

OPTIONS = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]
OPTIONS += ["--preload", "dagflow.worker", "--torch-threads", "1"]
NAMES = ("first", "second")


def address_of(client: Client, name: str) -> str:
    workers = scheduler_info(client)["workers"]
    return next(address for address, info in workers.items() if info["name"] == name)


def after_step(step: int, do: Callable[[], object]) -> Callable[[dagflow.StepEvent], None]:
    def heard(event: dagflow.StepEvent) -> None:
        if event.step == step:
            do()

    return heard


def leave_descriptors(is_short: bool) -> None:
    """Let this process open nothing more, or again as much as ever."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = most
    if is_short:
        limit = os.dup(0)  # the lowest that is free
        os.close(limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def test_a_worker_that_is_short_of_descriptors_for_a_while_writes_later(
    client: Client, tmp_path: Path
) -> None:
    of = example(dropout=True)
    data = batches(of, 12)
    whole = train(of, data, tmp_path / "whole", client=client)
    with volunteers(NAMES, OPTIONS, tmp_path) as (swarmed, _):
        second = address_of(swarmed, "second")

        def leave(is_short: bool) -> None:
            swarmed.run(leave_descriptors, is_short, workers=[second])

        found = train(
            of, data, tmp_path / "run", client=swarmed, snapshot_every=3,
            callbacks=[after_step(2, lambda: leave(True)), after_step(5, lambda: leave(False))],
        )  # fmt: skip
    assert_same_run(found, whole)
    assert list_snapshots(Store(str(tmp_path / "run")))[-1] == 12


@pytest.mark.slow
def test_a_worker_that_stays_short_of_descriptors_gives_its_stage_up(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of = example(dropout=True)
    data = batches(of, 8)
    whole = train(of, data, tmp_path / "whole", client=client)
    with volunteers(NAMES, OPTIONS, tmp_path) as (swarmed, _):
        first, second = (address_of(swarmed, name) for name in NAMES)
        starve = after_step(2, lambda: swarmed.run(leave_descriptors, True, workers=[second]))
        found = train(
            of, data, tmp_path / "run", client=swarmed, snapshot_every=3, progress=True, callbacks=[starve]
        )  # fmt: skip
    assert_same_run(found, whole)
    # Its snapshot can't be written, or before that its heartbeats can't be sent: either way it is found out.
    assert f"Rebuilding stage 1 on {first}" in capfd.readouterr().err


class Wide(torch.nn.Module):
    """Few weights, and activations of 32 MB for each row of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = torch.nn.Linear(8, 4)
        self.wide = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 1 << 21))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.narrow(x)[:, :, None] * self.wide).tanh().mean(-1)


def leave_memory(num_bytes: int | None) -> None:
    """Let this process' address space grow by so much, or without a limit."""
    limit = resource.RLIM_INFINITY
    if num_bytes is not None:
        limit = psutil.Process().memory_info().vms + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_what_does_not_fit_into_a_workers_memory_is_computed_by_another(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of = Example(
        Wide(),
        lambda rows: (torch.rand(rows, 8), torch.rand(rows, 4)),
        torch.nn.functional.mse_loss,
    )
    data = batches(of, 2, rows=4)
    options = {"num_stages": 1, "num_microbatches": 2, "config": dagflow.Config(check=False)}
    whole = train(of, data, tmp_path / "whole", client=client, **options)
    with volunteers(NAMES, OPTIONS, tmp_path) as (swarmed, _):
        swarmed.run(leave_memory, 150 << 20)
        with pytest.raises(TaskFailed, match=r"Stage 0 .* can't allocate memory"):
            train(of, data, tmp_path / "run", client=swarmed, **options)
        swarmed.run(leave_memory, None, workers=[address_of(swarmed, "second")])
        capfd.readouterr()
        found = train(of, data, tmp_path / "run", client=swarmed, progress=True, **options)
    assert_same_run(found, whole)
    assert "can't allocate memory" in capfd.readouterr().err


def read_slowly(seconds: float) -> None:
    """Let every read of this process from a folder take so much longer."""
    read = FolderBackend.read

    def slowly(self: FolderBackend, path: str) -> bytes:
        time.sleep(seconds)
        return read(self, path)

    FolderBackend.read = slowly  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rebuilding_that_reads_slowly_is_waited_for_and_not_begun_again(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of = example(dropout=True)
    data = batches(of, 10)
    whole = train(of, data, tmp_path / "whole", client=client)
    seconds: list[float] = []
    with volunteers(NAMES, OPTIONS, tmp_path) as (swarmed, workers):
        swarmed.run(read_slowly, 0.1)
        found = train(
            of, data, tmp_path / "run", client=swarmed, snapshot_every=3, progress=True,
            callbacks=[
                lambda event: seconds.append(event.seconds),
                after_step(5, lambda: kill_group(workers["second"])),
            ],
        )  # fmt: skip
    assert_same_run(found, whole)
    assert max(seconds) > 1.0  # longer than a worker may be busy with other tasks of this length
    assert capfd.readouterr().err.count("Rebuilding") == 1
