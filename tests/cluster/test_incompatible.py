"""Clusters, workers, programs and losses that a run can't go on with."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from local import local_cluster
from small import assert_same_run, batches, example, train
from zoo import Example

import dagflow
from dagflow.errors import ProgramTooNew
from dagflow.swarm.clusters import open_cluster
from dagflow_storage import RunDirectory, Store, list_snapshots

Refused = Callable[..., Any]


def test_a_scheduler_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        of = example()
        config = dagflow.Config(cluster=dagflow.ClusterSettings(wait_seconds=0.5))
        with pytest.raises(dagflow.WorkersLost) as caught:
            train(of, batches(of, 1), tmp_path / "run", client=address, config=config)
        told: list[str] = []
        with (
            pytest.raises(dagflow.WorkersLost),
            open_cluster(address, config.cluster, Store(str(tmp_path)), told.append),
        ):
            pytest.fail("there is no scheduler")
    assert told == [
        f"No dask scheduler answers at {address} (connection refused); trying for 0 s more."
    ]
    assert address in str(caught.value)
    assert "dask scheduler" in str(caught.value)


def test_a_cluster_without_workers(tmp_path: Path) -> None:
    of = example()
    config = dagflow.Config(cluster=dagflow.ClusterSettings(wait_seconds=0.5))
    with (
        local_cluster(0) as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(dagflow.WorkersLost) as caught,
    ):
        train(of, batches(of, 1), tmp_path / "run", client=client, config=config)
    for words in ("0 of 1 workers", "0.5 s", f"dagflow join {empty.scheduler_address}"):
        assert words in str(caught.value)


def fake_describe(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    def describe(dask_worker: Any) -> dict[str, Any]:
        from dagflow.swarm.workers import describe as real

        return {**real(dask_worker), **changes}

    return describe


def test_workers_with_another_dagflow_or_torch(
    refused: Refused, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = example()
    data = batches(of, 2)
    changes = {"dagflow": "0.0.9", "name": "attic"}
    monkeypatch.setattr("dagflow.swarm.clusters.describe", fake_describe(**changes))
    with refused(dagflow.WorkerIncompatible, "attic", "0.0.9", dagflow.__version__):
        train(of, data, tmp_path / "run", client=client)
    changes = {"torch": "2.0.0", "name": "attic"}
    monkeypatch.setattr("dagflow.swarm.clusters.describe", fake_describe(**changes))
    with pytest.warns(UserWarning, match=r"worker attic .* has torch 2\.0\.0") as caught:
        result = train(of, data, tmp_path / "run", client=client)
    assert len(caught) == 2
    assert result.step == 2


def test_a_driver_of_another_version_is_refused_beside_a_run_that_goes_on(
    cluster: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, other = example(dropout=True), example()
    data = batches(of, 8)
    whole = train(of, data, tmp_path / "whole", client=client)
    said: list[str] = []

    def another_comes(event: dagflow.StepEvent) -> None:
        if event.step != 3:
            return
        with (
            monkeypatch.context() as patch,
            Client(cluster, set_as_default=False) as second,
            pytest.raises(dagflow.WorkerIncompatible) as caught,
        ):
            patch.setattr("dagflow.swarm.clusters.DAGFLOW_VERSION", "9.9.9")
            train(other, batches(other, 1), tmp_path / "other", client=second)
        said.append(str(caught.value))

    found = train(of, data, tmp_path / "run", client=client, callbacks=[another_comes])
    assert f"runs dagflow {dagflow.__version__}, this is 9.9.9" in said[0]
    assert_same_run(found, whole)


def test_a_worker_that_cannot_say_what_it_is(
    refused: Refused, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe() -> None:
        raise ModuleNotFoundError("No module named 'dagflow'")

    monkeypatch.setattr("dagflow.swarm.clusters.describe", describe)
    of = example()
    with refused(dagflow.WorkerIncompatible, "tcp://", "pip install dagflow"):
        train(of, batches(of, 1), tmp_path / "run", client=client)


TAMPERED: dict[str, tuple[type[Exception], Callable[[str], str], str]] = {
    "operator": (
        dagflow.OperatorNotAllowed,
        lambda text: text.replace("aten.tanh.default", "os.system"),
        "os.system",
    ),
    "version": (
        ProgramTooNew,
        lambda text: text.replace('"format_version": 1', '"format_version": 9'),
        "version 9",
    ),
    "half": (dagflow.ProgramInvalid, lambda text: text[: len(text) // 2], "JSON"),
}


@pytest.mark.parametrize("what", sorted(TAMPERED))
def test_a_program_that_was_tampered_with_is_refused_by_the_worker(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    error, change, words = TAMPERED[what]
    write = RunDirectory.write_programs

    def tampering(self: RunDirectory, name: str, programs: list[str]) -> None:
        write(self, name, [change(text) for text in programs])

    monkeypatch.setattr(RunDirectory, "write_programs", tampering)
    of = example()
    with pytest.raises(error) as caught:
        train(of, batches(of, 2), tmp_path / "run", client=client)
    assert words in str(caught.value)


def test_a_nan_names_step_and_stage_and_keeps_the_last_good_snapshot(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    good = batches(of, 8)
    whole = train(of, good, tmp_path / "whole", client=client)
    bad = [*good]
    bad[5] = (good[5][0].clone(), good[5][1])
    bad[5][0][3, 0] = torch.nan
    run = tmp_path / "run"
    with pytest.raises(dagflow.NonFiniteLoss) as caught:
        train(of, bad, run, client=client, snapshot_every=2, num_stages=2)
    for words in ("step 5", "nan", "stage 0", "1f1", "clip_grad_norm"):
        assert words in str(caught.value).lower()
    assert list_snapshots(Store(str(run)))[-1] == 4
    assert_same_run(train(of, good, run, client=client), whole)


def zero_times_infinity(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A finite loss; its gradient has NaN where the batch has a zero."""
    return (output - target).square().mean() + (output * target[:, :1]).abs().sqrt().mean()


def test_gradients_with_nan_end_the_run_though_its_losses_are_finite(
    client: Client, tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    of = Example(
        model, lambda rows: (torch.rand(rows, 8), torch.rand(rows, 4)), zero_times_infinity
    )
    data = batches(of, 3)
    data[1][1][5, 0] = 0.0
    with pytest.raises(dagflow.NonFiniteLoss, match=r"by 1I2 step 1 has NaN.*twice"):
        train(of, data, tmp_path, client=client, num_stages=2, snapshot_every=1)
    assert list_snapshots(Store(str(tmp_path)))[-1] == 1
