"""What `train` can't work with is said in a sentence, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dagflow
from dagflow.errors import DagflowError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def model() -> nn.Module:
    return nn.Linear(4, 3)


def train(given: Any = None, data: Any = None, **options: Any) -> dagflow.TrainResult:
    batches = [(X, Y)] if data is None else data
    options = {
        "loss": functional.cross_entropy,
        "progress": False,
        "store": "memory://no",
        **options,
    }
    return dagflow.train(model() if given is None else given, batches, **options)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "function": ({"given": functional.relu}, "torch.nn.Module; found"),
    "class": ({"given": nn.Linear}, "an instance, Linear(...)"),
    "torch's optimizer": (
        {"optimizer": torch.optim.SGD(model().parameters(), lr=0.5)},
        "dagflow.Optimizer('SGD', lr=0.5)",
    ),
    "optimizer's class": ({"optimizer": torch.optim.Adam}, "dagflow.Optimizer('Adam', lr=1e-3)"),
    "optimizer's name": ({"optimizer": "Adam"}, "dagflow.Optimizer('Adam', lr=1e-3)"),
    "schedule's name": ({"schedule": "linear"}, "dagflow.Schedule('linear', warmup_steps=100)"),
    "loss's name": ({"loss": "cross_entropy"}, "torch.nn.functional.cross_entropy"),
    "loss's class": ({"loss": nn.CrossEntropyLoss}, "an instance, CrossEntropyLoss()"),
    "half a step": ({"steps": 2.5}, "steps= is a whole number; found 2.5 (a float)"),
    "epochs": ({"epochs": "3"}, "epochs= is a whole number"),
    "micro-batches": ({"num_microbatches": True}, "num_microbatches= is a whole number"),
    "seed": ({"seed": None}, "seed= is a whole number"),
    "stages": ({"num_stages": 2.0}, "num_stages= is a whole number or 'auto'"),
    "clipping": ({"clip_grad_norm": "1"}, "clip_grad_norm= is a number"),
    "one callback": ({"callbacks": print}, "callbacks= is a list, even of one: [print]"),
    "no callback": ({"callbacks": [3]}, "on_step(event); found 3 (an int)"),
    "configuration": ({"config": {"check": False}}, "dagflow.Config(check=False)"),
    "port alone": ({"client": 8786}, "'tcp://10.0.0.1:8786'; found 8786 (an int)"),
    "weights": ({"state_dict": model().state_dict()}, "call model.load_state_dict(...)"),
    "empty store": ({"store": ""}, "store= is a folder, or a URL"),
    "protocol": ({"store": "nosuch://x"}, "no protocol 'nosuch'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_argument_of_another_kind_is_refused_with_what_to_write(name: str) -> None:
    options, words = MISTAKES[name]
    with pytest.raises((dagflow.SettingsInvalid, dagflow.OptimizerInvalid)) as caught:
        train(**options)
    assert words in str(caught.value)


def test_address_without_a_port_is_refused(tmp_path: Any) -> None:
    with pytest.raises(dagflow.SettingsInvalid, match="'somewhere' is no scheduler's address"):
        train(client="somewhere", store=tmp_path)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    options: dict[str, Any] = {"steps": np.int64(0), "seed": np.int32(3), "num_microbatches": 2}
    cluster = dagflow.ClusterSettings(num_workers=1, num_torch_threads=1)
    config = dagflow.Config(cluster=cluster)
    assert train(store="memory://numpy", config=config, **options).step == 0


def out_of_range() -> dict[str, Any]:
    given = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    return {"given": given, "data": [(torch.full((8,), 7), Y)]}


FAILING: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "width": (
        lambda: {"data": [(X[:, :2], Y)]},
        r"multiplied.*'0' float32\[8, 2\], '1' int64\[8\]",
    ),
    "labels": (lambda: {"data": [(X, Y.float())]}, "to be Long"),
    "dtype": (lambda: {"data": [(X.double(), Y)]}, "dtype.*Double and Float"),
    "an index": (out_of_range, "index out of range"),
    "samples": (
        lambda: {"data": TensorDataset(torch.randn(8, 1), Y)},
        r"'1' has no dimension: does the data yield single samples\? DataLoader",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_batch_that_the_model_itself_fails_on_is_said_to_be_one(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = FAILING[name]
    with pytest.raises(dagflow.BatchInvalid, match=f"fails on the first batch without.*{words}"):
        train(**make())
    assert capfd.readouterr().err == ""  # of torch's own log, which is loud


def test_samples_that_the_model_takes_one_by_one_are_said_to_be_no_batches() -> None:
    with pytest.raises(DagflowError, match="yield single samples"):
        train(data=TensorDataset(X, Y))


def test_failing_task_of_an_embedded_cluster_is_not_logged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nan = [(X * torch.nan, Y)]
    cluster = dagflow.ClusterSettings(num_workers=1, num_torch_threads=1)
    with pytest.raises(dagflow.NonFiniteLoss):
        train(data=DataLoader(nan, batch_size=None), config=dagflow.Config(cluster=cluster))  # type: ignore[arg-type]
    assert capfd.readouterr().err == ""
