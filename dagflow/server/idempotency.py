"""Requests that are sent again: one with the same Idempotency-Key gets the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TypeVar

from starlette.requests import Request

from dagflow.errors import StoreHoldsAnotherRun
from dagflow.server.bodies import Common
from dagflow.server.errors import ApiError
from dagflow.serving.answers import Request as Wanted
from dagflow.serving.deployment import Deployment
from dagflow.serving.keeping import Record
from dagflow.serving.kept import close

_HEADER = "idempotency-key"
_MOST_CHARACTERS = 255

Body = TypeVar("Body", bound=Common)


def name_of(request: Request) -> str | None:
    """Return the name under which the answer to a request is kept; None if it has no key.

    Clients with other API keys have other answers.

    Raises
    ------
    ApiError
        400 if the key can't be.
    """
    key = request.headers.get(_HEADER)
    if key is None:
        return None
    if not 0 < len(key) <= _MOST_CHARACTERS:
        message = f"An Idempotency-Key has 1 to {_MOST_CHARACTERS} characters; found {len(key)}."
        raise ApiError(400, message, "invalid_value")
    whose = request.headers.get("authorization", "").partition(" ")[2].strip()
    return "http-" + blake2b(f"{whose}\n{key}".encode(), digest_size=16).hexdigest()


def with_seed(body: Body, name: str | None) -> Body:
    """Return a body whose seed is the same whenever it is sent with this key."""
    if name is None or body.seed is not None:
        return body
    digest = blake2b(name.encode(), digest_size=8).digest()
    return body.model_copy(update={"seed": int.from_bytes(digest) >> 2})


def with_names(wanted: Sequence[Wanted], name: str | None) -> list[Wanted]:
    """Return the answers that a request wants with names to keep them by."""
    if name is None:
        return list(wanted)
    return [replace(one, name=f"{name}-{number}") for number, one in enumerate(wanted)]


async def take_up(deployment: Deployment, wanted: Sequence[Wanted]) -> list[Record | None]:
    """Have answers for this request alone.

    Raises
    ------
    ApiError
        422 if the key came with another request before.
    SessionInUse, DagflowError
    """
    if all(one.name is None for one in wanted):
        return [None] * len(wanted)
    taking = asyncio.ensure_future(asyncio.to_thread(deployment.take_up, wanted))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_give_back)
        raise
    except StoreHoldsAnotherRun:
        message = "This Idempotency-Key came with another request, or to another model, before."
        raise ApiError(422, message, "idempotency_key_reused") from None


def _give_back(taken: asyncio.Future[list[Record | None]]) -> None:
    """The client has left meanwhile: it may come back."""
    if not taken.cancelled() and taken.exception() is None:
        close(taken.result())
