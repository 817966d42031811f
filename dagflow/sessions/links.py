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
    """Sends messages over a comm, one after the other, whoever sends them.

    Attributes
    ----------
    num_unheard : int
        How often somebody has looked since the last message came; for whoever looks to count.
    closed : asyncio.Event
        Set once this side knows that nothing comes any more.
    """

    def __init__(self, comm: Comm) -> None:
        self.num_unheard = 0
        self.closed = asyncio.Event()
        self._comm = comm
        self._turn = asyncio.Lock()
        self._writing: set[asyncio.Task[None]] = set()

    @property
    def is_sending(self) -> bool:
        return self._turn.locked()

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
        # A comm whose write is cancelled is closed by dask: who gives up waiting must not cancel it.
        writing = asyncio.ensure_future(self._write(message))
        self._writing.add(writing)
        writing.add_done_callback(self._written)
        await asyncio.shield(writing)

    async def receive(self) -> Message:
        """Return the next message.

        Raises
        ------
        CommClosedError
        """
        message: Message = await self._comm.read()
        self.num_unheard = 0
        return message

    def close(self) -> None:
        """End the connection; whoever is writing or reading gets a `CommClosedError`."""
        self.closed.set()
        self._comm.abort()

    async def _write(self, message: Message) -> None:
        async with self._turn:
            await self._comm.write(message)

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writing.discard(writing)
        if writing.cancelled() or writing.exception() is not None:
            self.close()


__all__ = ["OPERATION", "CommClosedError", "Link", "Message"]
