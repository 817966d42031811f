"""What can be known to be wrong is refused before any task runs, in words that help."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from small import batches, example, train
from zoo import Example, TwoBranches

import dagflow
from dagflow.errors import FormatTooNew

Refused = Callable[..., Any]


class DependsOnData(TwoBranches):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        stem = self.stem(features)
        if stem.sum() > 0:
            stem = -stem
        output: torch.Tensor = self.head(stem)
        return output


def test_control_flow_that_depends_on_data(
    refused: Refused, client: Client, tmp_path: Path
) -> None:
    of = example()
    of = Example(DependsOnData(), of.batch, of.loss)
    with refused(dagflow.CaptureFailed, "test_refusals.py", "if stem.sum() > 0"):
        train(of, batches(of, 1), tmp_path / "run", client=client)


def renamed(features: torch.Tensor, labels: torch.Tensor) -> Any:
    return {"features": features, "y": labels}


BATCHES: dict[str, tuple[Callable[..., Any], str]] = {
    "dtype": (lambda x, y: {"features": x.double(), "labels": y}, "float64"),
    "width": (lambda x, y: {"features": x[:, :15], "labels": y}, "size 15"),
    "names": (lambda x, y: {"inputs": x, "labels": y}, "['inputs', 'labels']"),
    "dimensions": (lambda x, y: {"features": x[:, :, None], "labels": y}, "[2, 16, 1]"),
    "rows": (lambda x, y: {"features": x, "labels": y[1:]}, "share their first dimension"),
    "empty": (lambda x, y: {"features": x[:0], "labels": y[:0]}, "no rows"),
}


@pytest.mark.parametrize("what", sorted(BATCHES))
def test_a_later_batch_that_fits_no_signature(client: Client, tmp_path: Path, what: str) -> None:
    change, words = BATCHES[what]
    of = example()
    data: list[Any] = [{"features": x, "labels": y} for x, y in batches(of, 4)]
    data[2] = change(*data[2].values())
    with pytest.raises(dagflow.BatchInvalid) as caught:
        train(of, data, tmp_path / "run", client=client)
    assert words in str(caught.value)
    assert "step 2" in str(caught.value)


def test_a_first_batch_without_labels(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    features = torch.randn(8, 16)
    with refused(dagflow.BatchInvalid, "Labels are missing"):
        train(of, [{"features": features}], tmp_path / "mapping", client=client)
    with refused(dagflow.BatchInvalid, "Labels are missing"):
        train(of, [features], tmp_path / "tensor", client=client)
    without_loss = Example(of.model, of.batch)
    with refused(dagflow.BatchInvalid, "A loss is a scalar tensor", "pass loss="):
        train(without_loss, [features], tmp_path / "loss", client=client)


DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "one batch": ({"features": torch.ones(2)}, dagflow.SettingsInvalid, "pass [batch]"),
    "number": (7, dagflow.SettingsInvalid, "found a int"),
    "none": ([], dagflow.BatchInvalid, "no batch"),
    "objects": ([{"features": object()}], dagflow.BatchInvalid, "object at 'features'"),
    "no tensor": ([{"flag": True}], dagflow.BatchInvalid, "no tensor"),
}


@pytest.mark.parametrize("what", sorted(DATA))
def test_data_that_holds_no_batches(
    refused: Refused, client: Client, tmp_path: Path, what: str
) -> None:
    data, error, words = DATA[what]
    with refused(error, words):
        train(example(), data, tmp_path / "run", client=client)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "micro-batches": ({"num_microbatches": 0}, "num_microbatches must be at least 1; found 0"),
    "precision": ({"precision": "fp8"}, "fp32, bf16, fp16; found 'fp8'"),
    "stages": ({"num_stages": "many"}, "a number or 'auto'; found 'many'"),
    "no stages": ({"num_stages": 0}, "0"),
    "too many stages": ({"num_stages": 1000}, "1000"),
    "clipping": ({"clip_grad_norm": -1.0}, "clip_grad_norm must be positive; found -1.0"),
    "epochs": ({"epochs": 0}, "found 0"),
    "steps": ({"steps": -1}, "-1"),
    "snapshots": ({"snapshot_every": 0}, "snapshot_every"),
    "split": ({"config": dagflow.Config(split_points=["nowhere"])}, "nowhere"),
}


@pytest.mark.parametrize("what", sorted(SETTINGS))
def test_settings_that_make_no_sense(
    refused: Refused, client: Client, tmp_path: Path, what: str
) -> None:
    of = example()
    options, words = SETTINGS[what]
    with refused((dagflow.SettingsInvalid, dagflow.PlanInvalid), words):
        train(of, batches(of, 2), tmp_path / "run", client=client, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookahead_steps": 0}, "lookahead_steps"),
        ({"in_flight_slack": -1}, "in_flight_slack"),
        ({"granularity": "module"}, "found 'module'"),
    ],
)
def test_a_config_that_makes_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(dagflow.SettingsInvalid, match=words):
        dagflow.Config(**options)


def test_optimizers_and_options_that_do_not_exist() -> None:
    with pytest.raises(dagflow.OptimizerInvalid, match=r"'AdamX'.*choose one of.*AdamW"):
        dagflow.Optimizer("AdamX")
    with pytest.raises(dagflow.OptimizerInvalid, match=r"AdamW.*momentum"):
        dagflow.Optimizer("AdamW", momentum=0.9)
    with pytest.raises(dagflow.OptimizerInvalid, match="choose 'constant', 'cosine' or 'linear'"):
        dagflow.Schedule("step")  # type: ignore[arg-type]


def test_a_schedule_over_data_without_length(
    refused: Refused, client: Client, tmp_path: Path
) -> None:
    of = example()
    with refused(dagflow.SettingsInvalid, "'cosine'", "pass steps="):
        train(
            of, iter(batches(of, 2)), tmp_path / "run",
            client=client, schedule=dagflow.Schedule("cosine"),
        )  # fmt: skip


def test_a_store_that_cannot_be_written(refused: Refused, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    of = example()
    with refused(dagflow.StoreNotWritable, str(file)):
        train(of, batches(of, 1), file / "run", client=client)


def test_a_store_in_this_processs_memory_for_workers_elsewhere(
    refused: Refused, client: Client
) -> None:
    of = example()
    with refused(dagflow.SettingsInvalid, "memory://", "s3://"):
        train(of, batches(of, 1), "memory://elsewhere", client=client)


def test_a_store_that_holds_another_run(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 4)
    run = tmp_path / "run"
    train(of, data, run, client=client, steps=2)
    with refused(dagflow.StoreHoldsAnotherRun, "seed: 0 -> 1", "Config(force=True)"):
        train(of, data, run, client=client, seed=1)
    other = dagflow.Optimizer("AdamW", lr=0.5)
    with refused(dagflow.StoreHoldsAnotherRun, "optimizer.options.lr: 0.001 -> 0.5"):
        train(of, data, run, client=client, optimizer=other)
    with refused(dagflow.StoreHoldsAnotherRun, "data.first_batch"):
        train(of, batches(of, 4, seed=8), run, client=client)
    wider = Example(TwoBranches(48), of.batch, of.loss)
    with refused(dagflow.StoreHoldsAnotherRun, "model.parameters"):
        train(wider, data, run, client=client)
    trained = Example(copy.deepcopy(of.model), of.batch, of.loss)
    with torch.no_grad():
        next(trained.model.parameters()).view(-1)[-1] += 1e-3
    with refused(dagflow.StoreHoldsAnotherRun, "model.initial_weights"):
        train(trained, data, run, client=client)
    settings = json.loads((run / "run.json").read_text())
    del settings["settings"]["model"]["initial_weights"]  # as an older dagflow wrote it
    (run / "run.json").write_text(json.dumps(settings))
    assert train(trained, data, run, client=client, steps=2).step == 2
    force = dagflow.Config(force=True)
    assert train(of, data, run, client=client, optimizer=other, config=force).step == 4


def test_a_store_of_a_newer_dagflow(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 2)
    run = tmp_path / "run"
    train(of, data, run, client=client)
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with refused(FormatTooNew, "run.json", "version 9", "upgrade dagflow"):
        train(of, data, run, client=client)


def test_a_stage_that_fits_no_worker(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    config = dagflow.Config(memory_limit_bytes=20_000)
    with refused(dagflow.StageTooLarge, "stage", "kB"):
        train(of, batches(of, 1), tmp_path / "run", client=client, num_stages=1, config=config)


def test_weights_that_are_nowhere(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    with dagflow.empty_weights():
        empty = Example(TwoBranches(), of.batch, of.loss)
    with refused(dagflow.SettingsInvalid, "meta device", "state_dict='model.safetensors'"):
        train(empty, batches(of, 1), tmp_path / "run", client=client)
    with refused(dagflow.SettingsInvalid, "found none"):
        train(empty, batches(of, 1), tmp_path / "run", client=client, state_dict=tmp_path / "no")
