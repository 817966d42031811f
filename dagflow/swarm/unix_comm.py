"""Unix-domain sockets for dask: addresses like ``unix:///tmp/dagflow-x1y2z3:17``.

The first part is a folder, the second the name of a socket in it. Who may enter the folder may
connect, and so run code in the process that listens, since dask unpickles what its peers send: the
folder belongs to one user and is closed to everybody else (mode 0700, as `tempfile` makes them).
Nothing listens on a port.

Importing this module makes the protocol known to dask. Frames, and how they are read and written,
are those of dask's own comm over TCP.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import dask
from distributed.comm import Comm, CommClosedError
from distributed.comm.core import BaseListener, Connector
from distributed.comm.registry import Backend, backends
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer

from dagflow.swarm.dask_internals import MAX_BUFFER_SIZE, UnixComm, convert_stream_closed_error

SCHEME = "unix"
PREFIX = f"{SCHEME}://"
# The kernel takes 107 bytes for a path, 103 on macOS.
MOST_FOLDER_BYTES = 90
_THIS_MACHINE = "127.0.0.1"
_MOST_TRIES = 1000


def is_available() -> bool:
    """Whether Python has unix-domain sockets here; on Windows it hasn't."""
    return hasattr(socket, "AF_UNIX")


def _folder_of(location: str) -> str:
    """Return an address's folder.

    >>> _folder_of("/tmp/dagflow-x1y2z3:17")
    '/tmp/dagflow-x1y2z3'
    """
    return location.rpartition(":")[0]


def _path_of(location: str) -> str:
    """Return the socket's path.

    >>> _path_of("/tmp/dagflow-x1y2z3:17")
    '/tmp/dagflow-x1y2z3/17'
    """
    folder, _, name = location.rpartition(":")
    return os.path.join(folder, name)


class UnixConnector(Connector):  # type: ignore[misc]
    """Connects to a socket."""

    async def connect(self, address: str, deserialize: bool = True, **_: Any) -> UnixComm:
        """Return the connection.

        Raises
        ------
        CommClosedError
            If nobody listens there, or the folder is somebody else's.
        """
        # dask's own streams read up to as much before anybody takes it.
        stream = IOStream(socket.socket(socket.AF_UNIX), max_buffer_size=MAX_BUFFER_SIZE)
        try:
            await stream.connect(_path_of(address))
        except StreamClosedError as error:
            convert_stream_closed_error(self, error)
        return UnixComm(stream, PREFIX + address, deserialize)


class _Server(TCPServer):
    """Hands each connection on."""

    def __init__(self, take: Callable[[IOStream], Awaitable[None]]) -> None:
        super().__init__(max_buffer_size=MAX_BUFFER_SIZE)
        self._take = take

    async def handle_stream(self, stream: IOStream, _: Any) -> None:
        await self._take(stream)


class UnixListener(BaseListener):  # type: ignore[misc]
    """Listens on a socket, in a folder that exists already; its name is a number that is free."""

    prefix = PREFIX

    def __init__(
        self,
        location: str,
        comm_handler: Callable[[Comm], Awaitable[None]],
        deserialize: bool = True,
        allow_offload: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self._folder = _folder_of(location)
        self._name = ""
        self._comm_handler = comm_handler
        self._deserialize = deserialize
        self._allow_offload = allow_offload
        self._server: _Server | None = None

    async def start(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.setblocking(False)
        self._name = _bind(listening, self._folder)
        listening.listen(int(dask.config.get("distributed.comm.socket-backlog")))
        self._server = _Server(self._take)
        self._server.add_socket(listening)

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    @property
    def listen_address(self) -> str:
        if not self._name:
            raise ValueError("This listener hasn't started: it has no address yet.")
        return f"{PREFIX}{self._folder}:{self._name}"

    @property
    def contact_address(self) -> str:
        return self.listen_address

    async def _take(self, stream: IOStream) -> None:
        if self._server is None:
            # Accepted just before it was stopped: whoever waits for an answer would wait for ever.
            stream.close()
            return
        comm = UnixComm(stream, self.listen_address, self._deserialize)
        comm.allow_offload = self._allow_offload
        try:
            await self.on_connection(comm)
        except CommClosedError:
            return  # left before it had said who it is
        await self._comm_handler(comm)


def _bind(listening: socket.socket, folder: str) -> str:
    """Bind to a name that nobody has in a folder, and return it."""
    for _ in range(_MOST_TRIES):
        name = str(1 + secrets.randbelow(10**6))
        try:
            listening.bind(os.path.join(folder, name))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return name
    raise OSError(f"No name is free for a socket in {folder}.")


class UnixBackend(Backend):  # type: ignore[misc]
    """What dask asks of a protocol."""

    def get_connector(self) -> UnixConnector:
        return UnixConnector()

    def get_listener(
        self, loc: str, handle_comm: Any, deserialize: bool, **arguments: Any
    ) -> UnixListener:
        return UnixListener(loc, handle_comm, deserialize, **arguments)

    def get_address_host(self, loc: str) -> str:
        # The same for all: dask compresses nothing between processes of one machine.
        return _THIS_MACHINE

    def resolve_address(self, loc: str) -> str:
        return loc

    def get_local_address_for(self, loc: str) -> str:
        return f"{_folder_of(loc)}:0"


backends[SCHEME] = UnixBackend()
