"""The driver hands out what `Recovery` decides, and lets go of it again."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from training_driver import Swarm, driver_of

from dagflow.swarm.membership import Membership
from dagflow.training.driver import Disturbed
from dagflow.training.recovery_protocol import Phase


def stalled(worker: str) -> tuple[float, dict[str, Any]]:
    return 0.0, {"action": "stalled", "worker": worker, "seconds": 5.0, "silent": False}


def test_a_stage_is_copied_while_its_worker_is_slow_and_let_go_of_when_it_is_back() -> None:
    swarm = Swarm()
    membership = Membership(cast("Any", swarm), present={"a", "b", "c"})
    driver = driver_of(membership, ["a", "b"])
    said: list[str] = []
    driver.events.listen(lambda event: said.append(event.text()))
    membership.hear(stalled("a"))
    driver._tell(driver._lookout.roster())
    (copy,) = swarm.handed_out
    assert (copy.key[0].partition("-")[0], *copy.key[1:]) == ("restore", 0, 0)
    assert not copy.released
    membership.hear((0.0, {"action": "recovered", "worker": "a"}))
    driver._tell(driver._lookout.roster())
    assert copy.released
    assert said[-1] == "The worker a is back, with stage 0."


def test_a_copy_that_is_there_ends_the_wait_for_the_slow_worker() -> None:
    swarm = Swarm()
    membership = Membership(cast("Any", swarm), present={"a", "b", "c"})
    driver = driver_of(membership, ["a", "b"])
    membership.hear(stalled("a"))
    driver._tell(driver._lookout.roster())
    swarm.handed_out[0].status = "finished"
    swarm.status = "running"
    membership._refreshed = math.inf  # nobody asks this scheduler
    with pytest.raises(Disturbed, match="The worker a has stalled; its stages go elsewhere"):
        driver._look_around()
    assert driver.recovery.phase is Phase.STOPPING


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
