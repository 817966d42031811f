"""`dagflow.generate`: prompts become answers, over a swarm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from distributed import Client

from dagflow.errors import BatchInvalid
from dagflow.run.clusters import ClusterSettings
from dagflow.sessions.answers import Token
from dagflow.sessions.deployment import Deployment
from dagflow.sessions.models import Model


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes
    ----------
    tokens : list of Tensor
        New token ids, 1-D, one tensor a prompt.
    texts : list of str
        Empty strings if the model has no tokenizer.
    finish_reasons : list of str
        "stop" or "length".
    """

    tokens: list[torch.Tensor]
    texts: list[str]
    finish_reasons: list[str]


def generate(
    model: Model | Deployment,
    prompts: str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    *,
    max_new_tokens: int | None = None,
    client: Client | str | None = None,
    stop: str | Sequence[str] = (),
    stream: bool = False,
    ignore_end: bool = False,
    speculate: bool = True,
    cluster: ClusterSettings | None = None,
    **sampling: Any,
) -> Generation | Iterator[Token]:
    """Let a model go on from prompts, over a swarm.

    Parameters
    ----------
    model
        A `Model`, or a `Deployment` of it, which stays open afterwards.
    prompts
        A string, several, or token ids (B, T), ragged or not.
    max_new_tokens : int
        128 by default; at most what the model's longest sequence leaves.
    client
        As for `train`.
    stop
        Strings that end an answer; they aren't part of it.
    stream : bool
        True returns an iterator of `Token` instead.
    ignore_end : bool
        Go on past the model's end tokens.
    speculate : bool
        Guess tokens from what came before, and verify several in one traversal; greedy answers, and
        sampled ones of a seed, are the same.
    sampling
        As for `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, logit_bias, seed.

    Raises
    ------
    BatchInvalid, SettingsInvalid
        If a prompt or an option can't be.
    WorkersLost
        If no worker is there, or none comes back in time.
    """
    if isinstance(model, Deployment):
        deployment, owned = model, ExitStack()
    else:
        owned = ExitStack()
        deployment = owned.enter_context(Deployment(model, client, cluster=cluster))
    try:
        requests = [
            deployment.request(
                prompt,
                max_new_tokens=max_new_tokens,
                stop=stop,
                ignore_end=ignore_end,
                speculate=speculate,
                **sampling,
            )
            for prompt in separate(prompts)
        ]
        tokens = deployment.stream(requests)
    except BaseException:
        owned.close()
        raise
    if stream:
        return _closing(owned, tokens)
    with owned:
        return _gathered(tokens, len(requests))


def separate(prompts: Any) -> list[Any]:
    """Return prompts one by one, whichever form they have.

    Raises
    ------
    BatchInvalid
        If there is none, or one row of ids stands for a batch.
    """
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts)
    if found and isinstance(found[0], int):
        raise BatchInvalid("Token ids are (B, T): one row a prompt. Pass [ids] for one prompt.")
    if not found:
        raise BatchInvalid("There is no prompt.")
    return found


def _closing(owned: ExitStack, tokens: Iterator[Token]) -> Iterator[Token]:
    with owned:
        yield from tokens


def _gathered(tokens: Iterator[Token], count: int) -> Generation:
    ids: list[list[int]] = [[] for _ in range(count)]
    texts = [""] * count
    reasons = [""] * count
    for token in tokens:
        if token.token is not None:
            ids[token.prompt].append(token.token)
        texts[token.prompt] += token.text
        reasons[token.prompt] = token.finish_reason or reasons[token.prompt]
    return Generation([torch.tensor(i, dtype=torch.int64) for i in ids], texts, reasons)
