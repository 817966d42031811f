"""From the dask client's event loop, where answers are made, to the server's, where they are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from enum import Enum

from dagflow.serving.answers import Request, Token
from dagflow.serving.deployment import Deployment
from dagflow.serving.keeping import Record


class Ending(Enum):
    """How the answers of a request ended."""

    MADE = "made"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Answers:
    """The answers of one request, in the making.

    What has been made and isn't read yet waits here, however slowly the client reads: at most
    `max_new_tokens` tokens an answer. So a client that doesn't read keeps its connection, and not
    its place: `ended` is called when the answers are made, have failed or are cancelled; once, with
    the number of tokens that were made.
    """

    def __init__(
        self,
        deployment: Deployment,
        requests: Sequence[Request],
        ended: Callable[[Ending, int], None],
        records: Sequence[Record | None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self._ended: Callable[[Ending, int], None] | None = ended
        self._num_tokens = 0
        self._running = deployment.begin(requests, self._tell, records)

    async def tokens(self) -> AsyncIterator[Token]:
        """Yield the tokens of all answers as they come; raise what ended them."""
        while (found := await self._heard.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def cancel(self) -> None:
        """End the sessions, unless they have ended."""
        self._running.cancel()
        self._end(Ending.CANCELLED)

    def fail(self, error: Exception) -> None:
        """End the sessions; who reads the tokens gets the error after those that were made."""
        self.cancel()
        self._heard.put_nowait(error)

    def _tell(self, found: Token | BaseException | None) -> None:
        with suppress(RuntimeError):  # the server has gone, and its loop with it
            self._loop.call_soon_threadsafe(self._hear, found)

    def _hear(self, found: Token | BaseException | None) -> None:
        if isinstance(found, Token):
            self._num_tokens += found.token is not None
        else:
            self._end(Ending.MADE if found is None else Ending.FAILED)
        self._heard.put_nowait(found)

    def _end(self, how: Ending) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(how, self._num_tokens)
