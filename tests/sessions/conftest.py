"""What the tests of the folder share; starting two worker processes takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import Client
from families import stored
from local import local_client

import dagflow


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
