"""One cluster of two worker processes for the tests of a folder: starting it takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from local import local_cluster, wait_until_forgotten
from once import once, what_a_dag_follows_from

import dagflow.training.train  # noqa: F401
from dagflow.demo.gpt import GPT
from dagflow.graph.batch import flatten_batch
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag


@pytest.fixture(scope="session", autouse=True)
def models_of_the_zoo_are_captured_once() -> Iterator[None]:
    """Capturing was half of what these tests computed; it has tests of its own."""

    def capture_once(
        model: torch.nn.Module, batch: Any, *, loss: Any = None, dynamic: Any = None
    ) -> OperatorDag:
        def anew() -> OperatorDag:
            return capture(model, batch, loss=loss, dynamic=dynamic)

        name = "none" if loss is None else getattr(loss, "__qualname__", "<object>")
        if type(model).__module__ not in ("zoo", GPT.__module__) or "<" in name:
            return anew()  # of a module, or a function inside another, the name says too little
        tensors, constants = flatten_batch(batch)
        forms = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        alike = (what_a_dag_follows_from(model), type(batch), forms, constants, name, dynamic)
        return once(repr(alike), anew)

    ours = [m for name, m in sys.modules.items() if name.startswith("dagflow.training.")]
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for m in ours if vars(m).get("capture") is capture]:
            patch.setattr(module, "capture", capture_once)
        yield


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
