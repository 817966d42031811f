"""The driver decides right whatever it hears between two of its looks."""

from __future__ import annotations

from typing import Any, cast

import pytest
from training_driver import Swarm, driver_of

from dagflow.errors import WorkersLost
from dagflow.run.membership import STALLED, Membership


class HearsBetweenLooks(Membership):
    """Hears that a worker is back as soon as somebody has looked who is usable."""

    def usable(self) -> list[str]:
        found = super().usable()
        self.hear((0.0, {"action": "recovered", "worker": "a"}))
        return found


def stalled(worker: str, *, silent: bool) -> tuple[float, dict[str, Any]]:
    return 0.0, {"action": "stalled", "worker": worker, "seconds": 5.0, "silent": silent}


@pytest.mark.parametrize("silent", [False, True])
def test_a_worker_may_recover_while_its_stages_are_about_to_move(silent: bool) -> None:
    swarm = Swarm()
    membership = HearsBetweenLooks(cast("Any", swarm), present={"a", "b", "c"})
    driver = driver_of(membership, ["a", "b"])
    said: list[str] = []
    driver.note = said.append
    membership.hear(stalled("a", silent=silent))
    driver._check_stalls()
    (move,) = swarm.handed_out
    assert not move.released
    driver._check_stalls()
    assert move.released
    assert said[-1] == "The worker a is back, with stage 0."


def test_a_worker_that_is_back_is_not_shut_out_for_having_stalled() -> None:
    membership = Membership(cast("Any", Swarm()), present={"a"})
    membership.hear(stalled("a", silent=False))
    membership.hear((0.0, {"action": "recovered", "worker": "a"}))
    membership.exclude("a", STALLED)
    assert membership.usable() == ["a"]
    membership.exclude("a", "update failed there")
    assert membership.usable() == []


def test_where_a_task_failed_last_is_known_however_many_have_failed_since() -> None:
    membership = Membership(cast("Any", Swarm()))

    def fails(worker: str, *key: str) -> None:
        membership.hear((0.0, {"action": "erred", "key": list(key), "worker": worker}))

    fails("a", "forward-0123abcd", "3", "1", "0")
    fails("b", "forward-0123abcd", "3", "1", "0")
    for index in range(200):
        fails("c", "forward-0123abcd", "3", "2", str(index))
    assert membership.where_failed(("forward-0123abcd", 3, 1, 0)) == "b"
    assert membership.where_failed(("forward-0123abcd", 3, 1, 1)) is None


def test_a_stage_does_not_move_to_a_worker_that_has_no_room_for_it() -> None:
    swarm = Swarm()
    membership = Membership(cast("Any", swarm), present={"a", "small", "large"})
    driver = driver_of(membership, ["a", "a"])
    driver.memory = {"a": 1 << 20, "small": 512, "large": 1 << 20}
    membership.present = {"a", "small"}
    driver._spread_out()
    assert not driver._moves
    membership.present = {"a", "small", "large"}
    driver._spread_out()
    assert [move.address for move in driver._moves.values()] == ["large"]


def test_a_lost_stage_waits_for_a_worker_with_room_and_says_so() -> None:
    swarm = Swarm()
    membership = Membership(cast("Any", swarm), present={"a", "small"})
    driver = driver_of(membership, ["a", "gone"])
    driver.memory = {"a": (1 << 10) + 1, "small": 512, "large": 1 << 20}
    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        swarm.workers = {name: {"memory_limit": 0} for name in ("a", "small", "large")}

    driver.note = note
    assert driver._placed_again({1}) == ["a", "large"]
    (told,) = said
    assert "Stage 1 needs about 1.02 kB" in told
    assert "left is 512 B" in told


def test_who_waits_in_vain_for_room_is_told_how_much() -> None:
    membership = Membership(cast("Any", Swarm()), present={"small"})
    driver = driver_of(membership, ["small", "gone"])
    driver.memory = {"small": 512}
    driver.wait_seconds = 0.0
    with pytest.raises(WorkersLost, match=r"needs about 1.02 kB.*none has joined tcp://swarm:8786"):
        driver._placed_again({1})
