"""A process's journal: what was sent is found again, written or not, and once."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from local import wait_until

from dagflow_storage import Store, StoreNotWritable, StoreUnreachable, write_behind
from dagflow_storage.records.journal import read_segments, write_segment
from dagflow_tasks.train import worker_journal as module
from dagflow_tasks.train.optimizer import Optimizer
from dagflow_tasks.train.references import StageRef, TaskSettings
from dagflow_tasks.train.worker_journal import EntryKey, Journal, Sent

KEY = EntryKey("forward", 0, 0)


@pytest.fixture
def ref() -> StageRef:
    store = Store(f"memory://journal-{uuid.uuid4().hex}")
    return StageRef(store, "run", "plan", 0, TaskSettings(0, "fp32", Optimizer("SGD", lr=0.1)), 1)


def sent(value: float = 1.0, size: int = 4) -> Sent:
    return Sent({"h": torch.full((size,), value)}, {"finite": True})


class Gate:
    """Writes segments when it is told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.written = 0
        self.errors: list[Exception] = []

    def __call__(self, *arguments: Any) -> Any:
        assert self.opened.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        self.written += 1
        return write_segment(*arguments)


def test_what_was_sent_is_found_before_it_is_written_and_after(ref: StageRef) -> None:
    gate = Gate()
    journal = Journal(gate)
    journal.put(ref, 3, KEY, sent(2.0))
    journal.end_step(ref, 3)
    assert torch.equal(journal.find(ref, 3, KEY).tensors["h"], torch.full((4,), 2.0))  # type: ignore[union-attr]
    assert read_segments(ref.store, "plan", 3) == []
    gate.opened.set()
    assert journal.flush(30)
    found = journal.find(ref, 3, KEY)
    assert found is not None
    assert torch.equal(found.tensors["h"], torch.full((4,), 2.0))
    assert found.facts == {"finite": True}
    assert journal.stats("run").num_bytes == 16
    assert journal.stats().waiting_bytes == 0


def test_another_process_finds_what_was_written(ref: StageRef) -> None:
    first, second = Journal(), Journal()
    first.put(ref, 3, KEY, sent())
    assert second.find(ref, 3, KEY) is None
    assert first.flush(30)
    found = second.find(ref, 3, KEY, ())
    assert found is not None
    assert (found.tensors, found.facts) == ({}, {"finite": True})


def test_the_same_entry_is_written_once(ref: StageRef) -> None:
    gate = Gate()
    gate.opened.set()
    journal = Journal(gate)
    for _ in range(3):
        journal.put(ref, 3, KEY, sent())
        assert journal.flush(30)
    assert gate.written == 1


def test_without_a_journal_nothing_is_kept(ref: StageRef) -> None:
    off = StageRef(ref.store, "run", "plan", 0, ref.settings, 0)
    journal = Journal()
    journal.put(off, 3, KEY, sent())
    assert journal.find(off, 3, KEY) is None


def test_several_steps_are_written_together_if_asked(ref: StageRef) -> None:
    every = StageRef(ref.store, "run", "plan", 0, ref.settings, 3)
    journal = Journal()
    for step in range(3):
        journal.put(every, step, KEY, sent())
        journal.end_step(every, step)
        assert journal.stats().waiting_bytes in ((step + 1) * 16, 0)
    assert journal.flush(30)
    assert journal.stats("run").num_bytes == 48


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_tensors_come_back_as_they_lay(ref: StageRef, dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {
        "permuted": whole.permute(2, 0, 1),
        "sliced": whole[:, 1:, ::2],
        "expanded": whole[:1].expand(5, -1, -1),
        "whole": whole,
    }
    first, second = Journal(), Journal()
    first.put(ref, 0, KEY, Sent(tensors, {}))
    assert first.flush(30)
    found = second.find(ref, 0, KEY)
    assert found is not None
    for name, tensor in tensors.items():
        again = found.tensors[name]
        assert (again.dtype, again.stride()) == (dtype, tensor.stride())
        assert again.data_ptr() % 64 == tensor.data_ptr() % 64
        assert again.tolist() == tensor.tolist()


def test_a_store_that_is_away_is_waited_for(ref: StageRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 0.0)
    gate = Gate()
    gate.errors = [StoreUnreachable("away")] * 3
    journal = Journal(gate)
    journal.put(ref, 0, KEY, sent())
    gate.opened.set()
    assert journal.flush(30)
    assert len(read_segments(ref.store, "plan", 0)) == 1
    assert journal.stats().trouble == ""


def test_what_is_written_is_counted_by_run_and_anew_when_a_run_begins_again(ref: StageRef) -> None:
    journal = Journal()
    for run_id, steps in (("before", 5), ("run", 2), ("run", 1)):
        theirs = replace(ref, run_id=run_id)
        journal.forget(run_id)
        for step in range(steps):
            journal.put(theirs, step, KEY, sent())
        assert journal.flush(30)
        stats = journal.stats(run_id)
        assert stats.num_bytes == steps * 16
        assert stats.seconds > 0
    journal.forget("before")
    assert journal.stats("before").num_bytes == 0
    assert journal.stats("run").num_bytes == 16


def test_a_full_spool_holds_tasks_up_until_something_is_written(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPOOL_BYTES", 16)
    gate = Gate()
    journal = Journal(gate)
    journal.put(ref, 0, KEY, sent())
    second = EntryKey("forward", 0, 1)
    held = threading.Thread(target=journal.put, args=(ref, 0, second, sent()))
    held.start()
    assert held.is_alive()
    gate.opened.set()
    held.join(30)
    assert not held.is_alive()
    assert journal.flush(30)
    assert {key for s in read_segments(ref.store, "plan", 0) for key in s.facts} == {KEY, second}


def test_a_store_that_refuses_costs_the_oldest_entries_not_the_run(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPOOL_BYTES", 16)
    gate = Gate()
    gate.errors = [StoreNotWritable("disk full")] * 1000
    gate.opened.set()
    journal = Journal(gate)
    for step in range(4):
        journal.put(ref, step, KEY, sent())
    assert journal.find(ref, 3, KEY) is not None
    assert journal.find(ref, 0, KEY) is None
    assert "disk full" in journal.stats().trouble


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_what_nobody_expected_ends_neither_the_journal_nor_its_tasks(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(module, "_SPOOL_BYTES", 16)
    gate = Gate()
    gate.errors = [error] * 2
    gate.opened.set()
    journal = Journal(gate)
    for step in range(4):
        journal.put(ref, step, KEY, sent())
    assert type(error).__name__ in journal.stats().trouble
    gate.errors.clear()
    assert journal.flush(30)
    assert (journal.stats().trouble, journal.stats().waiting_bytes) == ("", 0)
    assert [len(read_segments(ref.store, "plan", step)) for step in range(4)] == [0, 0, 0, 1]


def test_a_flush_waits_no_longer_for_what_is_given_up(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(module, "_SPOOL_BYTES", 16)
    gate = Gate()
    gate.errors = [StoreNotWritable("disk full")] * 1000
    gate.opened.set()
    journal = Journal(gate)
    journal.put(ref, 0, KEY, sent())
    assert not journal.flush(0.2)
    before = len(gate.errors)
    with ThreadPoolExecutor() as pool:
        flushed = pool.submit(journal.flush, 60.0)
        wait_until(lambda: len(gate.errors) < before, "the attempt that a flush asks for")
        journal.put(ref, 1, KEY, sent())
        assert flushed.result(30)


def test_what_can_never_be_written_holds_nothing_else_up(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 0.0)
    journal = Journal()
    journal.put(ref, 0, KEY, Sent({"h": torch.ones(4, device="meta")}, {}))
    journal.put(ref, 1, KEY, sent())
    assert journal.flush(30)
    assert read_segments(ref.store, "plan", 0) == []
    assert journal.find(ref, 1, KEY) is not None


def test_what_is_disowned_while_the_store_is_away_is_never_written(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 60.0)
    gate = Gate()
    gate.errors = [StoreUnreachable("away")]
    gate.opened.set()
    journal = Journal(gate)
    journal.put(ref, 5, KEY, sent())
    assert not journal.flush(0.1)
    journal.disown("run", 0, 5, 30)
    assert journal.flush(30)
    assert journal.find(ref, 5, KEY) is None
    assert read_segments(ref.store, "plan", 5) == []


def test_looking_for_an_entry_opens_its_stages_segments_only(
    ref: StageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal()
    for stage in (0, 1, 10):
        theirs = StageRef(ref.store, "run", "plan", stage, ref.settings, 1)
        journal.put(theirs, 3, EntryKey("forward", stage, 0), sent(float(stage)))
    assert journal.flush(30)
    opened: list[str] = []
    read = Store.read_bytes

    def counted(store: Store, path: str) -> bytes:
        opened.append(path.split("/")[3].partition("-")[0])
        return read(store, path)

    monkeypatch.setattr(Store, "read_bytes", counted)
    found = Journal().find(ref, 3, EntryKey("forward", 1, 0))
    assert found is not None
    assert torch.equal(found.tensors["h"], torch.ones(4))
    assert set(opened) == {"1"}


def test_what_is_disowned_is_neither_found_nor_written(ref: StageRef) -> None:
    journal = Journal()
    other = StageRef(ref.store, "run", "plan", 1, ref.settings, 1)
    theirs = EntryKey("forward", 1, 0)
    for step in (4, 5):
        journal.put(ref, step, KEY, sent())
        journal.put(other, step, theirs, sent())
    journal.disown("run", 0, 5, 30)
    assert journal.flush(30)
    assert journal.find(ref, 4, KEY) is not None
    assert journal.find(ref, 5, KEY) is None
    assert journal.find(other, 5, theirs) is not None
