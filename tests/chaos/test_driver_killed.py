"""The driver is killed again and again in one run, at moments that a seed chooses."""

from __future__ import annotations

from pathlib import Path

from chaos.driving import Recipe
from chaos.faults import Extent, Fault, moments_in_task
from chaos.trial import hold_script

MOMENTS = 8


def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    recipe = Recipe(Extent(num_steps=24), options={"snapshot_every": 6})
    kills = moments_in_task(0, recipe.extent, MOMENTS, Fault.DRIVER_KILLED_IN_TASK)
    trial = hold_script(kills, recipe, tmp_path)
    assert len(trial.outcome.fired) == MOMENTS
    assert trial.failures == []
