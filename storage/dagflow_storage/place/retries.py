"""When something transient is tried again, and when it is given up."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dagflow_storage.errors import OutOfDescriptors, PermanentError, StoreUnreachable

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Below that a retry is nobody's business; above, somebody may wonder why nothing moves.
_WORTH_A_WARNING_SECONDS = 5.0
# Descriptors come back when something is closed; what has none for so long is left to another process.
_DESCRIPTOR_SECONDS = 10.0


_PAUSES = threading.local()


def is_pausing() -> bool:
    """Tell whether this thread waits to try something again, and nothing is half done.

    A signal's handler asks: what it raises then ends the retries.
    """
    return getattr(_PAUSES, "is_pausing", False)


class Clock:
    """Time and chance as retries see them; tests bring their own."""

    def now(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        time.sleep(seconds)

    def fraction(self) -> float:
        """A random number from 0 to 1."""
        return random.random()


@dataclass(frozen=True)
class RetryPolicy:
    """How long a store is given to answer.

    Attributes
    ----------
    total_seconds
        From the first attempt to the start of the last one. 0 means a single attempt.
    first_delay_seconds, longest_delay_seconds
        The upper bound of the pause doubles from the first to the longest. A pause is drawn
        between zero and its bound (full jitter), so that workers that lost the store together
        don't come back together.
    operation_seconds
        A single request that makes no progress for so long has failed, where the file system
        lets us stop it: S3 and other asynchronous ones do, a folder on a network drive doesn't.
    slowest_bytes_per_second
        What a request may take beyond `operation_seconds`, for the bytes that it moves.

    References
    ----------
    Marc Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015.
    """

    total_seconds: float = 60.0
    first_delay_seconds: float = 0.1
    longest_delay_seconds: float = 10.0
    operation_seconds: float = 20.0
    # Ten chunks at once through an uplink of 5 Mbit/s.
    slowest_bytes_per_second: float = 64 * 2**10

    def delay_bound_seconds(self, num_failures: int) -> float:
        """The longest pause after so many failures."""
        # 2.0**1024 is no float.
        doubled = self.first_delay_seconds * 2.0 ** min(num_failures - 1, 60)
        return min(self.longest_delay_seconds, doubled)

    def deadline_seconds(self, num_bytes: int) -> float:
        """How long a single request may take that moves so many bytes."""
        return self.operation_seconds + num_bytes / self.slowest_bytes_per_second


@dataclass(frozen=True)
class Retries:
    """Runs operations again while they raise `StoreUnreachable`, until time is up."""

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Clock = field(default_factory=Clock)

    def run(self, operation: Callable[[], T]) -> T:
        """What `operation` returns, which must be safe to run twice.

        Raises
        ------
        StoreUnreachable
            The last one, saying how often and how long it was tried.
        PermanentError
            If this process has had no file descriptor left for some seconds.
        """
        attempts = _Attempts(self)
        while True:
            try:
                return operation()
            except StoreUnreachable as error:
                delay = attempts.delay_after(error)
            _PAUSES.is_pausing = True
            try:
                self.clock.sleep(delay)
            finally:
                _PAUSES.is_pausing = False


class _Attempts:
    """Decides, without waiting itself, whether another attempt is made, and when."""

    def __init__(self, retries: Retries) -> None:
        self._policy, self._clock = retries.policy, retries.clock
        self._start = self._clock.now()
        self._num_failures = 0

    def delay_after(self, error: StoreUnreachable) -> float:
        self._num_failures += 1
        elapsed = self._clock.now() - self._start
        total = self._policy.total_seconds
        if isinstance(error, OutOfDescriptors):
            total = min(total, _DESCRIPTOR_SECONDS)
        left = total - elapsed
        if left <= 0:
            raise self._given_up(error, elapsed)
        bound = self._policy.delay_bound_seconds(self._num_failures)
        # The last attempt is made when time is up, not before: a store that is away for almost
        # that long is waited for.
        delay = min(bound * self._clock.fraction(), left)
        level = logging.WARNING if elapsed > _WORTH_A_WARNING_SECONDS else logging.INFO
        logger.log(level, "%s; trying again in %.1f s, for %.0f s more", error, delay, left)
        return delay

    def _given_up(
        self, error: StoreUnreachable, elapsed: float
    ) -> StoreUnreachable | PermanentError:
        is_short = isinstance(error, OutOfDescriptors)
        if self._num_failures == 1 and not is_short:
            return error
        said = f"{error}; given up after {self._num_failures} attempts in {elapsed:.0f} s"
        given_up = PermanentError(said) if is_short else type(error)(said)
        given_up.__cause__ = error.__cause__
        return given_up
