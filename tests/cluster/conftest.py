"""One cluster of two worker processes for the tests of a folder: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from local import local_cluster, wait_until


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2) as local:
        yield local


@pytest.fixture(scope="session")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as connected:
        # Bit for bit the same whichever process computes.
        connected.run(torch.set_num_threads, 1)
        yield connected


def wait_until_forgotten(cluster: LocalCluster) -> None:
    tasks = cluster.scheduler.tasks
    wait_until(lambda: not tasks, lambda: f"the tasks {list(tasks)[:5]} are forgotten")


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves a scheduler that knows no task: a run that is over costs nothing."""
    used = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    yield
    if used is not None:
        wait_until_forgotten(used)


@pytest.fixture
def refused(cluster: LocalCluster, client: Client) -> Callable[..., Any]:
    """Expect an error that matches, and a scheduler that has heard of no task."""

    @contextmanager
    def expecting(error: type[Exception], *words: str) -> Iterator[None]:
        wait_until_forgotten(cluster)
        before = cluster.scheduler.transition_counter
        with pytest.raises(error) as caught:
            yield
        for word in words:
            assert word in str(caught.value)
        assert cluster.scheduler.transition_counter == before

    return expecting
