"""`dagflow.score` and `dagflow.embed`: what a model makes of whole texts, over a swarm."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import torch
from distributed import Client

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.models.model import Model
from dagflow.serving.deployment import Deployment
from dagflow.serving.engine import Engine
from dagflow.serving.generate import separate
from dagflow.swarm.clusters import ClusterSettings
from dagflow_tasks.decode.decoder_stage import ALL, LAST

Texts = str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor

# Enough to fill a pipeline of eight stages with passes, and at 32,000 tokens of vocabulary 256 MB of
# logits on this machine.
_TOKENS_IN_FLIGHT = 2048


@dataclass(frozen=True)
class Scores:
    """What `score` returns.

    Attributes
    ----------
    token_log_probabilities : list of Tensor (T - 1,)
        Of each text's tokens, given those before; natural logarithms. The first token follows
        nothing, so it has none.
    """

    token_log_probabilities: list[torch.Tensor]

    @property
    def log_probabilities(self) -> torch.Tensor:
        """Of each text, summed over its tokens (B,)."""
        return torch.stack([tokens.sum() for tokens in self.token_log_probabilities])

    @property
    def num_tokens(self) -> int:
        """Tokens that were predicted, in all texts."""
        return sum(len(tokens) for tokens in self.token_log_probabilities)

    @property
    def perplexity(self) -> float:
        """Over all predicted tokens: the exponential of their mean negative log-probability."""
        return math.exp(-self.log_probabilities.double().sum().item() / self.num_tokens)


def score(
    model: Model | Deployment,
    texts: Texts,
    *,
    client: Client | str | None = None,
    tokens_in_flight: int = _TOKENS_IN_FLIGHT,
    cluster: ClusterSettings | None = None,
) -> Scores:
    """Return how likely a model finds texts, token by token.

    Texts are sent side by side, so that every stage has something to do. The last stage sends logits
    to the driver, and they become log-probabilities here: four bytes a token and vocabulary entry go
    over the wire, 128 KB a token for a vocabulary of 32,000.

    Parameters
    ----------
    model
        A `Model`, or a `Deployment` of it, which stays open afterwards.
    texts
        A string, several, or token ids (B, T), ragged or not. Strings are taken as the tokenizer makes
        tokens of them, with what it puts before them.
    client
        As for `train`.
    tokens_in_flight : int
        How many tokens are on their way at once, which bounds memory; a longer text goes alone.

    Raises
    ------
    BatchInvalid
        If a text has fewer than two tokens, or more than the model was made for, or caches hold.
    WorkersLost
        If no worker is there, or none comes back in time.
    """
    with _deployed(model, client, cluster, with_head=True) as deployment:
        rows = _rows(deployment.model, texts, shortest=2)

        async def of(engine: Engine, row: tuple[int, ...]) -> torch.Tensor:
            logits = await _fed(engine, row[:-1], ALL)
            return await asyncio.to_thread(_log_probabilities, logits, row[1:])

        return Scores(_for_each(deployment.engine, rows, tokens_in_flight, of))


def embed(
    model: Model | Deployment,
    texts: Texts,
    *,
    pooling: str = "mean",
    client: Client | str | None = None,
    tokens_in_flight: int = _TOKENS_IN_FLIGHT,
    cluster: ClusterSettings | None = None,
) -> torch.Tensor:
    """Return texts as vectors (B, D): hidden states after the model's last norm.

    Workers run, and read the weights of, the model without its head.

    Parameters
    ----------
    model
        A `Model`, or a `Deployment` of ``model.without_head()``, which stays open afterwards.
    texts, client, tokens_in_flight
        As for `score`.
    pooling : {"mean", "last"}
        Mean over a text's tokens, or the last one's, which is the only one that has seen all others.

    Raises
    ------
    BatchInvalid
        If a text is empty, or longer than the model was made for, or caches hold.
    SettingsInvalid
        If the deployment's model has its head.
    WorkersLost
    """
    if pooling not in ("mean", "last"):
        raise SettingsInvalid(f"pooling is 'mean' or 'last'; found {pooling!r}.")
    with _deployed(model, client, cluster, with_head=False) as deployment:
        rows = _rows(deployment.model, texts, shortest=1)

        async def of(engine: Engine, row: tuple[int, ...]) -> torch.Tensor:
            return (await _fed(engine, row, ALL if pooling == "mean" else LAST)).mean(0)

        return torch.stack(_for_each(deployment.engine, rows, tokens_in_flight, of))


@contextmanager
def _deployed(
    model: Model | Deployment,
    client: Client | str | None,
    cluster: ClusterSettings | None,
    with_head: bool,
) -> Iterator[Deployment]:
    if isinstance(model, Model):
        wanted = model if with_head else model.without_head()
        with Deployment(wanted, client, cluster=cluster) as deployment:
            yield deployment
        return
    if model.model.has_head != with_head:
        raise SettingsInvalid(
            "score wants a Deployment of a model with its head, embed one of model.without_head(); "
            f"this one {'has its head' if model.model.has_head else 'has none'}. Passing the Model "
            "itself does, too."
        )
    yield model


def _rows(model: Model, texts: Texts, shortest: int) -> list[tuple[int, ...]]:
    rows = [model.encode(text) for text in separate(texts)]
    for number, row in enumerate(rows):
        if len(row) < shortest:
            raise BatchInvalid(
                f"Text {number} has {len(row)} tokens; at least {shortest} are needed"
                f"{', because the first one follows nothing' if shortest > 1 else ''}."
            )
        if model.max_tokens is not None and len(row) > model.max_tokens:
            raise BatchInvalid(
                f"Text {number} has {len(row)} tokens, and the model was made for {model.max_tokens}: "
                "split it."
            )
    return rows


def _for_each(
    engine: Engine,
    rows: Sequence[tuple[int, ...]],
    tokens_in_flight: int,
    of: Callable[[Engine, tuple[int, ...]], Awaitable[torch.Tensor]],
) -> list[torch.Tensor]:
    if tokens_in_flight < 1:
        raise SettingsInvalid(f"tokens_in_flight counts from 1; found {tokens_in_flight}.")

    async def all_of_them() -> list[torch.Tensor]:
        room = _Room(tokens_in_flight)

        async def one(row: tuple[int, ...]) -> torch.Tensor:
            async with room.taken(len(row)):
                return await of(engine, row)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(row)) for row in rows]
        return [task.result() for task in tasks]

    try:
        found: list[torch.Tensor] = engine.call(all_of_them())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return found


class _Room:
    """Lets in as many tokens as there is room for; whoever needs more than that waits to be alone."""

    def __init__(self, tokens: int) -> None:
        self._tokens = self._free = tokens
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, tokens: int) -> AsyncIterator[None]:
        share = min(tokens, self._tokens)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= share)
            self._free -= share
        try:
            yield
        finally:
            async with self._changed:
                self._free += share
                self._changed.notify_all()


async def _fed(engine: Engine, tokens: Sequence[int], want: str) -> torch.Tensor:
    live = await engine.admit(len(tokens))
    try:
        return await engine.feed(live, tokens, want)
    finally:
        await engine.end(live)


def _log_probabilities(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    chosen = torch.tensor(tokens)[:, None]
    return torch.log_softmax(logits.float(), dim=-1).gather(1, chosen)[:, 0]
