"""Connections that last: what goes in comes out, in order, whoever gives up waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from distributed.comm import listen

from dagflow.swarm import wire
from dagflow.swarm.links import CommClosedError, Link
from dagflow_tasks.tensors import TensorDict

wire.register()


def over_a_link(talk: Callable[[Link, Link], Awaitable[None]]) -> None:
    """Have two ends of a connection on this machine talk."""

    async def main() -> None:
        accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        ended = asyncio.Event()

        async def accept(comm: Any) -> None:
            accepted.set_result(comm)
            await ended.wait()

        listener = await listen("tcp://127.0.0.1:0", accept)
        near = await Link.open(listener.contact_address, {}, {"role": "test"})
        far = Link(await accepted)
        assert (await far.receive())["role"] == "test"
        try:
            await talk(near, far)
        finally:
            near.close()
            far.close()
            ended.set()
            listener.stop()

    asyncio.run(main())


SHAPES = [(0, 3), (1, 64), (1, 8192), (700, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_tensors_arrive_as_they_are_small_or_large(dtype: torch.dtype) -> None:
    async def talk(near: Link, far: Link) -> None:
        for number, shape in enumerate(SHAPES):
            tensor = torch.arange(shape[0] * shape[1]).reshape(shape).to(dtype)
            transposed = tensor.T if number % 2 else tensor
            await near.send({"number": number}, TensorDict({"a": transposed, "b": tensor[:0]}))
            message = await far.receive()
            assert message["number"] == number
            assert sorted(message["values"]) == ["a", "b"]
            assert message["values"]["a"].dtype == dtype
            assert torch.equal(message["values"]["a"], transposed)

    over_a_link(talk)


def test_messages_keep_their_order_and_a_sender_that_gives_up_breaks_nothing() -> None:
    big = TensorDict({"a": torch.zeros(8 << 20)})  # dask packs so much in another thread

    async def talk(near: Link, far: Link) -> None:
        sending = [asyncio.ensure_future(near.send({"number": 0}, big))]
        await asyncio.sleep(0)
        sending += [asyncio.ensure_future(near.send({"number": n})) for n in range(1, 4)]
        await asyncio.sleep(0)
        sending[0].cancel()
        sending[2].cancel()
        found = [(await far.receive())["number"] for _ in range(4)]
        assert found == [0, 1, 2, 3]
        assert not near.closed.is_set()

    over_a_link(talk)


def test_a_link_whose_other_end_is_gone_says_so() -> None:
    async def talk(near: Link, far: Link) -> None:
        far.close()
        with pytest.raises(CommClosedError):
            await near.receive()
        near.close()
        with pytest.raises(CommClosedError):
            await near.send({"number": 0}, TensorDict({"a": torch.zeros(1)}))

    over_a_link(talk)
