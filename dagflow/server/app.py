"""The HTTP interface of a deployment: OpenAI's, and a page, health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
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
    # FastAPI's own pages about an interface load scripts from elsewhere, and its redirections lead to
    # whichever host a request names.
    app = FastAPI(openapi_url=None, redirect_slashes=False)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        return page()

    @app.get("/health")
    async def health() -> Response:
        found = service.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        running, waiting = service.admission.num_running, service.admission.num_waiting
        text = service.metrics.to_text(running, waiting, service.deployment.caches)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.keys.owner(request.headers)
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        service.keys.owner(request.headers)
        service.check_model(name)
        return service.describe()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.respond(request, ChatBody, service.wanted_of_chat, ChatReply)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        of_body = service.wanted_of_completion
        return await service.respond(request, CompletionBody, of_body, CompletionReply)

    @app.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> Response:
        # Not `request.url`: that is made of a Host, which may be anything.
        message = f"{request.method[:100]} {request.scope['path'][:100]}: {error.detail}."
        return refuse(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(ApiError)
    @app.exception_handler(DagflowError)
    @app.exception_handler(Exception)
    async def refusal(request: Request, error: Exception) -> Response:
        return refuse(as_api_error(error))

    @app.exception_handler(ClientDisconnect)
    async def nobody_listens(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_LEFT)

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
