"""The driver is killed again and again in one run, at moments that a seed chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.driving import Recipe
from chaos.faults import Extent, Fault, moments_in_task
from chaos.trial import hold_script


@pytest.mark.parametrize("moments", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_bits(
    moments: int, tmp_path: Path
) -> None:
    recipe = Recipe(Extent(num_steps=3 * moments), options={"snapshot_every": 4})
    kills = moments_in_task(0, recipe.extent, moments, Fault.DRIVER_KILLED_IN_TASK)
    trial = hold_script(kills, recipe, tmp_path)
    assert len(trial.outcome.fired) == moments
    assert trial.failures == []
