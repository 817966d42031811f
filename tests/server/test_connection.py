"""Clients that stop in the middle, without leaving."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys

import pytest
from starlette.requests import Request
from starlette.types import Message

from dagflow.server.connection import read_body
from dagflow.server.errors import ApiError
from dagflow.server.serve import listen


def test_a_body_that_stops_coming_is_given_up() -> None:
    async def scenario() -> None:
        coming: asyncio.Queue[Message] = asyncio.Queue()
        coming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        with pytest.raises(ApiError, match="has come") as caught:
            await read_body(Request({"type": "http"}, coming.get), patience_seconds=0.05)
        assert caught.value.status == 408

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="the system can't do it")
def test_a_connection_whose_client_reads_nothing_is_dropped() -> None:
    with listen("127.0.0.1", 0, patience_seconds=0.5) as listening, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(listening.getsockname())
        with listening.accept()[0] as accepted, pytest.raises(TimeoutError) as caught:
            while True:
                accepted.sendall(b"." * 2**16)
    assert caught.value.errno == errno.ETIMEDOUT
