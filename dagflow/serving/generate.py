"""`dagflow.generate`: prompts become answers, over a swarm."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from distributed import Client

from dagflow.arguments import shown
from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.models.model import Model
from dagflow.serving.answers import Request, Token
from dagflow.serving.beams import Beams, Hypothesis, search
from dagflow.serving.deployment import Deployment
from dagflow.serving.keeping import keeping
from dagflow.serving.kept import named
from dagflow.swarm.clusters import ClusterSettings
from dagflow_storage import Store

# Beam search follows the most likely tokens, whatever a model's own defaults are for sampling.
_CHOOSING_NOTHING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


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
    scores : Tensor or None
        Of beam search's answers: mean log-probabilities, if the length penalty is 1.
    logits : list of Tensor (N, V) or None
        What each token was chosen from, before penalties, temperature and cuts; with
        ``return_logits=True``.
    """

    tokens: list[torch.Tensor]
    texts: list[str]
    finish_reasons: list[str]
    scores: torch.Tensor | None = None
    logits: list[torch.Tensor] | None = None


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
    draft: Model | str | Path | torch.nn.Module | None = None,
    return_logits: bool = False,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    cluster: ClusterSettings | None = None,
    store: str | Path | Store | None = None,
    **sampling: Any,
) -> Generation | Iterator[Token]:
    """Let a model go on from prompts, over a swarm.

    With a `store`, called again after whatever ended it, with the same model, prompts and options, it
    goes on where it was: the tokens that were written aren't computed again, and the answers are
    those of an undisturbed call. A stream begins with the first tokens all the same.

    Parameters
    ----------
    model
        A `Model`, or a `Deployment` of it, which stays open afterwards.
    prompts
        A string, several, or token ids (B, T), ragged or not.
    max_new_tokens : int
        By default what the model's generation_config.json says, or 128; at most what the model's
        longest sequence leaves. Requests wait in their order until the workers' caches have room
        for prompt and answer.
    client
        As for `train`.
    stop
        Strings that end an answer; they aren't part of it.
    stream : bool
        True returns an iterator of `Token` instead.
    ignore_end : bool
        Go on past the model's end tokens.
    speculate : bool
        Guess tokens from what came before, and verify several in one traversal, and in several that are
        under way; greedy answers, and sampled ones of a seed, are the same.
    return_logits : bool
        Keep the logits, too: 4 bytes a token and entry of the vocabulary.
    num_beams : int
        More than 1 for beam search: the most likely of so many answers that are followed at once.
    length_penalty, early_stopping, num_return_sequences
        As for `Beams`. Answers to one prompt follow each other, the best first.
    draft
        As for `Deployment`; one that is open has its own.
    store : str, Path or Store, optional
        Folder or URL that keeps this call's answers, for good: a new one for each call.
    sampling
        As for `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty,
        presence_penalty, logit_bias, seed. What isn't given is as the model's generation_config.json
        says (`Model.sampling_defaults`), and greedy without one.

    Raises
    ------
    BatchInvalid, SettingsInvalid
        If a prompt or an option can't be.
    RequestTooLarge
        If prompt and answer are more than the workers' caches hold.
    StoreHoldsAnotherRun
        If the store has the answers of another call; says what differs.
    StoreInUse
        If another driver is at this call.
    WorkersLost
        If no worker is there, or none comes back in time.
    """
    beams = _beams(num_beams, length_penalty, early_stopping, num_return_sequences)
    _check_together(beams is not None, stream, return_logits, store is not None)
    if isinstance(model, Deployment) and draft is not None:
        raise SettingsInvalid("The deployment is open: give it its draft= when it is opened.")
    if beams is not None:
        sampling = {**_CHOOSING_NOTHING, **sampling}
    owned = ExitStack()
    try:
        keeper = None if store is None else owned.enter_context(keeping(store))
        if isinstance(model, Deployment):
            deployment = model
        else:
            opened = Deployment(model, client, cluster=cluster, draft=draft)
            deployment = owned.enter_context(opened)
        requests = [
            deployment.request(
                prompt,
                max_new_tokens=max_new_tokens,
                stop=stop,
                ignore_end=ignore_end,
                speculate=speculate,
                logits=return_logits,
                **sampling,
            )
            for prompt in separate(prompts)
        ]
        if beams is not None:
            with owned:
                return _searched(deployment, requests, beams)
        if keeper is not None:
            requests = named(keeper, deployment.model, requests)
        tokens = deployment.stream(requests, keeper=keeper)
    except BaseException:
        owned.close()
        raise
    if stream:
        return _closing(owned, tokens)
    with owned:
        return _gathered(tokens, len(requests), return_logits)


def _check_together(beams: bool, stream: bool, return_logits: bool, store: bool) -> None:
    """Refuse options that exclude each other."""
    if beams and stream:
        raise SettingsInvalid(
            "stream=True shows tokens as they come, and beam search knows them at the end: leave "
            "stream or num_beams out."
        )
    if beams and return_logits:
        raise SettingsInvalid("Beam search returns scores, no logits: leave return_logits out.")
    if store and (beams or return_logits):
        raise SettingsInvalid(
            "A store keeps tokens, neither beams nor logits: leave store out, or num_beams and "
            "return_logits."
        )


def _beams(
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    num_return_sequences: int,
) -> Beams | None:
    """Return how beams are followed, if there are several."""
    if num_beams != 1:
        return Beams(num_beams, length_penalty, early_stopping, num_return_sequences)
    if num_return_sequences != 1:
        raise SettingsInvalid(
            f"num_return_sequences={num_return_sequences} answers to a prompt need as many beams: "
            "pass num_beams, or repeat the prompt with other seeds."
        )
    if (length_penalty, early_stopping) != (1.0, False):
        warnings.warn(
            "length_penalty and early_stopping change nothing without num_beams.", stacklevel=3
        )
    return None


def _searched(deployment: Deployment, requests: Sequence[Request], beams: Beams) -> Generation:
    model = deployment.model
    for request in requests:
        beams.check(request, int(model.config["vocab_size"]))

    async def all_of_them() -> list[list[Hypothesis]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(search(deployment.engine, r, beams)) for r in requests]
        return [task.result() for task in tasks]

    try:
        of_each = deployment.engine.call(all_of_them())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    answers = [(r, answer) for r, some in zip(requests, of_each, strict=True) for answer in some]
    found = [answer for _, answer in answers]
    return Generation(
        [torch.tensor(answer.tokens, dtype=torch.int64) for answer in found],
        [model.decode(_without_end(r, answer), r.prompt) for r, answer in answers],
        [answer.finish_reason for answer in found],
        torch.tensor([answer.score for answer in found]),
    )


def _without_end(request: Request, answer: Hypothesis) -> Sequence[int]:
    tokens = answer.tokens
    return tokens[:-1] if tokens and tokens[-1] in request.ends else tokens


def separate(prompts: Any) -> list[Any]:
    """Return prompts one by one, whichever form they have.

    Raises
    ------
    BatchInvalid
        If there is none, or one row of ids stands for a batch, or it is no prompt.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise BatchInvalid(
            f"A prompt is a text or token ids, alone or in a list; found {shown(prompts)}."
        )
    found = list(prompts)
    if found and isinstance(found[0], int):
        raise BatchInvalid("Token ids are (B, T): one row a prompt. Pass [ids] for one prompt.")
    if not found:
        raise BatchInvalid("There is no prompt.")
    return found


def _closing(owned: ExitStack, tokens: Iterator[Token]) -> Iterator[Token]:
    with owned:
        yield from tokens


def _gathered(tokens: Iterator[Token], count: int, return_logits: bool) -> Generation:
    ids: list[list[int]] = [[] for _ in range(count)]
    rows: list[list[torch.Tensor]] = [[] for _ in range(count)]
    texts = [""] * count
    reasons = [""] * count
    for token in tokens:
        if token.token is not None:
            ids[token.prompt].append(token.token)
        if token.logits is not None:
            rows[token.prompt].append(token.logits)
        texts[token.prompt] += token.text
        reasons[token.prompt] = token.finish_reason or reasons[token.prompt]
    return Generation(
        [torch.tensor(i, dtype=torch.int64) for i in ids],
        texts,
        reasons,
        logits=[torch.stack(of) for of in rows] if return_logits else None,
    )
