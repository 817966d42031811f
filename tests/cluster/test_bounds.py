"""A run takes a bounded share of the scheduler and of the workers, and leaves nothing behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from local import wait_until
from small import assert_same_run, batches, example, train
from zoo import normed

import dagflow
import dagflow_storage
from dagflow.training import driver


def largest_number_of_tasks(cluster: LocalCluster, seen: list[int]) -> Any:
    return lambda event: seen.append(len(cluster.scheduler.tasks))


def test_no_more_steps_are_in_flight_than_asked_for(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_flight: list[int] = []
    submit = driver.Driver._submit

    def counting(self: driver.Driver, flight: Any, **more: Any) -> None:
        submit(self, flight, **more)
        in_flight.append(len(self._flights))

    monkeypatch.setattr(driver.Driver, "_submit", counting)
    of = example()
    for lookahead in (1, 3):
        in_flight.clear()
        config = dagflow.Config(lookahead_steps=lookahead)
        train(of, batches(of, 6), tmp_path / str(lookahead), client=client, config=config)
        assert max(in_flight) == lookahead


def test_a_step_starts_before_the_one_before_it_has_come_back(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[int, int]] = []
    submit = driver.Driver._submit

    def counting(self: driver.Driver, flight: Any, **more: Any) -> None:
        submitted.append((flight.step, self._done))
        submit(self, flight, **more)

    monkeypatch.setattr(driver.Driver, "_submit", counting)
    of = example()
    train(of, batches(of, 6), tmp_path / "run", client=client)
    assert submitted == [(k, max(0, k - 1)) for k in range(6)]


def test_the_scheduler_forgets_finished_steps(
    cluster: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_LINEAGE_STEPS", 8)
    of = example()
    data = batches(of, 2)
    seen: list[int] = []
    train(
        of,
        data,
        tmp_path / "run",
        client=client,
        steps=48,
        num_microbatches=1,
        num_stages=2,
        callbacks=[largest_number_of_tasks(cluster, seen)],
    )
    assert len(seen) == 48
    # Two stages and one micro-batch make some ten tasks a step, batches included.
    assert max(seen[24:]) <= max(seen[:24]) <= 10 * (8 + 2)


def test_cutting_the_lineage_changes_no_bit(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = normed()
    data = batches(of, 7)
    wanted = train(of, data, tmp_path / "whole", client=client, clip_grad_norm=0.1)
    monkeypatch.setattr(driver, "_LINEAGE_STEPS", 2)
    found = train(of, data, tmp_path / "cut", client=client, clip_grad_norm=0.1, snapshot_every=2)
    assert_same_run(found, wanted)


def cached(client: Client, run: Path) -> int:
    """Count what the workers remember of a run."""
    run_id = dagflow_storage.RunDirectory(dagflow_storage.Store(str(run))).run_id

    def count() -> int:
        from dagflow_tasks.train.cache import CACHE

        parts = (CACHE.programs, CACHE.states, CACHE.graphs)
        return sum(run_id in str(key) for part in parts for key in part)

    return sum(client.run(count).values())


def test_nothing_of_a_run_stays_on_the_users_cluster(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    of = example()
    sizes: list[int] = []

    def watch(event: dagflow.StepEvent) -> None:
        sizes.append(cached(client, tmp_path / "run"))

    train(of, batches(of, 4), tmp_path / "run", client=client, callbacks=[watch])
    assert max(sizes) >= 4
    wait_until(lambda: not cluster.scheduler.tasks, "no task is left on the scheduler")
    assert cached(client, tmp_path / "run") == 0
    assert client.futures == {}


def test_failed_runs_leave_no_task_either(
    cluster: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = example()
    data = batches(of, 4)
    good = data[2][0].clone()
    data[2][0][0, 0] = torch.nan
    with pytest.raises(dagflow.NonFiniteLoss):
        train(of, data, tmp_path / "nan", client=client)
    data[2] = (good.double(), data[2][1])
    with pytest.raises(dagflow.BatchInvalid):
        train(of, data, tmp_path / "batch", client=client)
    # A task's own error, which dask remembers for as long as its future lives.
    monkeypatch.setattr(dagflow_storage.RunDirectory, "write_programs", lambda *_: None)
    with pytest.raises(dagflow.DagflowError, match="stage-00"):
        train(of, data, tmp_path / "task", client=client)
    wait_until(lambda: not cluster.scheduler.tasks, "no task is left on the scheduler")
    assert client.futures == {}


def test_two_runs_on_one_cluster_do_not_disturb_each_other(client: Client, tmp_path: Path) -> None:
    # Made before either run: torch's generator, which draws weights, is one for all threads, and a
    # run that reads its batches sets it.
    models = {name: example(dropout=True) for name in ("alone", "first", "second")}
    data = batches(models["alone"], 8)
    wanted = train(models["alone"], data, tmp_path / "alone", client=client)
    together = threading.Barrier(2)
    begun: list[str] = []

    def run(name: str) -> dagflow.TrainResult:
        def meet(event: dagflow.StepEvent) -> None:
            begun.append(name)
            if event.step == 3:
                together.wait(timeout=60)

        return train(models[name], data, tmp_path / name, client=client, callbacks=[meet])

    with ThreadPoolExecutor(1) as pool:
        # Capturing isn't for two threads at once, so the second run begins when the first has.
        first = pool.submit(run, "first")
        wait_until(lambda: bool(begun), "the first run's first step")
        second = run("second")
        assert_same_run(first.result(), wanted)
    assert_same_run(second, wanted)
    assert begun.count("first") == begun.count("second") == 8
