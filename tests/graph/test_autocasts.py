"""Regions of autocast for a device where the model isn't do nothing, and are warned of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dagflow.check.micro_batch import check_capture
from dagflow.graph.capture import capture

BATCH = torch.randn(3, 4)


class Model(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x).float().square().mean()


def on_cuda(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return self.layer(x)


def the_old_way(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.cuda.amp.autocast():
        return self.layer(x)


def on_xpu(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("xpu", dtype=torch.bfloat16):
        return self.layer(x)


@pytest.mark.parametrize("body", [on_cuda, the_old_way, on_xpu])
@pytest.mark.filterwarnings("ignore:.*amp.autocast:FutureWarning")
def test_autocast_on_another_device_is_warned_of_by_line(body: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"test_autocasts.py:\d+ asks for autocast on '(cuda|xpu)'"
    ):
        dag = capture(Model(body), BATCH)
    assert dag.nodes[0].autocast_dtype == ""


def test_autocast_switched_off_for_another_device_switches_nothing_off() -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cuda", enabled=False):
            return self.layer(x)

    model = Model(body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dag = capture(model, BATCH)
    assert (dag.nodes[0].autocast, dag.nodes[0].autocast_dtype) == (True, "bfloat16")
    assert check_capture(dag, model, BATCH)[1].exact
