"""`dagflow chat`: a conversation in the terminal."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing

from dagflow.errors import BatchInvalid, DagflowError
from dagflow.models.defaults import served_defaults
from dagflow.server.conversation import Message, to_prompt
from dagflow.server.opening import open_model
from dagflow.serving.answers import LENGTH
from dagflow.serving.deployment import Deployment
from dagflow.swarm.clusters import ClusterSettings

_PROMPT = "> "
_TEMPERATURE = 0.7


def chat(
    model: str,
    *,
    store: str,
    scheduler: str | None,
    stages: int | str,
    weights: str | None,
    check: bool = True,
    workers: int | None,
    draft: str | None = None,
    system: str | None,
    temperature: float | None,
    max_tokens: int,
    write: Callable[[str], None],
) -> None:
    """Talk to a model until Ctrl-D, or Ctrl-C where it is the person's turn.

    Parameters
    ----------
    temperature : float, optional
        By default what the model's generation_config.json says, or 0.7.
    write : callable
        Shows text at once, without a line's end.
    """
    found = open_model(model, store, weights, check)
    small = open_model(draft, store, check=check) if draft else None
    cluster = ClusterSettings(num_workers=workers)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    with Deployment(
        found, scheduler, num_stages=stages, cluster=cluster, draft=small
    ) as deployment:
        write("Ctrl-C ends an answer, Ctrl-D the conversation.\n")
        while True:
            try:
                said = input(_PROMPT)
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            if not said.strip():
                continue
            messages.append({"role": "user", "content": said})
            try:
                answer = _answer(deployment, messages, temperature, max_tokens, write)
            except BatchInvalid as error:
                write(f"{error}\nA new conversation begins.\n")
                del messages[1 if system else 0 :]
                continue
            messages.append({"role": "assistant", "content": answer})


def _answer(
    deployment: Deployment,
    messages: list[Message],
    temperature: float | None,
    max_tokens: int,
    write: Callable[[str], None],
) -> str:
    """Show an answer as it comes, and return what there was of it; say so if it isn't all."""
    prompt, stops = to_prompt(deployment.model.tokenizer, messages)
    given = deployment.model.encode(prompt)
    options = {"temperature": _TEMPERATURE, **served_defaults(deployment.model.generation)}
    if temperature is not None:
        options["temperature"] = temperature
    request = deployment.request(
        given,
        max_new_tokens=max(1, min(max_tokens, deployment.max_tokens - len(given))),
        stop=stops,
        seed=random.getrandbits(63),
        **options,
    )
    answer = ""
    try:
        with closing(deployment.stream([request])) as tokens:  # type: ignore[type-var]
            for token in tokens:
                answer += token.text
                write(token.text)
                if token.finish_reason == LENGTH:
                    write(" [cut off at its longest length]")
    except KeyboardInterrupt:
        write(" [ended]")
    except DagflowError as error:
        write(f" [broken off] {type(error).__name__}: {error}")
    write("\n")
    return answer
