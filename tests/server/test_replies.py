"""Answers that fail after their first tokens have been sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dagflow.errors import DagflowError, TaskFailed, WorkersLost
from dagflow.server.errors import ApiError, as_api_error
from dagflow.server.replies import ChatReply, CompletionReply, Reply, Usage
from dagflow.serving.answers import Token


async def _failing(error: Exception) -> AsyncIterator[Token]:
    yield Token(0, 5, "so")
    raise error


@pytest.mark.parametrize("kind", [ChatReply, CompletionReply])
@pytest.mark.parametrize(
    ("error", "code"), [(WorkersLost("0 of 1"), "unavailable"), (TaskFailed("1F0"), "failed")]
)
def test_a_stream_that_fails_ends_with_the_error(
    kind: type[Reply], error: DagflowError, code: str
) -> None:
    async def pieces() -> list[dict[str, Any]]:
        reply = kind("tiny", None, 1, Usage(3))
        found = reply.pieces(_failing(error), include_usage=True)
        return [json.loads(event.removeprefix("data: ")) async for event in found]

    *said, last = asyncio.run(pieces())
    assert all(choice["finish_reason"] is None for piece in said for choice in piece["choices"])
    assert last["error"]["code"] == code
    assert str(error) in last["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (WorkersLost("0 of 1"), 503, "server_error"),
        (TaskFailed("1F0"), 500, "server_error"),
        (ApiError(429, "full"), 429, "rate_limit_error"),
    ],
)
def test_an_error_has_a_status(error: Exception, status: int, kind: str) -> None:
    found = as_api_error(error)
    assert found.status == status
    assert found.body["error"]["type"] == kind
    assert ("Retry-After" in found.headers) == (status == 503)
