"""Priorities travel with every graph: small, whatever the plan's size, and the same on the other side."""

from __future__ import annotations

import pickle

from dagflow.plan.schedule import Pipeline, halved_stages, in_flight_limits
from dagflow.training.dask_tasks import Key, Priorities


def pipeline(num_stages: int, num_microbatches: int) -> Pipeline:
    placement, costs = tuple(range(num_stages)), ((1.0, 2.0),) * num_stages
    limits, halved = in_flight_limits(num_stages), halved_stages(placement)
    return Pipeline(placement, num_microbatches, limits, halved, costs)


def test_what_travels_does_not_grow_with_the_number_of_actions() -> None:
    assert len(pickle.dumps(Priorities(pipeline(64, 256)))) < 4096


def test_priorities_that_have_travelled_are_the_same() -> None:
    here = Priorities(pipeline(4, 8))
    there = pickle.loads(pickle.dumps(here))
    kinds = ("forward", "backward", "weights", "select", "lend", "restore", "report")
    keys: list[Key] = [(f"{kind}-0123abcd", step, 1, 3) for kind in kinds for step in (0, 7)]
    assert [there(key) for key in keys] == [here(key) for key in keys]
    assert here(("forward-0123abcd", 0, 1, 0)) > here(("forward-0123abcd", 0, 1, 1))
    assert here(("update-0123abcd", 0, 1)) > here(("forward-0123abcd", 1, 1, 0))
