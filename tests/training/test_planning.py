"""Runs are planned for whoever is there, with default settings, and again when they come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from dagflow.errors import StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.memory import bytes_by_worker
from dagflow.plan.partition import num_parts
from dagflow.plan.plan import Plan
from dagflow.swarm.workers import WorkerFacts
from dagflow.training import attempts
from dagflow.training.attempts import make_plan
from dagflow.training.settings import Config, Mathematics
from dagflow_tasks.train.optimizer import Optimizer, Schedule

MATHEMATICS = Mathematics(Optimizer("AdamW", lr=0.01), Schedule(), None, 8, "fp32", 0)
# Of what the whole model takes: from a telephone to a server.
SHARES = (0.0001, 0.01, 0.1, 0.3, 0.7, 1.5, 20.0)


@cache
def model() -> OperatorDag:
    """Six layers of which each can be a stage: fewer than there may be volunteers."""
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)]
    batch = (torch.randn(4, 32), torch.randn(4, 32))
    return capture(nn.Sequential(*layers), batch, loss=mse_loss)


def worker(name: int, memory_bytes: int) -> WorkerFacts:
    address = f"tcp://10.0.0.{name}:9000"
    return WorkerFacts(address, str(name), "1", "2", "3", "cpu", 1, 1, memory_bytes, address)


def planned(workers: Sequence[WorkerFacts]) -> Plan:
    return make_plan(model(), workers, "auto", MATHEMATICS, Config())


@cache
def whole_bytes() -> int:
    return planned([worker(0, 1 << 40)]).partition.estimates[0].memory_bytes


@cache
def most_stages() -> int:
    return num_parts(DagAnalysis(model()))


def assert_fits(plan: Plan, workers: Sequence[WorkerFacts]) -> None:
    for index, num_bytes in bytes_by_worker(plan.needs, plan.placement).items():
        assert num_bytes <= workers[index].memory_bytes


@pytest.mark.parametrize("seed", range(3))
def test_volunteers_of_any_memory_come_and_go_and_there_is_a_plan_while_one_can_hold_it(
    seed: int,
) -> None:
    draw = random.Random(seed)
    names = iter(range(1, 1000))
    server = worker(0, 2 * whole_bytes())
    workers = [server]
    sizes = set()
    for _ in range(12):
        for _ in range(draw.randint(1, 16)):
            workers.append(worker(next(names), round(draw.choice(SHARES) * whole_bytes())))
        workers = [server, *draw.sample(workers[1:], draw.randint(0, min(39, len(workers) - 1)))]
        sizes.add(len(workers))
        plan = planned(workers)
        assert 1 <= plan.num_stages <= min(len(workers), most_stages())
        assert len(set(plan.placement)) == plan.num_stages
        assert_fits(plan, workers)
    assert len(sizes) > 4


@pytest.mark.parametrize("num_workers", [1, 2, 6, 7, 40])
def test_more_volunteers_than_parts_are_spares(num_workers: int) -> None:
    plan = planned([worker(n, whole_bytes()) for n in range(num_workers)])
    assert (
        plan.num_stages == num_workers
        if num_workers <= 6
        else 6 <= plan.num_stages <= most_stages()
    )


def test_volunteers_that_only_together_have_the_memory_share_the_model() -> None:
    share = round(0.4 * whole_bytes())
    with pytest.raises(StageTooLarge):
        planned([worker(0, share)])
    workers = [worker(n, share) for n in range(6)]
    assert_fits(planned(workers), workers)


class Line:
    """Keeps what would be shown."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def session(plan: Plan | None, wait_seconds: float = 60.0) -> Any:
    cluster = SimpleNamespace(wait_seconds=wait_seconds)
    return SimpleNamespace(
        plan=plan,
        dag=model(),
        mathematics=MATHEMATICS,
        num_stages="auto",
        snapshot_every=10,
        journal=1,
        config=SimpleNamespace(**vars(Config()) | {"cluster": cluster}),
        events=Line(),
    )


CLIENT = cast("Any", SimpleNamespace(scheduler=SimpleNamespace(address="tcp://swarm:8786")))


def test_a_run_whose_last_large_worker_left_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    large, tiny = worker(0, 2 * whole_bytes()), worker(1, 1000)
    there = iter([[tiny], [tiny, large]])
    monkeypatch.setattr(attempts, "roster", lambda *_: next(there))
    monkeypatch.setattr(attempts, "_LOOK_EVERY_SECONDS", 0.0)
    running = session(planned([large, tiny]))
    plan, workers = attempts.Attempts._planned(running, CLIENT, [tiny])
    assert workers == [tiny, large]
    assert plan.placement == (1,)
    (said,) = running.events.said
    assert "its worker has 1 kB" in said
    assert "dagflow join tcp://swarm:8786" in said


def test_a_run_that_has_never_fitted_is_refused_at_once() -> None:
    with pytest.raises(StageTooLarge):
        attempts.Attempts._planned(session(None), CLIENT, [worker(1, 1000)])


def test_a_run_that_waits_in_vain_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = worker(1, 1000)
    monkeypatch.setattr(attempts, "roster", lambda *_: [tiny])
    monkeypatch.setattr(attempts, "_LOOK_EVERY_SECONDS", 0.0)
    running = session(planned([worker(0, 2 * whole_bytes())]), wait_seconds=-1.0)
    with pytest.raises(StageTooLarge, match="its worker has 1 kB"):
        attempts.Attempts._planned(running, CLIENT, [tiny])
