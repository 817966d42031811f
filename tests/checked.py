"""A model that checks what it is given, and the captured graph that must assert the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dagflow.check.micro_batch import check_capture
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag

Check = Callable[[torch.Tensor], Any]


class Checked(nn.Module):
    """Goes on with what the check returns, if that isn't None."""

    def __init__(self, check: Check) -> None:
        super().__init__()
        self.linear, self.check = nn.Linear(4, 4), check

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.check(x)
        return self.linear(x if found is None else found).square().mean()


def captured_with_an_assertion(check: Check) -> tuple[OperatorDag, Checked, torch.Tensor]:
    """Capture a model on a good batch (3, 4), on which graph and model agree; return all three."""
    model, good = Checked(check), torch.rand(3, 4)
    dag = capture(model, good)
    assert "aten._assert_async.msg" in {node.op for node in dag.nodes}
    _, report = check_capture(dag, model, good)
    assert report.exact
    assert not report.skipped
    return dag, model, good


def run_graph(dag: OperatorDag, model: Checked, x: torch.Tensor) -> None:
    """Have the graph run where the model's own check is switched off."""
    model.check = lambda x: None
    check_capture(dag, model, x)
