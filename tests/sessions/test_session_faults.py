"""Workers leave, freeze and come in the middle of an answer, which is the same all the same."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from families import greedy, stored

import dagflow
from dagflow.sessions.service import num_tokens_computed

PROMPT = [5, 17, 3, 42, 8, 23, 5, 17]
NUM_NEW = 24
# A frozen worker must be noticed and replaced within so long; what it takes to answer comes on top.
NOTICED_SECONDS = 3.0


class Swarm:
    """Worker processes that each hold one stage, or none, of a model."""

    def __init__(
        self, cluster: LocalCluster, client: Client, deployment: dagflow.Deployment
    ) -> None:
        self.cluster = cluster
        self.client = client
        self.deployment = deployment
        self.engine = deployment.engine

    def address(self, stage: int) -> str:
        return self.engine.address_of(stage)

    def pids(self) -> dict[str, int]:
        found: dict[str, int] = self.client.run(os.getpid)
        return found

    def computed(self, stage: int) -> int:
        """How many tokens a stage's present worker has computed."""
        address = self.address(stage)
        counts = self.client.run(num_tokens_computed, self.engine.name, workers=[address])
        found: int = counts[address][stage]
        return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dagflow.Model]:
    return stored("llama", tmp_path_factory.mktemp("models"))


@contextmanager
def a_swarm(model: dagflow.Model, num_workers: int, num_stages: int) -> Iterator[Swarm]:
    with (
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # A killed worker stays away: its nanny would bring it back otherwise.
        for nanny in cluster.workers.values():
            nanny.auto_restart = False
        client.run(torch.set_num_threads, 1)
        with dagflow.Deployment(model, client, num_stages=num_stages) as deployment:
            yield Swarm(cluster, client, deployment)


def answer(swarm: Swarm, then: Callable[[], None], at: int = 6) -> list[int]:
    """Answer, and do something when so many tokens have come."""
    request = swarm.deployment.request(
        PROMPT, max_new_tokens=NUM_NEW, ignore_end=True, speculate=False
    )
    found: list[int] = []
    for token in swarm.deployment.stream([request]):
        assert token.token is not None
        found.append(token.token)
        if len(found) == at:
            then()
    return found


@pytest.mark.parametrize("stages", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_killed_workers_are_replaced_and_the_tokens_stay_the_same(
    llama: tuple[Any, dagflow.Model], stages: list[int]
) -> None:
    with a_swarm(llama[1], 4, 3) as swarm:
        pids = swarm.pids()
        others = [stage for stage in range(3) if stage not in stages]

        def kill() -> None:
            for stage in stages:
                os.kill(pids[swarm.address(stage)], signal.SIGKILL)

        assert answer(swarm, kill) == greedy(llama[0], PROMPT, NUM_NEW)
        once = len(PROMPT) + NUM_NEW - 1
        # What was under way may come a second time, from where it was lost.
        assert all(once <= swarm.computed(stage) <= once + 1 for stage in others)


def test_a_frozen_worker_is_noticed_and_replaced_in_seconds(
    llama: tuple[Any, dagflow.Model],
) -> None:
    with a_swarm(llama[1], 3, 2) as swarm:
        pid = swarm.pids()[swarm.address(1)]
        frozen_at: list[float] = []

        def freeze() -> None:
            os.kill(pid, signal.SIGSTOP)
            frozen_at.append(time.monotonic())

        try:
            found = answer(swarm, freeze, at=NUM_NEW - 2)
            assert time.monotonic() - frozen_at[0] < NOTICED_SECONDS
        finally:
            os.kill(pid, signal.SIGCONT)
        assert found == greedy(llama[0], PROMPT, NUM_NEW)
