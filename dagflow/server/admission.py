"""Who is answered now, who waits, and who is sent away."""

from __future__ import annotations

import asyncio
from collections import deque


class QueueFull(Exception):
    """As many requests wait as may."""


class Admission:
    """Admits so many requests at a time, in the order in which they came. Of one event loop.

    Parameters
    ----------
    max_running : int
    max_queue : int
        How many may wait; 0 sends everybody away who can't be answered at once.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self._max_running = max_running
        self._max_queue = max_queue
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Raise `QueueFull` if nobody could enter now, not even the queue."""
        if self.num_running >= self._max_running and len(self._waiting) >= self._max_queue:
            raise QueueFull

    async def enter(self) -> None:
        """Wait for a place; who has one gives it back with `leave`.

        Raises
        ------
        QueueFull
        """
        self.check()
        if self.num_running < self._max_running:
            self.num_running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.leave()  # its turn had come in the same moment
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give a place to the next who waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1
