"""A cluster of two worker processes for the tests of a folder: starting it takes seconds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from distributed import Client, LocalCluster


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=False) as connected,
    ):
        connected.run(torch.set_num_threads, 1)
        yield connected
