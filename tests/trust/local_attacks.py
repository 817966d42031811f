"""What somebody with an account on the same machine can try against a dask cluster there."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from distributed.comm import connect
from distributed.comm.tcp import _add_frames_header
from distributed.protocol import dumps
from distributed.protocol.serialize import ToPickle
from distributed.security import Security

Place = tuple[str, int] | str
"""A port of this machine (host and number), or a socket's path."""

NOBODY = 65534
_PATIENCE_SECONDS = 0.5


class Bomb:
    """Makes a folder in whatever process unpickles it."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self._path,)


def bomb(path: Path) -> bytes:
    """Return the bytes of a first message of dask's protocol that brings a bomb.

    It is read in the handshake, before any operation: `Comm.on_connection`.
    """
    frames, _, _ = _add_frames_header(dumps({"x": ToPickle(Bomb(path))}))
    return b"".join(bytes(frame) for frame in frames)


def listening() -> set[tuple[int, Place]]:
    """Return where this process and those that it has started listen, with their ids."""
    here = psutil.Process()
    found: set[tuple[int, Place]] = set()
    for process in (here, *here.children(recursive=True)):
        try:
            sockets = process.net_connections("all")
        except psutil.Error:
            continue  # it has ended
        for one in sockets:
            if one.family == socket.AF_UNIX:
                found |= {(process.pid, str(one.laddr))} if one.laddr else set()
            elif one.status == psutil.CONN_LISTEN:
                found.add((process.pid, (one.laddr.ip, one.laddr.port)))
    return found


def send(place: Place, data: bytes, context: ssl.SSLContext | None = None) -> str:
    """Send to a place and wait for it to hang up; return what came of it."""
    if isinstance(place, str):
        connection = socket.socket(socket.AF_UNIX)
    else:
        connection = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET)
    with connection:
        connection.settimeout(_PATIENCE_SECONDS)
        try:
            connection.connect(place)
            talking = context.wrap_socket(connection) if context else connection
            with talking:
                talking.sendall(data)
                received = 0
                while chunk := talking.recv(1 << 16):
                    received += len(chunk)
            return f"hung up after {received} bytes"
        except OSError as error:
            return type(error).__name__


def as_nobody(places: Iterable[Place], data: bytes) -> dict[Place, str]:
    """Send to places from a process of another user."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_as_nobody, args=(list(places), data, sending))
    process.start()
    sending.close()
    try:
        found: dict[Place, str] = receiving.recv()
        return found
    finally:
        process.join()


def _send_as_nobody(places: list[Place], data: bytes, answers: Any) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    answers.send({place: send(place, data) for place in places})


def strangers_context() -> ssl.SSLContext:
    """Return what a client with a certificate of its own making connects with."""
    arguments = Security.temporary().get_connection_args("client")
    context: ssl.SSLContext = arguments["ssl_context"]
    context.verify_mode = ssl.CERT_NONE  # whoever it is, this one talks to it
    return context


def is_let_in(address: str, security: Security | None = None) -> bool:
    """Tell whether dask's own client would get through the handshake."""
    arguments = (security or Security()).get_connection_args("client")

    async def knock() -> None:
        comm = await asyncio.wait_for(connect(address, timeout=1, **arguments), 2)
        comm.abort()

    try:
        asyncio.run(knock())
    except (OSError, TimeoutError):
        return False
    return True
