"""What is left of sessions that have ended: nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distributed import Client
from families import stored
from local import wait_until

import dagflow
from dagflow.sessions.service import sessions_open


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
