"""fp16: the loss is scaled, and steps whose gradients overflow are skipped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from local import local_client
from small import assert_same_run, batches, example, train, train_with_torch
from zoo import Example

import dagflow
from dagflow_storage import Snapshot, Store
from dagflow_tasks.train.results import INITIAL_LOSS_SCALE


def decision(store: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = Snapshot.open(Store(str(store)), step).meta["decision"]
    return found


def exploding(factor: float) -> Example:
    """An example whose gradients are `factor` times as large, its loss the same."""
    of = example()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        entropy = torch.nn.functional.cross_entropy(output, target)
        return factor * entropy - (factor - 1) * entropy.detach()

    return Example(of.model, of.batch, loss)


def test_scaled_training_is_close_to_full_precision(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 5)
    wanted, _ = train_with_torch(of, data)
    run = tmp_path / "run"
    result = train(of, data, run, client=client, precision="fp16", num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=2e-2)
    assert result.losses != pytest.approx(wanted, rel=1e-6)
    assert decision(run, 5) == {"loss_scale": INITIAL_LOSS_SCALE, "good_steps": 5}
    again = train(of, data, tmp_path / "four", client=client, precision="fp16", num_stages=4)
    assert_same_run(again, result)


def test_an_overflow_skips_the_step_and_halves_the_scale(client: Client, tmp_path: Path) -> None:
    of = exploding(64.0)
    data = batches(of, 12)
    run = tmp_path / "run"
    heard: list[dagflow.StepEvent] = []
    result = train(
        of, data, run, client=client, precision="fp16", num_stages=2,
        snapshot_every=1, callbacks=[heard.append], config=dagflow.Config(retention=dagflow.Retention(20)),
    )  # fmt: skip
    scales = [INITIAL_LOSS_SCALE, *(decision(run, step)["loss_scale"] for step in range(1, 13))]
    skipped = [k for k in range(12) if scales[k + 1] == scales[k] / 2]
    assert 0 in skipped
    applied = min(set(range(12)) - set(skipped))
    assert [k for k in range(12) if heard[k].gradient_norm == float("inf")] == skipped
    before = dict(of.model.named_parameters())
    kept = Snapshot.open(Store(str(run)), applied).read("parameter", list(before))
    assert all((kept[name] == p.detach().numpy()).all() for name, p in before.items())
    assert any(not torch.equal(before[n], result.state_dict()[n]) for n in before)


def test_the_scale_is_resumed_with_the_weights(client: Client, tmp_path: Path) -> None:
    of = exploding(64.0)
    data = batches(of, 10)
    whole = train(of, data, tmp_path / "whole", client=client, precision="fp16")
    run = tmp_path / "run"
    for steps, num_stages in ((1, 2), (7, 1), (10, 3)):
        part = train(
            of, data, run, client=client, precision="fp16", num_stages=num_stages, steps=steps
        )
    assert_same_run(part, whole)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_worker_changes_no_bit(lost: int, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 5)
    options: dict[str, Any] = {"precision": "fp16", "num_stages": 2, "snapshot_every": 2}
    with local_client(3) as client:
        whole = train(of, data, tmp_path / "whole", client=client, **options)
        processes = client.run(os.getpid)

        def lose(event: dagflow.StepEvent) -> None:
            if event.step == lost:
                # That of the last stage: it scales the loss.
                address = client.run_on_scheduler(where_losses_are)
                os.kill(processes[address], signal.SIGKILL)

        part = train(of, data, tmp_path / "run", client=client, callbacks=[lose], **options)
    assert_same_run(part, whole)


def where_losses_are(dask_scheduler: Any) -> str:
    """Return the address of the last stage's worker."""
    (address,) = {
        worker
        for task in dask_scheduler.tasks.values()
        if type(task.key) is tuple and task.key[2] == 1
        for worker in task.worker_restrictions or ()
    }
    return str(address)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gpu_trains_in_half_precision(tmp_path: Path, precision: str) -> None:
    of = example()
    data = batches(of, 8)
    wanted, _ = train_with_torch(of, data)
    config = dagflow.Config(cluster=dagflow.ClusterSettings(num_workers=1))
    result = train(of, data, tmp_path / "run", precision=precision, config=config, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=2e-2)
    assert_same_run(
        train(of, data, tmp_path / "again", precision=precision, config=config, num_stages=2),
        result,
    )
