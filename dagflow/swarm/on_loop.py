"""Coroutines on a dask client's loop, for callers on any thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any

from distributed import Client

from dagflow.errors import DagflowError, SchedulerLost, SettingsInvalid, TaskFailed
from dagflow.swarm.clusters import in_background
from dagflow.swarm.dask_internals import event_loop
from dagflow.swarm.events import EventStream

_LAST_WORDS_SECONDS = 5.0


class OnLoop:
    """What a deployment does on its client's loop, until it is closed or the scheduler stays away.

    Parameters
    ----------
    client : Client

    Attributes
    ----------
    events : EventStream
        Is told what happens.
    note : callable
        Tells people what happens; says nothing unless it is set.
    """

    def __init__(self, client: Client) -> None:
        self.note: Callable[[str], None] = lambda text: None
        self.events = EventStream(lambda event: event.text() and self.note(event.text()))
        self._client = client
        self._tasks: set[asyncio.Task[Any]] = set()
        self._begun: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._lost: SchedulerLost | None = None

    def call(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return what it returns."""
        return self.begin(doing).result()

    def begin(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return its future at once.

        Raises
        ------
        SettingsInvalid, SchedulerLost
            As `check` does.
        """
        try:
            self.check()
        except BaseException:
            doing.close()
            raise
        begun = in_background(self._client, doing)
        self._begun.add(begun)
        begun.add_done_callback(self._begun.discard)
        return begun

    @property
    def is_over(self) -> bool:
        """Whether nothing will come any more: the client was closed, or its scheduler stayed away.

        Who closes a client ends its loop. One that has lost its scheduler closes itself, keeps its
        loop, and it takes a moment until it is known here.
        """
        return self._lost is not None or not event_loop(self._client).is_running()

    def check(self) -> None:
        """Raise why nothing can be begun any more.

        Raises
        ------
        SettingsInvalid
            If the deployment or the client was closed.
        SchedulerLost
            If the scheduler went away, and none came back in time.
        """
        if self._lost is not None:
            raise self._lost
        if self._closed or self.is_over:
            what = "deployment" if self._closed else "dask client"
            raise SettingsInvalid(f"The {what} was closed: open another.")

    def _close(self, ending: Any) -> bool:
        """Begin nothing more, and end with a coroutine; False if nobody is left to be told of it."""
        is_first, self._closed = not self._closed, True
        if not is_first or not event_loop(self._client).is_running():
            ending.close()
            return False
        in_background(self._client, ending).result()
        # Whoever waits for tokens hears why none come before the loop ends.
        concurrent.futures.wait(set(self._begun), _LAST_WORDS_SECONDS)
        return bool(self._client.status != "closed")

    # On the loop

    def spawn(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a coroutine; if it fails, whoever waits for anything hears of it."""
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _cancel_all(self) -> None:
        ended = list(self._tasks)
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Have whoever waits hear of an error that nobody has expected."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, SchedulerLost):
            self._lost = error
        why = f"{type(error).__name__}: {error}"
        self.events.note(why)
        self.fail(error if isinstance(error, DagflowError) else TaskFailed(why))

    def fail(self, error: Exception) -> None:
        """Let all who wait hear that nothing comes."""
        raise NotImplementedError
