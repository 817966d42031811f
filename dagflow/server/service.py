"""One deployment as its clients see it: who may ask it, for what, and what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dagflow.errors import RequestTooLarge
from dagflow.models.defaults import served_defaults
from dagflow.server.admission import Admission, QueueFull
from dagflow.server.bodies import (
    MAX_CHOICES,
    Body,
    ChatBody,
    Common,
    CompletionBody,
    parse,
)
from dagflow.server.bridge import Answers, Ending
from dagflow.server.budget import Budget
from dagflow.server.connection import (
    BODY_SECONDS,
    EventStream,
    check_head,
    read_body,
    while_connected,
)
from dagflow.server.conversation import to_prompt
from dagflow.server.encoding import encode
from dagflow.server.errors import ApiError
from dagflow.server.idempotency import name_of, take_up, with_names, with_seed
from dagflow.server.keys import Keys
from dagflow.server.metrics import Metrics
from dagflow.server.protocol import ADMITTED
from dagflow.server.replies import Reply, Usage
from dagflow.server.structure import Limits
from dagflow.serving.answers import Request as Wanted
from dagflow.serving.deployment import Deployment
from dagflow.serving.kept import close

# A longer body is validated in a thread, one at a time: it takes milliseconds.
_SHORT_BYTES = 2**13
# Tokens of all prompts of one request, unless one alone may have more.
_MOST_PROMPT_TOKENS = 2**20
# Of one request; each takes some hundred bytes until its client has read it.
_MOST_LOGPROBS = 2**18


@dataclass(frozen=True)
class ServerSettings:
    """Who may ask, and how much at a time.

    Attributes
    ----------
    api_keys : tuple of str
        Empty for everybody.
    allow_hosts : tuple of str
        Names that clients call the server by, besides those that it knows; see `known_hosts`.
    allow_origins : tuple of str
        Whose pages may ask, besides its own; see `Gate`.
    max_running : int
        Requests that are answered at a time.
    max_queue : int
        Requests that may wait; those beyond are answered 429.
    body_seconds : float
        In which all of a body must have come.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_running: int = 8
    max_queue: int = 64
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    body_seconds: float = BODY_SECONDS


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
        self.keys = Keys(self.settings.api_keys)
        self.bodies = Budget()
        self._validating = asyncio.Semaphore(1)
        self.live: set[Answers] = set()
        self.is_ending = False
        self.created = int(time.time())
        # Read now: the first request shouldn't wait for it, and two shouldn't at the same time.
        self.tokenizer = self.deployment.model.tokenizer
        self.vocabulary = int(self.deployment.model.config["vocab_size"])
        generation = self.deployment.model.generation
        self.defaults = served_defaults(generation)
        self._default_new_tokens: int | None = generation.get("max_new_tokens")

    def admit(self, request: Request) -> tuple[str, int]:
        """Return whose a request is and how many bytes its body has, if that may be read.

        Raises
        ------
        ApiError
            401, 413, 415, or 429 if too many wait already.
        """
        owner = self.keys.owner(request.headers)
        length = check_head(request)
        try:
            self.admission.check()
        except QueueFull:
            raise self._queue_full() from None
        setattr(request.state, ADMITTED, True)
        return owner, length

    def _queue_full(self) -> ApiError:
        message = (
            f"{self.admission.num_running} requests are being answered and "
            f"{self.admission.num_waiting} wait: try again later."
        )
        retry = {"Retry-After": str(self.metrics.retry_seconds)}
        return ApiError(429, message, "queue_full", headers=retry)

    async def parse(self, kind: type[Body], text: bytearray) -> Body:
        """Return a request's body, checked."""
        longest = self.deployment.max_tokens
        num_tokens = max(longest, min(MAX_CHOICES * longest, _MOST_PROMPT_TOKENS))
        limits = Limits(num_values=Limits.num_values + num_tokens)
        if len(text) <= _SHORT_BYTES:
            body = parse(kind, text, limits)
        else:
            async with self._validating:
                body = await asyncio.to_thread(parse, kind, text, limits)
        self.check_model(body.model)
        return body

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name[:100]!r}; this server has {self.name!r}."
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

    def wanted_of_chat(self, body: ChatBody, owner: str) -> list[Wanted]:
        messages = [message.plain for message in body.messages]
        prompt, stops = to_prompt(self.tokenizer, messages, self.deployment.max_tokens)
        return self._wanted(body, [prompt], (*body.stops, *stops), "messages", owner)

    def wanted_of_completion(self, body: CompletionBody, owner: str) -> list[Wanted]:
        if not body.prompts or len(body.prompts) * body.n > MAX_CHOICES:
            message = (
                f"prompts times n is from 1 to {MAX_CHOICES}; found {len(body.prompts) * body.n}."
            )
            raise ApiError(400, message, "invalid_value", "prompt")
        return self._wanted(body, body.prompts, body.stops, "prompt", owner)

    def _wanted(
        self,
        body: Common,
        prompts: Sequence[str | list[int]],
        stops: tuple[str, ...],
        param: str,
        owner: str,
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
                        owner=owner,
                        **sampling,
                    )
                    for sampling in body.sampling(self.vocabulary, self.defaults)
                ]
            except RequestTooLarge as error:
                raise ApiError(400, str(error), "context_length_exceeded", param) from error
        if body.num_logprobs is not None:
            _check_logprobs(sum(one.max_new_tokens for one in found), body.num_logprobs)
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
            raise self._queue_full() from None
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

    async def respond(
        self,
        request: Request,
        kind: type[Body],
        wanted_of: Callable[[Body, str], list[Wanted]],
        reply: type[Reply],
    ) -> Response:
        """Admit a request, read its body, and answer it.

        Parameters
        ----------
        wanted_of : callable
            Says which answers a body of somebody wants.
        """
        (owner, length), key = self.admit(request), self.key_of(request)
        with self.bodies.share() as share:
            share.hold(length)
            text = await read_body(request, self.settings.body_seconds, share)
            body = with_seed(await self.parse(kind, text), key)
            del text
            wanted = await asyncio.to_thread(wanted_of, body, owner)
            return await self.answer(request, body, wanted, reply, key)

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
            content = await while_connected(request.receive, whole)
            return Response(content, media_type="application/json")
        finally:
            answers.cancel()


def _check_logprobs(num_tokens: int, count: int) -> None:
    """Refuse answers whose log-probabilities would take hundreds of megabytes."""
    if num_tokens * (1 + count) > _MOST_LOGPROBS:
        message = (
            f"{num_tokens} tokens with {1 + count} log-probabilities each are more than "
            f"{_MOST_LOGPROBS}: ask for fewer tokens, choices, or likely tokens."
        )
        raise ApiError(400, message, "invalid_value", "logprobs")


def _ending() -> ApiError:
    return ApiError(503, "The server is being ended.", "unavailable")
