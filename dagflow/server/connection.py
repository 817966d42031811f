"""Work for a client that may leave at any moment, or never read what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dagflow.server.budget import Budget, Share
from dagflow.server.errors import ApiError

T = TypeVar("T")

# Who doesn't read for so long is dropped.
PATIENCE_SECONDS = 60.0
MAX_BODY_BYTES = 10 * 2**20
# All of a body must have come by then, however its bytes are spread.
BODY_SECONDS = 30.0
_JSON = "application/json"


def check_head(request: Request) -> int:
    """Return how many bytes a body says that it has; refuse one before it is read.

    JSON must say that it is: browsers let every page send what says nothing, to any server.

    Raises
    ------
    ApiError
        413 if it is too long, 415 if it isn't JSON.
    """
    length = int(request.headers.get("content-length", 0))  # which the HTTP parser has checked
    if length > MAX_BODY_BYTES:
        raise _too_long()
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != _JSON:
        found = f"found {kind[:100]!r}" if kind else "the request has none"
        message = f"The body's Content-Type must be {_JSON}; {found}."
        raise ApiError(415, message, "unsupported_media_type")
    return length


async def read_body(
    request: Request, patience_seconds: float = BODY_SECONDS, share: Share | None = None
) -> bytearray:
    """Return a request's body.

    Raises
    ------
    ApiError
        413 if it is too long, 408 if it hasn't come in time, 429 if there is no room for it now.
    """
    held = share or Share(Budget())
    body = bytearray()
    try:
        async with asyncio.timeout(patience_seconds):
            async for part in request.stream():
                if len(body) + len(part) > MAX_BODY_BYTES:
                    raise _too_long()
                held.hold(len(body) + len(part))
                body += part
    except TimeoutError:
        message = f"No more than {len(body)} bytes of the body has come in {patience_seconds:g} s."
        raise ApiError(408, message, "request_timeout") from None
    return body


def _too_long() -> ApiError:
    limit = f"{MAX_BODY_BYTES // 2**20} MiB"
    return ApiError(413, f"The body is longer than {limit}.", "request_too_large")


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
