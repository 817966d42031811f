"""Who is slow and who is frozen is told from what happens to tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dagflow.swarm.health import (
    LONG_SILENCE_SECONDS,
    MIN_STALL_SECONDS,
    PATIENCE,
    SILENCE_SECONDS,
)
from dagflow.swarm.watch import StallWatch, is_ours


class Swarm:
    """A watch with a clock of its own, and what it has told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[tuple[str, str, Any]] = []
        self.watch = StallWatch(self.hear, lambda: self.now)
        self.quiet: dict[str, float] = {}
        self.running: dict[str, float] = {}

    def hear(self, message: Mapping[str, Any]) -> None:
        self.told.append((message["action"], message["worker"], message.get("silent")))

    def look(self) -> None:
        self.watch.look(lambda w: self.quiet.get(w, 0.0), lambda w: self.running.get(w, 0.0))

    def done(self, worker: str, key: Any, seconds: float) -> None:
        self.watch.given(worker, key)
        self.now += seconds
        self.watch.back(worker, key, seconds)


def key(kind: str, stage: int, index: int = 0) -> Any:
    return (f"{kind}-0123abcd", 3, stage, index)


@pytest.fixture
def swarm() -> Swarm:
    found = Swarm()
    found.done("a", key("forward", 1), 1.0)
    return found


def test_a_task_that_takes_several_times_as_long_as_ever_stalls_its_worker(swarm: Swarm) -> None:
    swarm.watch.given("b", key("forward", 1, 5))
    swarm.now += PATIENCE
    swarm.running["b"] = PATIENCE
    swarm.look()
    assert swarm.told == []
    swarm.now += 0.1
    swarm.running["b"] = PATIENCE + 0.1
    swarm.look()
    swarm.look()
    assert swarm.told == [("stalled", "b", False)]
    swarm.watch.back("b", key("forward", 1, 5), PATIENCE + 0.2)
    assert swarm.told[1:] == [("recovered", "b", None)]


def test_who_waits_for_a_frozen_workers_results_is_not_slow(swarm: Swarm) -> None:
    swarm.watch.given("b", key("forward", 1, 5))
    swarm.now += 100 * PATIENCE
    swarm.look()
    assert swarm.told == []


def test_who_stalls_and_says_nothing_is_frozen(swarm: Swarm) -> None:
    swarm.watch.given("b", key("forward", 1, 5))
    swarm.now += PATIENCE + 1
    swarm.quiet["b"] = SILENCE_SECONDS + 0.1
    swarm.look()
    swarm.look()
    assert swarm.told == [("stalled", "b", True)]


def test_short_tasks_are_given_a_second(swarm: Swarm) -> None:
    swarm.done("a", key("update", 1), 0.001)
    swarm.watch.given("b", key("update", 1))
    swarm.now += MIN_STALL_SECONDS - 0.1
    swarm.running["b"] = MIN_STALL_SECONDS - 0.1
    swarm.look()
    assert swarm.told == []


@pytest.mark.parametrize("kind", ["backward", "restore"])
def test_of_what_nobody_has_measured_only_a_long_silence_tells(swarm: Swarm, kind: str) -> None:
    swarm.watch.given("b", key(kind, 1))
    swarm.now += 1000
    swarm.running["b"] = 1000
    swarm.look()
    assert swarm.told == []
    swarm.quiet["b"] = LONG_SILENCE_SECONDS + 0.1
    swarm.look()
    assert swarm.told == [("stalled", "b", True)]


def test_snapshots_that_are_written_beside_stall_nobody(swarm: Swarm) -> None:
    swarm.done("a", key("save", 1), 0.1)
    swarm.watch.given("b", key("save", 1))
    swarm.now += 1000
    swarm.running["b"] = 1000
    swarm.look()
    assert swarm.told == []


def test_who_has_left_is_not_looked_at(swarm: Swarm) -> None:
    swarm.watch.given("b", key("forward", 1))
    swarm.watch.gone("b")
    swarm.quiet["b"] = 1000
    swarm.look()
    assert swarm.told == []


def test_other_peoples_keys_are_not_ours() -> None:
    assert is_ours(key("forward", 0))
    for other in ("sum-123", ("sum", 0), ("a-b", "c", 0), 5):
        assert not is_ours(other)
