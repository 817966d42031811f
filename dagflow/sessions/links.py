"""Connections that last: dask's comms, held open between the driver and workers, and among these."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from distributed.comm import Comm, CommClosedError, connect
from distributed.protocol import to_serialize

from dagflow_tasks.results import TensorDict

Message = dict[str, Any]
OPERATION = "dagflow-sessions"
_CONNECT_SECONDS = 5.0


class Link:
    """Sends messages over a comm, one after the other, whoever sends them."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, address: str, arguments: Mapping[str, Any], hello: Message) -> Link:
        """Connect to a worker, and say who is there.

        Raises
        ------
        OSError
            If it can't be reached.
        """
        link = cls(await connect(address, timeout=_CONNECT_SECONDS, **arguments))
        await link.send({"op": OPERATION, "reply": False, **hello})
        return link

    async def send(self, message: Message, values: TensorDict | None = None) -> None:
        """Send a message, with tensors or without.

        Raises
        ------
        CommClosedError
        """
        if values is not None:
            message = {**message, "values": to_serialize(values)}
        async with self._turn:
            await self.comm.write(message)

    async def receive(self) -> Message:
        """Return the next message.

        Raises
        ------
        CommClosedError
        """
        message: Message = await self.comm.read()
        return message

    def close(self) -> None:
        self.comm.abort()


__all__ = ["OPERATION", "CommClosedError", "Link", "Message"]
