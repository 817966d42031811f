"""Decisions about retries, without a store: time is an argument."""

import errno
import os
import pickle

import pytest

from dagflow_storage import (
    PermanentError,
    Retries,
    RetryPolicy,
    StoreNotWritable,
    StoreUnreachable,
)
from dagflow_storage.faults import FakeClock
from dagflow_storage.place.translation import writing


class Failing:
    """Raises what it was given, one at a time, and then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def away(times: int) -> list[Exception]:
    return [StoreUnreachable("no answer")] * times


def test_what_is_transient_is_tried_again() -> None:
    operation, clock = Failing(*away(3)), FakeClock()
    assert Retries(RetryPolicy(), clock).run(operation) == "done"
    assert operation.num_calls == 4
    assert clock.pauses == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("error", [StoreNotWritable("403"), ValueError("a bug"), KeyError()])
def test_nothing_else_is_tried_again(error: Exception) -> None:
    operation, clock = Failing(error), FakeClock()
    with pytest.raises(type(error)):
        Retries(RetryPolicy(), clock).run(operation)
    assert operation.num_calls == 1
    assert clock.pauses == []


def test_the_last_attempt_is_made_when_time_is_up() -> None:
    operation, clock = Failing(*away(10**4)), FakeClock()
    with pytest.raises(StoreUnreachable, match=r"^no answer; given up after \d+ attempts in 60 s$"):
        Retries(RetryPolicy(total_seconds=60), clock).run(operation)
    assert clock.seconds == pytest.approx(60)
    assert max(clock.pauses) == 10
    assert operation.num_calls == len(clock.pauses) + 1


def test_a_store_that_is_back_at_the_last_moment_is_used() -> None:
    clock = FakeClock()

    def back_after_a_minute() -> str:
        if clock.now() < 60:
            raise StoreUnreachable("no answer")
        return "done"

    assert Retries(RetryPolicy(total_seconds=60), clock).run(back_after_a_minute) == "done"


def test_without_time_there_is_one_attempt_and_its_own_error() -> None:
    operation = Failing(*away(9))
    with pytest.raises(StoreUnreachable, match=r"^no answer$"):
        Retries(RetryPolicy(total_seconds=0), FakeClock()).run(operation)
    assert operation.num_calls == 1


def test_slow_operations_count_towards_the_total() -> None:
    clock, operation = FakeClock(), Failing(*away(9))

    def slow() -> str:
        clock.seconds += 40
        return operation()

    with pytest.raises(StoreUnreachable, match=r"2 attempts in 80 s"):
        Retries(RetryPolicy(total_seconds=60), clock).run(slow)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_jitter_is_full(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(clock, "fraction", lambda: fraction)
    Retries(RetryPolicy(), clock).run(Failing(*away(2)))
    assert clock.pauses == pytest.approx([0.1 * fraction, 0.2 * fraction])


def test_pauses_stay_numbers_after_many_failures() -> None:
    assert RetryPolicy().delay_bound_seconds(10**6) == 10


def test_large_requests_are_given_more_time() -> None:
    policy = RetryPolicy(operation_seconds=20, slowest_bytes_per_second=1e6)
    assert policy.deadline_seconds(0) == 20
    assert policy.deadline_seconds(10**7) == 30


def test_retries_survive_pickling() -> None:
    retries = Retries(RetryPolicy(total_seconds=7))
    assert pickle.loads(pickle.dumps(retries)).policy == retries.policy


def test_descriptors_are_waited_for_some_seconds_and_then_another_process_must_do() -> None:
    clock = FakeClock()
    retries = Retries(RetryPolicy(total_seconds=600.0), clock)

    def no_more() -> None:
        with writing("the store"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(PermanentError, match=r"Too many open files.*ulimit -n.*given up after"):
        retries.run(no_more)
    assert clock.seconds == 10.0
