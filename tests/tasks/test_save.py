"""Snapshots hold weights that one can go back to."""

from __future__ import annotations

import pytest
import torch
from inline import run_inline
from zoo import build, captured

from dagflow_storage import list_snapshots
from dagflow_tasks.cache import CACHE
from dagflow_tasks.errors import WeightsNotFinite


def test_weights_that_are_not_finite_get_no_snapshot() -> None:
    run = run_inline(build("two_branches"), 2, 1, dag=captured("two_branches"))
    state = CACHE.states[run.refs[1].key]
    name = next(iter(state.parameters))
    with torch.no_grad():
        state.parameters[name].flatten()[0] = float("nan")
    with pytest.raises(WeightsNotFinite, match=rf"After step 1 the parameter '{name}' of stage 1"):
        run.save(1)
    assert list_snapshots(run.store) == [0]
