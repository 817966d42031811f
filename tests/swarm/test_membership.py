"""The roster of workers is right whatever the order in which news and answers arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, cast

import pytest
from distributed import Client

from dagflow.errors import SchedulerLost
from dagflow.swarm.membership import Membership


class Scheduler:
    """Answers as through a client, and tells news while the answer is on its way."""

    status = "running"

    def __init__(self, workers: Iterable[str], name: str = "first") -> None:
        self.workers = set(workers)
        self.name = name
        self.meanwhile: list[tuple[Membership, str, str]] = []
        self.scheduler = self
        self.address = "tcp://scheduler"

    def sync(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run(function())

    async def identity(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1, "only then are all workers in it"
        answer = {"id": self.name, "workers": {worker: {"name": worker} for worker in self.workers}}
        for membership, action, worker in self.meanwhile:
            membership.hear((0.0, {"action": action, "worker": worker}))
        return answer


def membership_of(scheduler: Scheduler) -> Membership:
    return Membership(cast("Client", scheduler))


def test_a_worker_that_leaves_while_the_scheduler_answers_is_gone() -> None:
    scheduler = Scheduler(["a", "b"])
    membership = membership_of(scheduler)
    scheduler.meanwhile = [(membership, "remove-worker", "a"), (membership, "add-worker", "c")]
    membership.refresh()
    assert membership.usable() == ["b", "c"]


def test_what_was_heard_before_the_question_does_not_overrule_the_answer() -> None:
    scheduler = Scheduler(["a", "b"])
    membership = membership_of(scheduler)
    membership.hear((0.0, {"action": "remove-worker", "worker": "a"}))
    membership.refresh()
    assert membership.usable() == ["a", "b"]


def test_another_scheduler_at_the_same_address_is_noticed() -> None:
    scheduler = Scheduler(["a"])
    membership = membership_of(scheduler)
    membership.refresh()
    scheduler.name = "second"
    with pytest.raises(SchedulerLost, match="new scheduler"):
        membership.refresh()


def test_news_and_finished_futures_wake_whoever_waits() -> None:
    membership = membership_of(Scheduler(["a"]))
    membership.hear((0.0, {"action": "add-worker", "worker": "b"}))
    membership.wait(60.0)  # returns at once, or the test times out
    assert membership.usable() == ["b"]
