"""Ctrl-C is noted where something may be half done, and heeded at once where nothing is."""

from __future__ import annotations

import signal
from typing import NoReturn

import pytest

from dagflow.swarm.interrupts import Interrupts
from dagflow_storage import Clock, Retries, RetryPolicy, StoreUnreachable


class InterruptedPauses(Clock):
    """Somebody presses Ctrl-C in the first pause."""

    def sleep(self, seconds: float) -> None:
        signal.raise_signal(signal.SIGINT)


def store_is_away() -> NoReturn:
    raise StoreUnreachable("the store is away")


def test_retries_of_ten_minutes_end_at_ctrl_c() -> None:
    retries = Retries(RetryPolicy(total_seconds=600.0), InterruptedPauses())
    interrupts = Interrupts()
    with interrupts.noted(), pytest.raises(KeyboardInterrupt):
        retries.run(store_is_away)
    interrupts.heed()  # was heeded: what is left to do isn't interrupted again


def test_ctrl_c_in_the_middle_of_something_waits_until_it_is_asked_for() -> None:
    interrupts = Interrupts()
    with interrupts.noted():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.heed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
