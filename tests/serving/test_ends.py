"""Deployments begin with workers that come late, and of sessions that have ended nothing is left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from families import stored
from local import wait_until

import dagflow
from dagflow.errors import WorkersLost
from dagflow.serving.stage_server import sessions_open
from dagflow.swarm.links import Link


def refuse_connections(monkeypatch: pytest.MonkeyPatch, times: float) -> list[str]:
    """Have workers refuse the first connections; return the addresses that were asked for."""
    asked: list[str] = []
    connect = Link.open

    async def open_later(address: str, *arguments: Any) -> Link:
        asked.append(address)
        if len(asked) <= times:
            raise ConnectionRefusedError
        return await connect(address, *arguments)

    monkeypatch.setattr(Link, "open", open_later)
    return asked


def test_workers_that_refuse_at_first_are_asked_again(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = stored("llama", tmp_path)
    asked = refuse_connections(monkeypatch, 4)
    with dagflow.Deployment(model, client, num_stages=2) as deployment:
        assert deployment.engine.placement.num_workers > 0
    assert len(asked) > 4


def test_workers_that_go_on_refusing_are_not_asked_for_ever(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = stored("llama", tmp_path)
    asked = refuse_connections(monkeypatch, float("inf"))
    settings = dagflow.ClusterSettings(wait_seconds=0.5)
    with pytest.raises(WorkersLost, match=r"0 of 1 workers joined tcp.* within 0.5 s"):
        dagflow.Deployment(model, client, num_stages=2, cluster=settings)
    assert len(asked) >= 4


def test_a_session_whose_end_is_cancelled_is_forgotten_on_all_stages(
    client: Client, tmp_path: Path
) -> None:
    _, model = stored("llama", tmp_path)
    with dagflow.Deployment(model, client, num_stages=2) as deployment:
        engine = deployment.engine

        def num_sessions() -> int:
            stages = [
                stage for held in client.run(sessions_open).values() for stage in held.items()
            ]
            return sum(count for (name, _), count in stages if name == engine.name)

        async def end_and_be_cancelled() -> None:
            live = await engine.open()
            await engine.feed(live, [5, 17, 3])
            ending = asyncio.ensure_future(engine.end(live))
            await asyncio.sleep(0)
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

        with dagflow.Session(deployment) as session:
            session.prefill([5, 17, 3])
            assert num_sessions() == 2
            engine.call(end_and_be_cancelled())
            wait_until(lambda: num_sessions() == 2, "only the open one is left")
        wait_until(lambda: num_sessions() == 0, "nothing is left")
