"""A capture leaves the process as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_a_capture_if_it_was_before(enabled: bool) -> None:
    class Refused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() if float(x.sum()) > 0 else x.mean()

    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        capture(nn.Linear(2, 2), (torch.ones(3, 2), torch.ones(3, 2)), loss=mse_loss)
        assert gc.isenabled() is enabled
        with pytest.raises(CaptureFailed):
            capture(Refused(), (torch.ones(3, 2),))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
