"""What is added is written in turn, whatever is raised, and nobody tries without pauses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dagflow_storage import StoreNotWritable, StoreUnreachable, write_behind
from dagflow_storage.write_behind import WriteBehind


class Sink:
    """Writes items when it is let, and raises what it is told to before."""

    def __init__(self, *errors: Exception, is_open: bool = True) -> None:
        self.errors = list(errors)
        self.written: list[Any] = []
        self.num_attempts = 0
        self.opened = threading.Event()
        if is_open:
            self.opened.set()
        self.begun = threading.Event()

    def __call__(self, items: list[Any]) -> Iterator[Any]:
        self.num_attempts += 1
        for item in items:
            self.begun.set()
            assert self.opened.wait(30)
            if self.errors:
                raise self.errors.pop(0)
            self.written.append(item)
            yield item


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture
def with_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 60.0)


def failed(writer: WriteBehind[Any]) -> None:
    """Wait until an attempt has failed."""
    with writer.changed:
        assert writer.changed.wait_for(lambda: writer.trouble, 30)


@pytest.mark.parametrize(
    "error",
    [
        StoreUnreachable("away"),
        StoreNotWritable("disk full"),
        MemoryError(),
        KeyError("torch.float8_e8m0fnu"),
        RuntimeError("can't start new thread"),
        OSError(24, "Too many open files"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.usefixtures("without_pauses")
def test_whatever_is_raised_the_items_are_written_in_turn(error: Exception) -> None:
    sink = Sink(*[error] * 3)
    writer = WriteBehind("test", sink)
    for item in range(5):
        writer.add(item)
    assert writer.flush(30)
    assert sink.written == [0, 1, 2, 3, 4]
    assert (writer.trouble, writer.is_refused) == ("", False)


@pytest.mark.parametrize(
    ("error", "is_refused"),
    [(StoreUnreachable("away"), False), (StoreNotWritable("full"), True), (MemoryError("x"), True)],
)
@pytest.mark.usefixtures("with_long_pauses")
def test_trouble_is_told_and_whether_it_passes_by_itself(
    error: Exception, is_refused: bool
) -> None:
    writer = WriteBehind("test", Sink(error))
    writer.add(0)
    failed(writer)
    assert writer.trouble == f"{type(error).__name__}: {error}"
    assert writer.is_refused is is_refused


@pytest.mark.usefixtures("with_long_pauses")
def test_a_flush_tries_at_once_and_only_once() -> None:
    sink = Sink(*[StoreNotWritable("disk full")] * 1000)
    writer = WriteBehind("test", sink)
    writer.add(0)
    failed(writer)
    assert not writer.flush(0.3)
    assert not writer.flush(0.3)
    # Its own, one a flush, and one that a flush asked for while another was under way.
    assert 2 <= sink.num_attempts <= 4
    sink.errors.clear()
    assert writer.flush(30)


@pytest.mark.usefixtures("without_pauses")
def test_what_is_written_before_a_failure_is_not_written_again() -> None:
    sink = Sink()

    def write(items: list[int]) -> Iterator[int]:
        for item in sink(items):
            yield item
            if item == 1 and sink.written == [0, 1]:
                raise MemoryError

    writer = WriteBehind("test", write)
    with writer.changed:
        for item in range(4):
            writer.add(item)
    assert writer.flush(30)
    assert sink.written == [0, 1, 2, 3]


@pytest.mark.usefixtures("with_long_pauses")
def test_a_thread_that_cannot_be_started_is_told_and_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = Sink()
    writer = WriteBehind("test", sink)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer.add(0)
        assert not writer.flush(0.0)
    assert "can't start new thread" in writer.trouble
    assert writer.is_refused
    writer.add(1)
    assert writer.flush(30)
    assert sink.written == [0, 1]


def test_what_is_given_up_is_not_written_but_for_what_is_being_written() -> None:
    sink = Sink(is_open=False)
    writer = WriteBehind("test", sink, at_once=1)
    for item in range(4):
        writer.add(item)
    assert sink.begun.wait(30)
    dropping = threading.Thread(target=writer.drop, args=(lambda item: item != 2, 30.0))
    dropping.start()
    with writer.changed:
        assert writer.changed.wait_for(lambda: list(writer.waiting) == [0, 2], 30)
    sink.opened.set()
    dropping.join(30)
    assert writer.flush(30)
    assert sink.written == [0, 2]


@pytest.mark.usefixtures("with_long_pauses")
def test_what_could_not_be_written_is_given_up_after_the_attempt() -> None:
    sink = Sink(StoreUnreachable("away"), is_open=False)
    writer = WriteBehind("test", sink, at_once=1)
    writer.add(0)
    assert sink.begun.wait(30)
    dropping = threading.Thread(target=writer.drop, args=(lambda item: True, 30.0))
    dropping.start()
    sink.opened.set()
    dropping.join(30)
    assert list(writer.waiting) == []
    assert sink.written == []


@pytest.mark.usefixtures("with_long_pauses")
@pytest.mark.parametrize("num_errors", [0, 1, 2])
def test_the_end_tries_once_more_and_ends_the_thread(num_errors: int) -> None:
    sink = Sink(*[StoreUnreachable("away")] * num_errors)
    writer = WriteBehind("test-end", sink)
    writer.add(0)
    if num_errors:
        failed(writer)
    assert writer.end(30) is (num_errors < 2)
    assert sink.written == ([0] if num_errors < 2 else [])
    assert "test-end" not in [thread.name for thread in threading.enumerate()]


def test_after_the_end_things_are_written_all_the_same() -> None:
    sink = Sink()
    writer = WriteBehind("test", sink)
    assert writer.end()
    writer.add(0)
    assert writer.flush(30)
    assert sink.written == [0]
