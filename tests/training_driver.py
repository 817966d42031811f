"""A driver to ask for decisions: nothing runs, and what it needs for other things isn't there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import mse_loss

import dagflow
from dagflow.plan.memory import StageNeeds
from dagflow.plan.plan import Plan
from dagflow.swarm.events import EventStream
from dagflow.swarm.membership import Membership
from dagflow.training.dask_tasks import Key, Priorities
from dagflow.training.driver import Driver
from dagflow.training.ledger import Ledger
from dagflow.training.step_graph import StepGraph
from dagflow_storage import RunDirectory, Store
from dagflow_tasks.train.optimizer import Optimizer
from dagflow_tasks.train.references import StageRef, TaskSettings


class Pending:
    """A future that is as done as a test says."""

    def __init__(self, key: Key) -> None:
        self.key, self.status, self.released = key, "pending", False

    def done(self) -> bool:
        return self.status != "pending"

    def release(self) -> None:
        self.released = True


class Swarm:
    """Takes tasks as dask's client does, and runs none."""

    status = "connecting"  # nobody asks a scheduler, then

    def __init__(self) -> None:
        self.handed_out: list[Pending] = []
        self.workers: dict[str, dict[str, Any]] = {}
        self.scheduler = SimpleNamespace(address="tcp://swarm:8786")

    def scheduler_info(self) -> dict[str, Any]:
        return {"id": "swarm", "workers": self.workers}

    def get(self, dsk: Mapping[Key, Any], keys: Sequence[Key], sync: bool) -> list[Pending]:
        assert not sync
        futures = [Pending(key) for key in keys]
        self.handed_out += futures
        return futures


@cache
def small_plan() -> Plan:
    """Two stages of two micro-batches, a worker each."""
    batch = (torch.randn(8, 4), torch.randn(8, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    cut = dagflow.partition(dagflow.capture(model, batch, loss=mse_loss), 2)
    return Plan.in_turn(cut, ["a", "b"], 2)


def driver_of(membership: Membership, addresses: Sequence[str]) -> Driver:
    """Return a driver of two stages on these workers, with a journal, that has begun nothing."""
    plan = small_plan()
    store = Store("memory://driver")
    settings = TaskSettings(0, "fp32", Optimizer("SGD", lr=0.1))
    refs = [StageRef(store, "run", "plan", s, settings, 1) for s in range(plan.num_stages)]
    run = RunDirectory(store)
    nothing = cast("Any", None)
    return Driver(
        client=membership.client,
        graph=StepGraph("0123abcd", plan.partition.programs, refs, plan.limits, plan.halved),
        priorities=Priorities(plan.pipeline),
        addresses=list(addresses),
        feed=nothing,
        schedule=nothing,
        run=run,
        ledger=Ledger(run),
        membership=membership,
        lease=cast("Any", SimpleNamespace(holder=SimpleNamespace(epoch=1))),
        snapshot_every=None,
        lookahead_steps=2,
        events=EventStream(),
        write_extra=lambda step: [],
        after_commit=lambda step, saving: None,
        wait_seconds=1.0,
        needs=[StageNeeds(1 << 10)] * plan.num_stages,
        memory=dict.fromkeys(addresses, 1 << 20),
        turns=itertools.count(1),
    )
