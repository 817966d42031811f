"""Work for a client that may leave at any moment, or never read what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dagflow.server.errors import ApiError

T = TypeVar("T")

MAX_BODY_BYTES = 10 * 2**20
# A client that is still sending doesn't read: what is too long is read on for a while, unkept.
_MAX_READ_BYTES = 4 * MAX_BODY_BYTES
# Who neither sends nor reads for so long is dropped.
PATIENCE_SECONDS = 60.0


async def read_body(request: Request, patience_seconds: float = PATIENCE_SECONDS) -> bytes:
    """Return a request's body.

    Raises
    ------
    ApiError
        413 if it is too long, 408 if the client stops in the middle.
    """
    parts: list[bytes] = []
    size = 0
    coming = aiter(request.stream())
    while True:
        try:
            part = await asyncio.wait_for(anext(coming), patience_seconds)
        except StopAsyncIteration:
            break
        except TimeoutError:
            message = f"Nothing of the body has come for {patience_seconds:g} s."
            raise ApiError(408, message, "request_timeout") from None
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > _MAX_READ_BYTES:
            break
    if size > MAX_BODY_BYTES:
        limit = f"{MAX_BODY_BYTES // 2**20} MiB"
        raise ApiError(413, f"The body is longer than {limit}.", "request_too_large")
    return b"".join(parts)


async def while_connected(receive: Receive, doing: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns; it is cancelled when the client leaves.

    Raises
    ------
    ClientDisconnect
    """
    work = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. Ends when the client leaves, or doesn't read for a minute.

    Parameters
    ----------
    events : async generator of str
    end : callable
        Called at the end, whatever it was.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], end: Callable[[], None]) -> None:
        # A proxy that gathers events before it passes them on would spoil them.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect, TimeoutError):
                await while_connected(receive, self._deliver(send))
        finally:
            self._end()

    async def _deliver(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._events) as events:
            async for event in events:
                body = {"type": "http.response.body", "body": event.encode(), "more_body": True}
                await asyncio.wait_for(send(body), PATIENCE_SECONDS)
        await send({"type": "http.response.body", "body": b""})
