"""A model on a swarm, ready to generate."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from distributed import Client

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.run.clusters import ClusterSettings, open_cluster, roster
from dagflow.sessions.answers import Answer, Request, Token
from dagflow.sessions.draft import Draft
from dagflow.sessions.engine import Engine
from dagflow.sessions.models import Model
from dagflow.sessions.pool import CacheState
from dagflow.sessions.sampling import Sampling

_DEFAULT_NEW_TOKENS = 128


class Deployment:
    """A model on a swarm: its stages are open until it is closed. A context manager.

    Parameters
    ----------
    model : Model
    client : Client, address, or None
        None starts a local cluster.
    num_stages : int or "auto"
        "auto" takes one a worker. With fewer, the other workers are spares.
    cache_bytes : int, optional
        What the caches of all sessions together may take on each worker: keys, values, and the rows
        that are kept for the next stage. By default half of what weights leave of its memory limit.
    prefix_reuse : bool
        Whether requests go on from tokens that others, running or ended, have computed.
    cluster : ClusterSettings
        How to start a local one, and how long to wait for workers.
    draft : Model, str, Path or torch module, optional
        A small model of the same vocabulary (or what `load` takes), which guesses in this process what
        the large one will say. It changes no answer.
    verbose : bool
        Print what happens to workers.

    Raises
    ------
    StageTooLarge
        If the workers' memory doesn't hold the model.
    WorkersLost
    """

    def __init__(
        self,
        model: Model,
        client: Client | str | None = None,
        *,
        num_stages: int | str = "auto",
        cluster: ClusterSettings | None = None,
        cache_bytes: int | None = None,
        prefix_reuse: bool = True,
        draft: Model | str | Path | torch.nn.Module | None = None,
        verbose: bool = False,
    ) -> None:
        if cache_bytes is not None and cache_bytes < 1:
            raise SettingsInvalid(f"cache_bytes counts from 1; found {cache_bytes}.")
        settings = cluster or ClusterSettings()
        self.model = model
        self._stack = ExitStack()
        self._draft: Draft | None = None
        try:
            if draft is not None:
                self._draft = Draft(draft, model)
                self._stack.callback(self._draft.close)
            connected = self._stack.enter_context(open_cluster(client, settings, model.ref.store))
            workers = roster(connected, settings.num_workers or 1, settings.wait_seconds)
            count = _number_of_stages(num_stages, len(workers))
            self.engine = Engine(
                model,
                connected,
                count,
                wait_seconds=settings.wait_seconds,
                cache_bytes=cache_bytes,
                prefix_reuse=prefix_reuse,
            )
            if verbose:
                self.engine.note = print
            self._stack.callback(self.engine.close)
            self.engine.start()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Forget the stages, and end a cluster that was started for them."""
        self._stack.close()

    @property
    def max_tokens(self) -> int:
        """The longest sequence, prompt and answer, that model and caches allow now."""
        capacity = self.engine.pool.capacity
        return min(capacity, self.model.max_tokens or capacity)

    @property
    def caches(self) -> CacheState:
        """How full the workers' caches are."""
        return self.engine.pool.state

    # Requests

    def request(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        speculate: bool = True,
        logprobs: int | None = None,
        logits: bool = False,
        **sampling: Any,
    ) -> Request:
        """Check what is wanted.

        Raises
        ------
        BatchInvalid
            If the prompt is empty, or longer than the model allows.
        RequestTooLarge
            If prompt and answer are longer than the workers' caches allow.
        SettingsInvalid
        """
        tokens = self.model.encode(prompt)
        limit = self.model.max_tokens
        if not tokens:
            raise BatchInvalid("The prompt is empty: a model goes on from at least one token.")
        if limit is not None and len(tokens) >= limit:
            raise BatchInvalid(
                f"The prompt has {len(tokens)} tokens, and the model was made for {limit} with the "
                "answer: shorten it."
            )
        if max_new_tokens is None:
            wanted = max(1, min(_DEFAULT_NEW_TOKENS, self.max_tokens - len(tokens)))
        else:
            wanted = max_new_tokens
        if wanted < 1:
            raise SettingsInvalid(f"max_new_tokens counts from 1; found {wanted}.")
        if limit is not None:
            wanted = min(wanted, limit - len(tokens))
        self.engine.pool.check(len(tokens) + wanted)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops:
            _ = self.model.tokenizer  # stop strings need one: said now rather than later
        ends = () if ignore_end else self.model.end_tokens
        chosen = Sampling.of(sampling)
        unknown = self.model.first_unknown(chosen.logit_bias)
        if unknown is not None:
            raise SettingsInvalid(
                f"logit_bias names token {unknown}, which isn't in the vocabulary."
            )
        return Request(tokens, wanted, chosen, stops, ends, speculate, logprobs, logits)

    def stream(self, requests: Sequence[Request]) -> Iterator[Token]:
        """Yield tokens of all answers as they come. Closing the iterator ends the sessions."""
        heard: queue.SimpleQueue[Token | BaseException | None] = queue.SimpleQueue()
        running = self.begin(requests, heard.put)
        try:
            while (found := heard.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            running.cancel()

    def begin(
        self, requests: Sequence[Request], tell: Callable[[Token | BaseException | None], None]
    ) -> Future[None]:
        """Begin answers; `tell` gets their tokens on the client's loop, then None or what went wrong.

        Cancelling the future ends the sessions, and tells nothing more.
        """

        async def one(number: int, request: Request) -> None:
            async for token in self.answer(request, number):
                tell(token)

        async def all_of_them() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for number, request in enumerate(requests):
                        group.create_task(one(number, request))
                tell(None)
            except BaseExceptionGroup as error:
                tell(error.exceptions[0])

        running: Future[None] = self.engine.begin(all_of_them())
        return running

    async def answer(self, request: Request, number: int = 0) -> AsyncIterator[Token]:
        """Yield the tokens of one answer, when there is room for it; runs on the client's loop."""
        num_tokens = len(request.prompt) + request.max_new_tokens
        live = await self.engine.admit(num_tokens, request.prompt)
        draft = self._draft.begin(live.name) if self._draft is not None else None
        answer = Answer(self.engine, self.model, request, number, live, draft)
        try:
            async for token in answer.tokens():
                yield token
        finally:
            if draft is not None:
                draft.close()
            await self.engine.end(live, keep=True)


def _number_of_stages(num_stages: int | str, num_workers: int) -> int:
    if isinstance(num_stages, str):
        if num_stages != "auto":
            raise SettingsInvalid(f"num_stages is a number or 'auto'; found {num_stages!r}.")
        return num_workers
    if num_stages < 1:
        raise SettingsInvalid(f"num_stages counts from 1; found {num_stages}.")
    return num_stages
