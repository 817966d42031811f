"""What every request passes: is it for this server, and does a page of another origin send it?

Browsers let any page send requests to any server, also to one of this machine that nobody else reaches,
and by names that the page's owner points at it (DNS rebinding). They say which page it was, and by which
name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagflow.server.connection import BODY_SECONDS, MAX_BODY_BYTES
from dagflow.server.errors import ApiError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?", re.IGNORECASE)
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# Other origins' pages may neither show what is answered nor guess what it is.
_OF_ALL = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# A client that is still sending doesn't read: what nobody wants is read on for a while, unkept.
_MAX_UNWANTED_BYTES = 4 * MAX_BODY_BYTES


def is_loopback(listening: socket.socket) -> bool:
    """Tell whether only this machine reaches a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def known_hosts(
    host: str, listening: socket.socket, allowed: Iterable[str]
) -> frozenset[str] | None:
    """Return the names that a server goes by, or None if it goes by any.

    Who listens to other machines is known to them by names that nobody tells it; on loopback it is
    known which they are.

    Parameters
    ----------
    host : str
        What the server was told to listen at.
    allowed : iterable of str
        Other names; with some, a server that others reach goes by no more than these, either.
    """
    more = {name.lower() for name in allowed}
    if "*" in more or not (more or is_loopback(listening)):
        return None
    bound = {host, listening.getsockname()[0]}
    literal = {f"[{name}]" if ":" in name else name for name in bound}
    return frozenset({*_LOOPBACK, *(name.lower() for name in literal), *more})


class Gate:
    """An application that is reached by its own names, and from its own page or that of friends.

    Parameters
    ----------
    hosts : frozenset of str or None
        As `known_hosts` returns them.
    origins : iterable of str
        Whose pages may ask, as ``https://example.org``; ``*`` for all.
    body_seconds : float
        As long from a request's beginning, what is left of its body is read on.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str] | None,
        origins: Iterable[str],
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app = app
        self._body_seconds = body_seconds
        self._hosts = hosts
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, headers = self._app, Headers(scope=scope)
        try:
            self._check(headers)
        except ApiError as error:
            app = refuse(error)
        unwanted = _Unwanted(headers, receive, send, self._body_seconds)
        await app(scope, unwanted.receive, unwanted.send)

    def _check(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_mine(host):
            raise ApiError(
                421,
                f"This server doesn't go by the name {host[:100]!r}: ask for it by its own, or start it "
                "with --allow-host NAME.",
                "unknown_host",
            )
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return
        if _authority(origin.lower()) != host.lower().removesuffix(_default_port(origin)):
            raise ApiError(
                403,
                f"Pages of {origin[:100]!r} may not ask this server; start it with --allow-origin "
                f"{origin[:100]} to let them.",
                "foreign_origin",
            )

    def _is_mine(self, host: str) -> bool:
        if self._hosts is None and not host:
            return True  # HTTP/1.0, as load balancers ask whether a server is well
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        return self._hosts is None or not self._hosts.isdisjoint((found[1].lower(), host.lower()))


class _Unwanted:
    """Reads what is left of a body when its request has been answered, for a while.

    A connection that is closed while its client is sending is reset, and the answer with it.
    """

    def __init__(self, headers: Headers, receive: Receive, send: Send, seconds: float) -> None:
        self._is_coming = (
            "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        )
        # Who waits to be asked for it sends nothing when it has been answered.
        self._is_asked_for = "expect" not in headers
        self._receive, self._send = receive, send
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def receive(self) -> Message:
        self._is_asked_for = True
        message = await self._receive()
        self._is_coming = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_OF_ALL]
        elif self._is_coming and self._is_asked_for and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            message = {"type": "http.response.body", "body": b""}
            await self._read_on()
        await self._send(message)

    async def _read_on(self) -> None:
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                while self._is_coming and size < _MAX_UNWANTED_BYTES:
                    size += len((await self.receive()).get("body", b""))


def refuse(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _authority(origin: str) -> str:
    """Return host and port of an origin; an empty text for one without, such as ``null``.

    >>> _authority("http://localhost:8000"), _authority("https://name:443"), _authority("null")
    ('localhost:8000', 'name', '')
    """
    return origin.partition("://")[2].removesuffix(_default_port(origin))


def _default_port(origin: str) -> str:
    return _DEFAULT_PORTS.get(origin.partition("://")[0].lower(), ":")
