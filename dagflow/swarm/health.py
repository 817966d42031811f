"""When a worker counts as gone, frozen or slow: one rule for training, serving and start-up. Pure.

- **Gone**: its connection has been closed. The scheduler says so at once, and what it had is lost.
- **Frozen**: its connection is open, and nothing has come over it for too long (`is_frozen`): the
  process was stopped, the machine sleeps, the network is cut. It counts as gone until it is heard of.
- **Slow**: it is heard of, and what it computes takes too long (`slow_after`, `PASS_SECONDS`). In
  training its stages are rebuilt elsewhere beside it; in serving it is given up.

dask itself takes a worker for lost after five minutes of silence, and knows nothing of slow ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

# Whoever watches looks so often. Serving's driver pings as often.
LOOK_SECONDS = 0.25
# A worker that owes an answer (a task that should be done, a ping) is frozen after this much silence,
# any other after the longer one. Workers beat every half second; with four busy processes a core beats
# of two that trained were up to 2.3 s apart, so that silence alone says nothing yet after two seconds.
SILENCE_SECONDS = 2.0
LONG_SILENCE_SECONDS = 10.0
# A task may take so many times as long as the longest of its kind so far. On the machine above, of 550
# tasks one in a hundred took more than 1.6 times as long, and none more than 1.8 times ...
PATIENCE = 4.0
# ... and this long anyway: messages, garbage collection, a busy machine.
MIN_STALL_SECONDS = 1.0
# A pass of serving is at most 512 tokens through one stage: seconds on the slowest machine that is of use.
PASS_SECONDS = 300.0


def is_frozen(silent_seconds: float, *, owes_answer: bool = False) -> bool:
    """Tell whether a worker that nothing has been heard of for so long is frozen."""
    return silent_seconds > (SILENCE_SECONDS if owes_answer else LONG_SILENCE_SECONDS)


def slow_after(longest_seconds: Iterable[float]) -> float:
    """Return how long a worker may take for tasks before it is slow.

    Parameters
    ----------
    longest_seconds
        What each kind among them has taken at most so far.
    """
    return max(MIN_STALL_SECONDS, PATIENCE * max(longest_seconds, default=0.0))


def frozen_now(last_heard: Mapping[str, float]) -> set[str]:
    """Return who hasn't been heard of for long, though others have.

    Parameters
    ----------
    last_heard
        When each worker was heard of last, by address, in seconds of one clock.
    """
    newest = max(last_heard.values(), default=0.0)
    return {worker for worker, heard in last_heard.items() if is_frozen(newest - heard)}


def usable(present: Iterable[str], excluded: Collection[str], frozen: Collection[str]) -> list[str]:
    """Return the workers that may get a stage, in a fixed order.

    Parameters
    ----------
    present
        Addresses of those whose connection is open.
    excluded
        Those that aren't trusted any more for what they did.
    frozen
        Those that count as gone until they are heard of.
    """
    return sorted(set(present).difference(excluded, frozen))
