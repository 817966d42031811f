"""Connections that last: dask's comms, held open between the driver and workers, and among these."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from distributed.comm import Comm, CommClosedError, connect
from distributed.protocol import to_serialize

from dagflow.swarm.wire import pack_tensors, unpack_tensors
from dagflow_tasks.errors import GarbageReceived
from dagflow_tasks.tensors import TensorDict

Message = dict[str, Any]
OPERATION = "dagflow-sessions"
_CONNECT_SECONDS = 5.0
# A token's hidden state is copied into the message: dask's serializers would take longer.
_COPIED_BYTES = 1 << 15


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
        small = values is None or sum(t.nbytes for t in values.values()) <= _COPIED_BYTES
        if values is not None:
            message = {**message, "values": _copied(values) if small else to_serialize(values)}
        if small and not self._turn.locked():
            await self._write(message)  # doesn't wait for anything, so nobody can give up waiting
            return
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
            Also if what came can't be right: the connection is closed then, and the other side is
            taken for gone.
        """
        try:
            message: Message = await self._comm.read()
            self.num_unheard = 0
            copied = message.get("values")
            if isinstance(copied, (tuple, list)):
                headers, frames = copied
                message["values"] = TensorDict(unpack_tensors(headers, frames))
            return message
        except (GarbageReceived, ValueError, AttributeError) as error:
            self.close()
            raise CommClosedError(f"{self._comm.peer_address} was hung up on: {error}") from error

    def close(self) -> None:
        """End the connection; whoever is writing or reading gets a `CommClosedError`."""
        self.closed.set()
        self._comm.abort()

    async def _write(self, message: Message) -> None:
        try:
            async with self._turn:
                await self._comm.write(message)
        except BaseException:
            self.close()
            raise

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writing.discard(writing)
        if not writing.cancelled():
            writing.exception()  # whoever gave up waiting doesn't ask


def _copied(values: TensorDict) -> tuple[list[dict[str, Any]], list[bytes]]:
    headers, frames = pack_tensors(values, None)
    return headers, [bytes(frame) for frame in frames]


__all__ = ["OPERATION", "CommClosedError", "Link", "Message"]
