"""A server in this process, over a worker in this process: it starts in a second."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from local import local_client, wait_until
from server.tiny import save_tiny

import dagflow
from dagflow.server.protocol import Connection
from dagflow.server.serve import listen, server_of
from dagflow.server.service import ServerSettings, Service

KEYS = ("first key", "second")
SHORT = {"model": "tiny", "prompt": "A machine", "max_tokens": 2, "logit_bias": {"0": -100}}


class Impatient(Connection):
    """A connection whose client must hurry."""

    head_seconds = 0.5


@dataclass(frozen=True)
class Door:
    """Where the server is."""

    service: Service
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, *, key: str | None = KEYS[0], body: Any = SHORT, **headers: str) -> Any:
        """Return the response to a completion; ``content_type`` and the like become headers."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            given["Authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given.setdefault("Content-Type", "application/json")
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        return httpx.post(url, content=content, headers=given, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=60)

    def is_well(self) -> bool:
        return self.get("/health").status_code == 200


def head(
    path: str = "/v1/completions", key: str | None = KEYS[0], length: int | str = 0, **more: str
) -> bytes:
    """Return the head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += ["Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key is not None else []
    lines += [f"{name}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read a response with a Content-Length; return its status and JSON."""
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while line := file.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(file.read(length))


@contextmanager
def opened(folder: Path, keys: Sequence[str] = KEYS, body_seconds: float = 2.0) -> Iterator[Door]:
    """Serve a tiny model to whoever has one of the keys."""
    model = dagflow.load(save_tiny(folder / "tiny"), store=folder / "store", check=False)
    settings = ServerSettings(tuple(keys), max_running=4, body_seconds=body_seconds)
    with (
        local_client(1, processes=False) as client,
        dagflow.Deployment(model, client) as deployment,
        listen("127.0.0.1", 0) as listening,
    ):
        service = Service(deployment, "tiny", settings)
        server = server_of(service, "127.0.0.1", listening, Impatient)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started, "the server starts")
            yield Door(service, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
