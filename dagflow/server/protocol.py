"""A connection: how long it may wait for what, and how many there may be.

Builds on uvicorn's HTTP/1.1 protocol; what it overrides and reads of that is under test.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import sys
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dagflow.server.errors import ApiError

if sys.platform != "win32":
    import resource

# How long a client may still send before its connection is closed.
_LINGER_SECONDS = 2.0
_MOST_CONNECTIONS = 4096
# Descriptors for everything else: workers, the store, and connections not counted yet.
_RESERVED = 256
# Accepted at a time; they aren't counted before they are set up.
BACKLOG = 64
ADMITTED = "is_admitted"


def most_connections() -> int:
    """How many connections there may be: as many as the process has descriptors for."""
    if sys.platform == "win32":
        return _MOST_CONNECTIONS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(_MOST_CONNECTIONS, limit - min(_RESERVED, limit // 2))


class Connection(H11Protocol):
    """One client's connection.

    One that waits for a request, or whose request hasn't been admitted (whose key isn't known to be
    right), costs its client nothing: when there are too many, those that have waited longest make
    room for others.

    Attributes
    ----------
    head_seconds : float
        In which all of a request's head must have come, however its bytes are spread.
    """

    head_seconds = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False
        self._since = self.loop.time()
        self._wait()
        if len(self.connections) > most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        super().data_received(data)
        if self._is_asking:
            self._stop_waiting()
        elif self._timer is None:
            self._wait()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            self._linger()  # what is left of the body would be taken for the next request
            return
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP; called where the parser's error is handled."""
        hint = getattr(sys.exception(), "error_status_hint", 400)
        status = 431 if hint == 431 else 400  # it isn't the server that fails
        self._refuse(ApiError(status, "This is no request of HTTP/1.1, or its head is too long."))

    @property
    def _is_asking(self) -> bool:
        return self._is_over or (self.cycle is not None and not self.cycle.response_complete)

    @property
    def _is_admitted(self) -> bool:
        """Whether a request is being answered that may be."""
        is_admitted: bool = self.scope is not None and self.scope["state"].get(ADMITTED, False)
        return self._is_asking and not self._is_over and is_admitted

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            self._refuse(
                ApiError(408, f"The request's head hasn't come in {self.head_seconds:g} s.")
            )
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in mid-answer
            return
        body = json.dumps(error.body).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._linger()

    def _linger(self) -> None:
        """Close the connection once its client has had time to read what it was answered.

        Were it closed while the client is sending, it would be reset, and the answer lost.
        """
        self._is_over = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.is_closing():
            return
        with suppress(OSError):  # the client has left already
            self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _make_room(self) -> None:
        """Drop an eighth of the connections at once, so that this is done seldom."""
        waiting = [
            one
            for one in self.connections
            if isinstance(one, Connection) and one is not self and not one._is_admitted
        ]
        longest = heapq.nsmallest(len(waiting) // 8 + 1, waiting, key=lambda one: one._since)
        for one in longest or [self]:
            self.connections.discard(one)
            one.transport.abort()
