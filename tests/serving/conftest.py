"""What the tests of the folder share; starting two worker processes takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import Client
from families import stored
from local import local_client
from once import once, what_a_dag_follows_from

import dagflow
from dagflow.graph.dag import OperatorDag
from dagflow.graph.decoder import capture_decoder
from dagflow.models import loading
from dagflow.models.checking import check_capture
from dagflow.models.source import Source


@pytest.fixture(scope="session", autouse=True)
def alike_models_are_captured_once() -> Iterator[None]:
    """Capturing was most of what these tests computed; it has tests of its own, as comparing has."""

    def capture_once(model: torch.nn.Module) -> OperatorDag:
        return once(repr(what_a_dag_follows_from(model)), lambda: capture_decoder(model))

    compared: dict[Any, dict[str, Any]] = {}

    def check_once(source: Source, *args: Any) -> dict[str, Any]:
        key = (what_a_dag_follows_from(source.model), *map(str, args[2:]))
        if key not in compared:
            compared[key] = check_capture(source, *args)
        return compared[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "capture_decoder", capture_once)
        patch.setattr(loading, "check_capture", check_once)
        yield


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with local_client(2) as connected:
        connected.run(torch.set_num_threads, 1)
        yield connected


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dagflow.Model]:
    return stored("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def deployed(
    client: Client, llama: tuple[Any, dagflow.Model]
) -> Iterator[tuple[Any, dagflow.Deployment]]:
    model, loaded = llama
    with dagflow.Deployment(loaded, client) as deployment:
        yield model, deployment
