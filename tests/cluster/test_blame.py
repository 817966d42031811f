"""Who is blamed for what fails: the worker of the task that failed, of the stage that sent garbage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from distributed import Future
from local import local_client, wait_until
from training_driver import driver_of

from dagflow.swarm.clusters import ClusterSettings, open_cluster
from dagflow.swarm.dask_internals import Task, TaskRef
from dagflow.swarm.membership import Membership
from dagflow.training.dask_tasks import Key
from dagflow.training.dispatch import Disturbed
from dagflow.training.driver import Driver
from dagflow.training.recovery_protocol import Stop
from dagflow_storage import Store
from dagflow_tasks.errors import GarbageReceived


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """A driver of two stages on two workers."""
    with (
        local_client(2, processes=False) as client,
        open_cluster(client, ClusterSettings(), Store(str(tmp_path))),
        Membership(client) as membership,
    ):
        yield driver_of(membership, sorted(membership.present))


def handed_out(driver: Driver, tasks: dict[Key, Any], wanted: Key) -> Future:
    """Hand out tasks as the driver's step, and return when the wanted one is done or has failed."""
    future = driver.dispatch.submit(tasks, [wanted])[wanted]
    wait_until(future.done, f"{wanted} is done")
    return future


def failing(driver: Driver, step: int, stage: int) -> dict[Key, Any]:
    """An update that fails, and what depends on it."""

    def fail() -> NoReturn:
        raise ZeroDivisionError

    update, report = (driver.dispatch.graph.key(kind, step, stage) for kind in ("update", "report"))
    return {update: Task(update, fail), report: Task(report, str, TaskRef(update))}


def tell_what_became_of(driver: Driver, future: Future) -> str:
    """Wait for a task that fails, and return what the driver makes of it."""
    with pytest.raises(Disturbed) as caught:
        driver.dispatch.result(future)
    driver._take_in(caught.value)
    assert isinstance(driver._duty, Stop)
    return driver._duty.why


def test_the_task_that_failed_is_to_blame_and_not_the_latest_that_has(driver: Driver) -> None:
    first = handed_out(driver, failing(driver, 0, 0), driver.dispatch.graph.key("report", 0, 0))
    later = handed_out(driver, failing(driver, 0, 1), driver.dispatch.graph.key("report", 0, 1))
    why = tell_what_became_of(driver, first)
    assert f"update of stage 0 in step 0 failed on {driver.addresses[0]}" in why
    assert list(driver.recovery.excluded) == driver.addresses[:1]
    later.release()


def test_what_was_handed_out_before_a_rebuilding_is_blamed_as_well(driver: Driver) -> None:
    # As a snapshot that is still being written is.
    first = handed_out(driver, failing(driver, 0, 1), driver.dispatch.graph.key("report", 0, 1))
    driver.dispatch.assign(driver.addresses, 1, "89abcdef")
    assert "failed on" in tell_what_became_of(driver, first)
    assert list(driver.recovery.excluded) == driver.addresses[1:]


def test_garbage_is_blamed_on_where_the_stage_was_that_sent_it(driver: Driver) -> None:
    before = list(driver.addresses)

    def refuse() -> NoReturn:
        raise GarbageReceived("Stage 0 sent garbage.", 0)

    key = driver.dispatch.graph.key("update", 0, 1)
    refused = handed_out(driver, {key: Task(key, refuse)}, key)
    driver.dispatch.assign([before[1], before[1]], 1, "89abcdef")
    again = driver.dispatch.graph.key("update", 0, 1)
    fine = handed_out(driver, {again: Task(again, int)}, again)
    assert "sent garbage" in tell_what_became_of(driver, refused)
    assert list(driver.recovery.excluded) == before[:1]
    fine.release()
