"""The HTTP interface of a deployment: OpenAI's, and a page, health and metrics."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dagflow.errors import DagflowError
from dagflow.server.bodies import ChatBody, CompletionBody
from dagflow.server.errors import ApiError, as_api_error
from dagflow.server.gate import Gate, refuse
from dagflow.server.metrics import Counting
from dagflow.server.page import page
from dagflow.server.replies import ChatReply, CompletionReply
from dagflow.server.service import Service

_CLIENT_LEFT = 499


def make_app(service: Service, hosts: frozenset[str] | None = None) -> ASGIApp:
    """Return the application that serves a deployment.

    Parameters
    ----------
    hosts : frozenset of str, optional
        By which names it goes; by all that it is called if it isn't said. See `known_hosts`.
    """

    async def index(request: Request) -> Response:
        return page()

    async def health(request: Request) -> Response:
        found = service.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    async def metrics(request: Request) -> Response:
        running, waiting = service.admission.num_running, service.admission.num_waiting
        text = service.metrics.to_text(running, waiting, service.deployment.caches)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def models(request: Request) -> Response:
        service.keys.owner(request.headers)
        return JSONResponse({"object": "list", "data": [service.describe()]})

    async def model(request: Request) -> Response:
        service.keys.owner(request.headers)
        service.check_model(request.path_params["name"])
        return JSONResponse(service.describe())

    async def chat(request: Request) -> Response:
        return await service.respond(request, ChatBody, service.wanted_of_chat, ChatReply)

    async def completion(request: Request) -> Response:
        of_body = service.wanted_of_completion
        return await service.respond(request, CompletionBody, of_body, CompletionReply)

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _no_such_thing,
            ApiError: _refusal,
            DagflowError: _refusal,
            Exception: _refusal,
            ClientDisconnect: _nobody_listens,
        },
    )
    app.router.redirect_slashes = False  # a redirection leads to whichever host a request names
    settings = service.settings
    origins = settings.allow_origins
    friendly: ASGIApp = app
    if origins:
        friendly = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,
        )
    gate = Gate(friendly, hosts, origins, settings.body_seconds)
    return Counting(gate, service.metrics)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Not `request.url`: that is made of a Host, which may be anything.
    message = f"{request.method[:100]} {request.scope['path'][:100]}: {error.detail}."
    return refuse(ApiError(error.status_code, message, headers=error.headers))


async def _refusal(request: Request, error: Exception) -> Response:
    return refuse(as_api_error(error))


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
