"""Bytes that requests may take before it is their turn, all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dagflow.server.errors import ApiError

_BUDGET_BYTES = 64 * 2**20
# So that those who hold the budget hold up no ordinary requests, which have some kilobytes.
_FREE_BYTES = 64 * 2**10


class Budget:
    """Bytes that the bodies of all requests together may take, from their first byte to their turn.

    Parameters
    ----------
    num_bytes, free_bytes : int
        In all, and of each body that isn't counted.
    """

    def __init__(self, num_bytes: int = _BUDGET_BYTES, free_bytes: int = _FREE_BYTES) -> None:
        self._num_bytes = num_bytes
        self._free_bytes = free_bytes
        self.taken_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Yield one body's share, which is given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.taken_bytes -= share.num_bytes

    def counted(self, num_bytes: int) -> int:
        return max(0, num_bytes - self._free_bytes)

    def take(self, num_bytes: int) -> None:
        if self.taken_bytes + num_bytes > self._num_bytes:
            message = (
                f"Others are sending {self.taken_bytes / 2**20:.0f} MiB of requests, and there is room "
                f"for {self._num_bytes / 2**20:.0f}: try again later."
            )
            raise ApiError(429, message, "too_many_bytes", headers={"Retry-After": "1"})
        self.taken_bytes += num_bytes


class Share:
    """What one body takes of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Have room for a body of so many bytes.

        Raises
        ------
        ApiError
            429 if other bodies have taken it.
        """
        more = self._budget.counted(size_bytes) - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes += more
