"""The HTTP interface of a deployment: OpenAI's, and a page, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dagflow.errors import DagflowError, RequestTooLarge
from dagflow.server.admission import Admission, QueueFull
from dagflow.server.bodies import MAX_CHOICES, ChatBody, Common, CompletionBody, parse
from dagflow.server.bridge import Answers, Ending
from dagflow.server.connection import EventStream, read_body, while_connected
from dagflow.server.conversation import to_prompt
from dagflow.server.encoding import encode
from dagflow.server.errors import ApiError, as_api_error
from dagflow.server.idempotency import name_of, take_up, with_names, with_seed
from dagflow.server.metrics import CONTENT_TYPE, Metrics
from dagflow.server.replies import ChatReply, CompletionReply, Reply, Usage
from dagflow.sessions.answers import Request as Wanted
from dagflow.sessions.defaults import served_defaults
from dagflow.sessions.deployment import Deployment
from dagflow.sessions.kept import close

_PAGE = Path(__file__).with_name("page.html")
_CLIENT_LEFT = 499


@dataclass(frozen=True)
class ServerSettings:
    """Who may ask, and how much at a time.

    Attributes
    ----------
    api_keys : tuple of str
        Empty for everybody.
    max_running : int
        Requests that are answered at a time.
    max_queue : int
        Requests that may wait; those beyond are answered 429.
    """

    api_keys: tuple[str, ...] = ()
    max_running: int = 8
    max_queue: int = 64


@dataclass
class Service:
    """One deployment, as clients see it.

    Attributes
    ----------
    name : str
        What clients call the model.
    """

    deployment: Deployment
    name: str
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.max_running, self.settings.max_queue)
        self.live: set[Answers] = set()
        self.is_ending = False
        self.created = int(time.time())
        # Read now: the first request shouldn't wait for it, and two shouldn't at the same time.
        self.tokenizer = self.deployment.model.tokenizer
        self.vocabulary = int(self.deployment.model.config["vocab_size"])
        generation = self.deployment.model.generation
        self.defaults = served_defaults(generation)
        self._default_new_tokens: int | None = generation.get("max_new_tokens")

    def check_key(self, request: Request) -> None:
        """Raise 401 unless the request has one of the keys."""
        if not self.settings.api_keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        known = [hmac.compare_digest(given, one.encode()) for one in self.settings.api_keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "The API key is wrong or missing: send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name!r}; this server has {self.name!r}."
            raise ApiError(404, message, "model_not_found", "model")

    def describe(self) -> dict[str, Any]:
        """Return the model as OpenAI's clients list it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dagflow",
            "max_model_len": self.deployment.max_tokens,
        }

    def health(self) -> dict[str, Any]:
        """Return what is going on, and why requests can't be answered now, if they can't."""
        engine = self.deployment.engine
        missing, count = engine.placement.missing(), len(engine.cut)
        reasons = [f"Stage {stage} of {count} has no worker." for stage in missing]
        if not engine.placement.num_workers:
            reasons = ["No worker is there."]
        if self.is_ending:
            reasons = ["The server is being ended."]
        return {
            "status": "unavailable" if reasons else "ok",
            "model": self.name,
            "running": self.admission.num_running,
            "waiting": self.admission.num_waiting,
            "workers": engine.placement.num_workers,
            "missing": reasons,
        }

    def wanted_of_chat(self, body: ChatBody) -> list[Wanted]:
        messages = [message.plain for message in body.messages]
        prompt, stops = to_prompt(self.tokenizer, messages, self.deployment.max_tokens)
        return self._wanted(body, [prompt], (*body.stops, *stops), "messages")

    def wanted_of_completion(self, body: CompletionBody) -> list[Wanted]:
        if not body.prompts or len(body.prompts) * body.n > MAX_CHOICES:
            message = (
                f"prompts times n is from 1 to {MAX_CHOICES}; found {len(body.prompts) * body.n}."
            )
            raise ApiError(400, message, "invalid_value", "prompt")
        return self._wanted(body, body.prompts, body.stops, "prompt")

    def _wanted(
        self, body: Common, prompts: Sequence[str | list[int]], stops: tuple[str, ...], param: str
    ) -> list[Wanted]:
        found = []
        limit = self.deployment.max_tokens
        for prompt in prompts:
            tokens = encode(self.tokenizer, prompt, limit) if isinstance(prompt, str) else prompt
            if len(tokens) >= limit:
                message = (
                    f"{param} has {len(tokens)} tokens or more; there is room for {limit} with the "
                    "answer."
                )
                raise ApiError(400, message, "context_length_exceeded", param)
            default = min(self._default_new_tokens or body.default_new_tokens, limit - len(tokens))
            try:
                found += [
                    self.deployment.request(
                        tokens,
                        max_new_tokens=body.max_new_tokens or default,
                        stop=stops,
                        logprobs=body.num_logprobs,
                        **sampling,
                    )
                    for sampling in body.sampling(self.vocabulary, self.defaults)
                ]
            except RequestTooLarge as error:
                raise ApiError(400, str(error), "context_length_exceeded", param) from error
        return found

    async def begin(self, wanted: Sequence[Wanted], num_prompt_tokens: int) -> Answers:
        """Begin answers when it is their turn.

        Raises
        ------
        ApiError
            429 if too many wait already, 503 if the server is being ended, 422 if other answers are
            kept under the same key.
        """
        try:
            await self.admission.enter()
        except QueueFull:
            message = (
                f"{self.admission.num_running} requests are being answered and "
                f"{self.admission.num_waiting} wait: try again later."
            )
            retry = {"Retry-After": str(self.metrics.retry_seconds)}
            raise ApiError(429, message, "queue_full", headers=retry) from None
        try:
            records = await take_up(self.deployment, wanted)
        except BaseException:
            self.admission.leave()
            raise
        if self.is_ending:
            close(records)
            self.admission.leave()
            raise _ending()
        began = time.monotonic()
        self.metrics.prompt_tokens += num_prompt_tokens

        def ended(how: Ending, num_tokens: int) -> None:
            self.metrics.add_request(how, num_tokens, time.monotonic() - began)
            self.live.discard(answers)
            self.admission.leave()

        answers = Answers(self.deployment, wanted, ended, records)
        self.live.add(answers)
        return answers

    def end(self) -> None:
        """End all answers, and begin none any more."""
        self.is_ending = True
        for answers in list(self.live):
            answers.fail(_ending())

    def key_of(self, request: Request) -> str | None:
        """Return under which name the answer to a request is kept, if it is."""
        return name_of(request) if self.deployment.is_keeping else None

    async def answer(
        self,
        request: Request,
        body: Common,
        wanted: list[Wanted],
        reply: type[Reply],
        key: str | None,
    ) -> Response:
        """Answer a request, whole or as a stream; end it when the client leaves."""
        wanted = with_names(wanted, key)
        # An answer more to the same prompt costs no prompt more.
        num_prompt_tokens = sum(len(one.prompt) for one in wanted[:: body.n])
        usage = Usage(num_prompt_tokens, body.n)
        answers = await while_connected(request.receive, self.begin(wanted, num_prompt_tokens))
        saying = reply(self.name, self.tokenizer, len(wanted), usage, key)
        if body.stream:
            pieces = saying.pieces(
                answers.tokens(), include_usage=body.stream_options.include_usage
            )
            return EventStream(pieces, answers.cancel)
        try:
            whole = saying.whole(answers.tokens())
            return JSONResponse(await while_connected(request.receive, whole))
        finally:
            answers.cancel()


def make_app(service: Service) -> ASGIApp:
    """Return the application that serves a deployment."""
    # FastAPI's own pages about an interface load scripts from elsewhere.
    app = FastAPI(openapi_url=None)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> Response:
        found = service.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        running, waiting = service.admission.num_running, service.admission.num_waiting
        text = service.metrics.to_text(running, waiting, service.deployment.caches)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        service.check_key(request)
        service.check_model(name)
        return service.describe()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        service.check_key(request)
        key = service.key_of(request)
        body = with_seed(parse(ChatBody, await read_body(request)), key)
        service.check_model(body.model)
        wanted = await asyncio.to_thread(service.wanted_of_chat, body)
        return await service.answer(request, body, wanted, ChatReply, key)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        service.check_key(request)
        key = service.key_of(request)
        body = with_seed(parse(CompletionBody, await read_body(request)), key)
        service.check_model(body.model)
        wanted = await asyncio.to_thread(service.wanted_of_completion, body)
        return await service.answer(request, body, wanted, CompletionReply, key)

    @app.exception_handler(HTTPException)
    async def no_such_thing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return refuse(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(ApiError)
    @app.exception_handler(DagflowError)
    @app.exception_handler(Exception)
    async def refusal(request: Request, error: Exception) -> Response:
        return refuse(as_api_error(error))

    @app.exception_handler(ClientDisconnect)
    async def nobody_listens(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_LEFT)

    return _Counting(app, service.metrics)


def _ending() -> ApiError:
    return ApiError(503, "The server is being ended.", "unavailable")


def refuse(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


class _Counting:
    """An application whose responses are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)
