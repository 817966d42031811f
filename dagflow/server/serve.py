"""`dagflow serve`: a model on a swarm, behind HTTP, until somebody ends it."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import uvicorn

from dagflow.errors import SettingsInvalid
from dagflow.models.defaults import shown
from dagflow.models.model import Model
from dagflow.server.app import make_app
from dagflow.server.connection import PATIENCE_SECONDS
from dagflow.server.gate import is_loopback, known_hosts
from dagflow.server.opening import open_model, public_name
from dagflow.server.protocol import BACKLOG, Connection
from dagflow.server.service import ServerSettings, Service
from dagflow.serving.deployment import Deployment
from dagflow.swarm.clusters import ClusterSettings

_LAST_WORDS_SECONDS = 3
# Connections that the system keeps until they are accepted.
_QUEUED = 2048
# Requests are heard in one thread, answers made in another, and texts tokenised in some more. Each waits
# so long for its turn when others have work; with Python's 5 ms, /health took several turns of that.
_SWITCH_SECONDS = 0.001


class _Server(uvicorn.Server):
    """A server that tells clients that it ends, instead of breaking off in mid-answer."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_QUEUED)  # asyncio has taken how many it accepts at a time for it

    async def on_tick(self, counter: int) -> bool:
        """Tell whether it is time to end: also if no answer can be made any more."""
        return await super().on_tick(counter) or self._service.deployment.engine.is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.end()
        await super().shutdown(sockets)


def serve(
    model: str,
    *,
    store: str,
    scheduler: str | None,
    host: str,
    port: int,
    stages: int | str,
    weights: str | None,
    check: bool = True,
    workers: int | None,
    cache_memory: int | None,
    prefix_reuse: bool,
    answers: str | None,
    draft: str | None = None,
    settings: ServerSettings,
    note: Callable[[str], None] = print,
) -> None:
    """Serve a model until Ctrl-C or a SIGTERM.

    Parameters
    ----------
    answers : str or None
        Folder or URL that keeps the answers to requests with an Idempotency-Key.

    Raises
    ------
    StoreInUse
        If another server keeps its answers there.
    SettingsInvalid
        If there is no such model, or somebody else has the port.
    WorkersLost
        Or `SchedulerLost`, if the scheduler goes away and none comes back at its address in time.
    """
    # A service manager ends with SIGTERM what a terminal ends with Ctrl-C: workers end with us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with suppress(KeyboardInterrupt), listen(host, port) as listening:
        found = open_model(model, store, weights, check)
        small = open_model(draft, store, check=check) if draft else None
        cluster = ClusterSettings(num_workers=workers)
        with Deployment(
            found,
            scheduler,
            num_stages=stages,
            cluster=cluster,
            cache_bytes=cache_memory,
            prefix_reuse=prefix_reuse,
            verbose=True,
            store=answers,
            draft=small,
        ) as deployment:
            service = Service(deployment, public_name(model), settings)
            place = f"[{host}]" if ":" in host else host
            url = f"http://{place}:{listening.getsockname()[1]}"
            count, room = len(deployment.engine.cut), deployment.caches.capacity_tokens
            note(
                f"{service.name} in {count} stages, with room for {room} tokens at a time: {url}/v1 "
                f"for programs, {url} for people."
            )
            for said in describe(found, service.defaults):
                note(said)
            if not (settings.api_keys or is_loopback(listening)):
                note(
                    "Whoever reaches this machine can use the model: --api-key KEY keeps others out."
                )
            # What is there now stays: looking through all of it for garbage, every now and then,
            # stopped every thread for a third of a second.
            gc.collect()
            gc.freeze()
            server_of(service, host, listening).run(sockets=[listening])
            deployment.engine.check()


def server_of(
    service: Service, host: str, listening: socket.socket, http: type[Connection] = Connection
) -> uvicorn.Server:
    """Return what serves a deployment at a socket; its `run` takes that.

    Parameters
    ----------
    host : str
        What it was told to listen at.
    """
    hosts = known_hosts(host, listening, service.settings.allow_hosts)
    config = uvicorn.Config(
        make_app(service, hosts),
        http=http,
        ws="none",
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        # Warnings are of what strangers send.
        log_level="error",
        lifespan="off",
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )
    return _Server(config, service)


def describe(model: Model, defaults: Mapping[str, Any]) -> list[str]:
    """Return what somebody who starts a server is told of its model.

    Parameters
    ----------
    defaults : mapping
        Options of requests that don't give them.
    """
    told = list(model.notes)
    if defaults:
        told.append(
            f"Unless a request says otherwise: {shown(defaults)} (the model's generation_config.json)."
        )
    checked = model.description.get("check")
    if checked and checked["against"] is not None:
        told.append(
            f"It was compared with transformers on {checked['against']}, in "
            f"{checked['seconds']:.1f} s."
        )
    elif "check" in model.description:
        told.append(
            "It wasn't compared with transformers: "
            + (
                "memory doesn't hold a copy of it."
                if checked
                else "check was off when it was loaded."
            )
        )
    return told


def listen(host: str, port: int, patience_seconds: float = PATIENCE_SECONDS) -> socket.socket:
    """Take the port before anything is read or started for it.

    Parameters
    ----------
    patience_seconds : float
        Connections whose clients read nothing for so long are dropped, where the system can do so
        (Linux): what is left to be sent would lie here for as long as they like.

    Raises
    ------
    SettingsInvalid
        If somebody else has the port.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_QUEUED)
    except OSError as error:
        raise SettingsInvalid(
            f"Can't listen at {host}:{port} ({error.strerror or error}): choose another --port or --host."
        ) from error
    if sys.platform == "linux":  # connections inherit it
        milliseconds = int(patience_seconds * 1000)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listening
