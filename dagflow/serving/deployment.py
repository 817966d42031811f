"""A model on a swarm, ready to generate."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from operator import index
from pathlib import Path
from typing import Any

import torch
from distributed import Client

from dagflow.arguments import check_client, is_whole, shown
from dagflow.errors import BatchInvalid, SettingsInvalid, TaskFailed
from dagflow.models.model import Model
from dagflow.serving.answers import Answer, Request, Token
from dagflow.serving.draft import Draft
from dagflow.serving.engine import Engine
from dagflow.serving.keeping import Keeper, Record, check_name, keeping
from dagflow.serving.kept import (
    StoredAnswer,
    chosen_so_far,
    close,
    note,
    stored_answers,
    take_up_answers,
)
from dagflow.serving.pool import CacheState
from dagflow.serving.sampling import Sampling
from dagflow.swarm.clusters import ClusterSettings, open_cluster, roster
from dagflow_storage import Store

_DEFAULT_NEW_TOKENS = 128
_LOOK_SECONDS = 1.0
# More than any caches hold, in a number that can be shown.
_MOST_NEW_TOKENS = 2**48


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
        Whether requests go on from tokens that others of the same owner, running or ended, have
        computed.
    cluster : ClusterSettings
        How to start a local one, and how long to wait for workers.
    draft : Model, str, Path or torch module, optional
        A small model of the same vocabulary (or what `load` takes), which guesses in this process what
        the large one will say. It changes no answer.
    verbose : bool
        Print what happens to workers.
    store : str, Path or Store, optional
        Folder or URL where answers and sessions that have names are kept, so that another driver can
        go on with them: prompts, options and tokens. One driver at a time keeps what it does in a
        store.
    keep_seconds : float, optional
        How long the store keeps an answer after its last token, a day by default; None for until it
        is forgotten. Sessions stay until they are forgotten.

    Raises
    ------
    StageTooLarge
        If the workers' memory doesn't hold the model.
    StoreInUse
        If another driver uses the store. One that has died on this machine is noticed at once, one
        elsewhere is waited for until it has been silent for half a minute.
    StoreNotWritable, StoreUnreachable
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
        store: str | Path | Store | None = None,
        keep_seconds: float | None = 86_400.0,
    ) -> None:
        if not isinstance(model, Model):
            raise SettingsInvalid(
                f"The model is one that dagflow.load has returned; found {shown(model)}. "
                "dagflow.load('path/to/folder') brings a model in."
            )
        check_client(client)
        if cache_bytes is not None and cache_bytes < 1:
            raise SettingsInvalid(f"cache_bytes counts from 1; found {cache_bytes}.")
        settings = cluster or ClusterSettings()
        self.model = model
        self._stack = ExitStack()
        self._draft: Draft | None = None
        self._keeper: Keeper | None = None
        try:
            if store is not None:
                said = print if verbose else None
                kept = keeping(store, said, keep_seconds=keep_seconds)
                self._keeper = self._stack.enter_context(kept)
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
        longest = self.engine.pool.room.longest
        return min(longest, self.model.max_tokens or longest)

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
        name: str | None = None,
        owner: str = "",
        **sampling: Any,
    ) -> Request:
        """Check what is wanted.

        Parameters
        ----------
        name : str, optional
            Keeps the answer in the deployment's store, under this name.
        owner : str
            Whose it is. Requests of one owner go on from what was computed for others of the same;
            what other owners have asked shows neither in `Token.num_cached` nor in how long it takes.

        Raises
        ------
        BatchInvalid
            If the prompt is empty, or longer than the model allows.
        RequestTooLarge
            If prompt and answer are longer than the workers' caches allow.
        SettingsInvalid
        """
        if not self.model.has_head:
            raise SettingsInvalid(
                "A model without its head can't answer: deploy the model itself, or call embed."
            )
        if name is not None:
            check_name(name)
            _ = self.keeper
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
            default = int(self.model.generation.get("max_new_tokens") or _DEFAULT_NEW_TOKENS)
            wanted = max(1, min(default, self.max_tokens - len(tokens)))
        else:
            wanted = max_new_tokens
        if not is_whole(wanted) or wanted < 1:
            raise SettingsInvalid(f"max_new_tokens counts from 1; found {shown(wanted)}.")
        most = _MOST_NEW_TOKENS if limit is None else limit - len(tokens)
        wanted = min(index(wanted), most)
        self.engine.pool.check(len(tokens) + wanted)
        stops = (
            (stop,)
            if isinstance(stop, str)
            else tuple(stop)
            if isinstance(stop, Iterable)
            else (stop,)
        )
        for text in stops:
            if not isinstance(text, str):
                raise SettingsInvalid(f"stop= is a text or a list of texts; found {shown(text)}.")
        if logprobs is not None and not (is_whole(logprobs) and logprobs >= 0):
            raise SettingsInvalid(f"logprobs counts tokens, from 0; found {shown(logprobs)}.")
        if stops:
            _ = self.model.tokenizer  # stop strings need one: said now rather than later
        ends = () if ignore_end else self.model.end_tokens
        chosen = Sampling.of({**self.model.sampling_defaults, **sampling})
        unknown = self.model.first_unknown(chosen.logit_bias)
        if unknown is not None:
            raise SettingsInvalid(
                f"logit_bias names token {shown(unknown)}, which isn't in the vocabulary."
            )
        return Request(
            tokens, wanted, chosen, stops, ends, speculate, logprobs, logits, name, owner
        )

    def stream(
        self, requests: Sequence[Request], *, keeper: Keeper | None = None
    ) -> Iterator[Token]:
        """Yield tokens of all answers as they come. Closing the iterator ends the sessions.

        An answer that the store has, or a part of it, comes from its first token on as well; what was
        written isn't computed again.

        Parameters
        ----------
        keeper : Keeper, optional
            Keeps answers that have names, in place of the deployment's own.

        Raises
        ------
        StoreHoldsAnotherRun
            If another answer is kept under a request's name.
        SessionInUse
            If an answer of that name is being made.
        WorkersLost, TaskFailed, LeaseLost
            If an answer breaks off. What was written of it can be gone on with.
        """
        records = take_up_answers(keeper or self._keeper, self.model, requests)
        yield from self._stream(requests, records)

    def resume(self, answers: Sequence[StoredAnswer]) -> Iterator[Token]:
        """Go on with answers: yield the tokens that follow on those that they have.

        A token's `prompt` counts the answers that were given. Raises what `stream` raises.
        """
        requests = [answer.request for answer in answers]
        records = take_up_answers(self.keeper, self.model, requests)
        yield from self._stream(requests, records, [len(answer.tokens) for answer in answers])

    def _stream(
        self,
        requests: Sequence[Request],
        records: Sequence[Record | None],
        known: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        heard: queue.SimpleQueue[Token | BaseException | None] = queue.SimpleQueue()
        running = self.begin(requests, heard.put, records, known)
        try:
            while (found := self._next(heard)) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            running.cancel()

    def _next(
        self, heard: queue.SimpleQueue[Token | BaseException | None]
    ) -> Token | BaseException | None:
        while True:
            try:
                return heard.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if self.engine.is_over:
                    return TaskFailed("The dask client was closed: no token will come any more.")

    def begin(
        self,
        requests: Sequence[Request],
        tell: Callable[[Token | BaseException | None], None],
        records: Sequence[Record | None] | None = None,
        known: Sequence[int] | None = None,
    ) -> Future[None]:
        """Begin answers; `tell` gets their tokens on the client's loop, then None or what went wrong.

        Cancelling the future ends the sessions, and tells nothing more.

        Parameters
        ----------
        records : sequence of Record or None, optional
            Where they are kept; those of `take_up`. They are closed at the end.
        known : sequence of int, optional
            How many tokens of each needn't be told.
        """
        kept = records if records is not None else [None] * len(requests)
        skips = known if known is not None else [0] * len(requests)

        async def one(number: int) -> None:
            position = 0
            async for token in self.answer(requests[number], number, kept[number]):
                position += 1
                if position > skips[number]:
                    tell(token)

        async def all_of_them() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(len(requests)):
                        group.create_task(one(number))
                tell(None)
            except BaseExceptionGroup as error:
                tell(error.exceptions[0])

        try:
            running: Future[None] = self.engine.begin(all_of_them())
        except BaseException:
            close(kept)
            raise
        running.add_done_callback(lambda _: close(kept))
        return running

    async def answer(
        self, request: Request, number: int = 0, record: Record | None = None
    ) -> AsyncIterator[Token]:
        """Yield the tokens of one answer, when there is room for it; runs on the client's loop."""
        made = chosen_so_far(record)
        known = [*request.prompt, *(one.token for one in made)]
        most = len(request.prompt) + request.max_new_tokens
        live = await self.engine.admit(most, known, owner=request.owner)
        draft = self._draft.begin(live.name) if self._draft is not None else None
        answer = Answer(self.engine, self.model, request, number, live, draft, made)
        position = 0
        try:
            async for token in answer.tokens():
                if record is not None and position >= len(made):
                    record.check()
                    note(record, position, token)
                position += 1
                yield token
        finally:
            if draft is not None:
                draft.close()
            await self.engine.end(live, keep=True)

    # What is kept

    @property
    def keeper(self) -> Keeper:
        """What keeps answers and sessions.

        Raises
        ------
        SettingsInvalid
            If the deployment has no store.
        """
        if self._keeper is None:
            raise SettingsInvalid(
                "What has a name is kept in a store: say where, as Deployment(model, store=...)."
            )
        return self._keeper

    @property
    def is_keeping(self) -> bool:
        """Whether the deployment has a store."""
        return self._keeper is not None

    def take_up(self, requests: Sequence[Request]) -> list[Record | None]:
        """Have the answers to requests for this caller alone, if they have names; for `begin`."""
        return take_up_answers(self._keeper, self.model, requests)

    def answers(self) -> list[StoredAnswer]:
        """Return this model's answers that the store has and nobody is making, the oldest first.

        One that is so damaged that nobody can tell what it was is told of, and left out.
        """
        return stored_answers(self.keeper, self.model)

    def forget(self, name: str) -> None:
        """Delete an answer or a session from the store.

        Raises
        ------
        NotFound, SessionInUse
        """
        self.keeper.forget(name)


def _number_of_stages(num_stages: int | str, num_workers: int) -> int:
    if isinstance(num_stages, str):
        if num_stages != "auto":
            raise SettingsInvalid(f"num_stages is a number or 'auto'; found {num_stages!r}.")
        return num_workers
    if num_stages < 1:
        raise SettingsInvalid(f"num_stages counts from 1; found {num_stages}.")
    return num_stages
