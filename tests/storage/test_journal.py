"""The journal's segments: whole or absent, read one entry at a time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from dagflow_storage import DamagedData, FormatTooNew, Store
from dagflow_storage.arrays.flat import FlatArray
from dagflow_storage.records.journal import (
    JOURNAL_FORMAT,
    Entry,
    EntryKey,
    delete_segments,
    journalled_steps,
    read_segments,
    trim_journal,
    write_segment,
)
from dagflow_storage.records.recording import RecordingStore


def entry(stage: int, index: int, value: float = 1.0) -> Entry:
    arrays = {"h": np.full((2, 3), value, np.float32), "half": np.arange(4, dtype=np.uint16)}
    dtypes = {"h": "float32", "half": "bfloat16"}
    return Entry(EntryKey("forward", stage, index), arrays, dtypes, {"finite": True})


def test_an_entry_is_read_as_it_was_written(store: Store) -> None:
    write_segment(store, "p", 7, 2, [entry(2, 0, 1.0), entry(2, 1, 5.0)])
    (segment,) = read_segments(store, "p", 7)
    key = EntryKey("forward", 2, 1)
    assert segment.facts[key] == {"finite": True}
    assert segment.dtypes(key) == {"h": "float32", "half": "bfloat16"}
    found = segment.read(store, key)
    np.testing.assert_array_equal(found["h"], np.full((2, 3), 5.0, np.float32), strict=True)
    np.testing.assert_array_equal(found["half"], np.arange(4, dtype=np.uint16), strict=True)
    assert list(segment.read(store, key, ["h"])) == ["h"]


def test_an_entry_may_be_facts_alone(store: Store) -> None:
    key = EntryKey("update", 1, 0)
    write_segment(store, "p", 3, 1, [Entry(key, {}, {}, {"decision": None})])
    (segment,) = read_segments(store, "p", 3)
    assert segment.facts[key] == {"decision": None}
    assert segment.read(store, key) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system what Linux alone is asked")
def test_segments_leave_the_page_cache_and_other_arrays_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        advised.append((os.fstat(descriptor).st_size, offset, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    store = Store(str(tmp_path))
    segment = write_segment(store, "p", 7, 2, [entry(2, 0)])
    (chunk,) = tmp_path.joinpath(segment.path, "c").iterdir()
    assert advised == [(chunk.stat().st_size, 0, 0, os.POSIX_FADV_DONTNEED)]
    FlatArray.create(store, "weights", np.float32, 8, 4).write(0, np.ones(8, np.float32))
    assert len(advised) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system which file is synced")
def test_a_segment_waits_for_the_disk_twice_and_a_put_for_all_new_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(os.path.relpath(path, tmp_path))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    store = Store(tmp_path / "store")
    store.write_bytes("a/b/c", b"x")
    names = ["store/a", "store", "."]  # of b, a and the store
    assert [path for path in synced if not path.endswith(".unfinished")] == [*names, "store/a/b"]
    del synced[:]
    store.write_bytes("a/b/d", b"x")
    assert [path for path in synced if not path.endswith(".unfinished")] == ["store/a/b"]
    del synced[:]
    segment = write_segment(store, "p", 7, 2, [entry(2, 0)])
    assert [path.rpartition(".")[2] for path in synced] == ["partial", "unfinished"]
    del synced[:]
    store.flush(segment.path)
    above = ["store/journal/p/step-00000007", "store/journal/p", "store/journal", "store", "."]
    assert synced[-len(above) :] == above


def test_a_segment_without_index_does_not_exist(store: Store) -> None:
    segment = write_segment(store, "p", 7, 2, [entry(2, 0)])
    store.delete(f"{segment.path}/zarr.json")
    assert read_segments(store, "p", 7) == []
    assert read_segments(store, "p", 8) == []


def test_a_damaged_index_is_named(store: Store) -> None:
    segment = write_segment(store, "p", 7, 2, [entry(2, 0)])
    path = f"{segment.path}/zarr.json"
    whole = store.read_bytes(path)
    for harmed in (whole.replace(b'"stored_as"', b'"stored"'), whole.replace(b'"entries"', b'"e"')):
        store.write_bytes(path, harmed)
        with pytest.raises(DamagedData, match=segment.path):
            read_segments(store, "p", 7)


def test_a_newer_index_is_refused(store: Store) -> None:
    path = f"{write_segment(store, 'p', 7, 2, [entry(2, 0)]).path}/zarr.json"
    now = f'"format_version": {JOURNAL_FORMAT}'.encode()
    newer = f'"format_version": {JOURNAL_FORMAT + 1}'.encode()
    store.write_bytes(path, store.read_bytes(path).replace(now, newer))
    with pytest.raises(FormatTooNew, match="upgrade dagflow"):
        read_segments(store, "p", 7)


def test_a_segment_costs_two_puts(store: Store) -> None:
    recorder = RecordingStore(store)
    segment = write_segment(recorder, "p", 7, 2, [entry(2, number) for number in range(9)])
    written = [found.path for found in recorder.written_below(segment.path)]
    assert written == ["c/0", "zarr.json"]


def test_plain_zarr_reads_a_segment(folder: Store) -> None:
    segment = write_segment(folder, "p", 7, 2, [entry(2, 0, 3.0)])
    array = zarr.open(f"{folder.url}/{segment.path}", mode="r")
    (described,) = array.attrs["dagflow_journal"]["entries"]
    tensor = next(t for t in described["arrays"] if t["name"] == "h")
    raw = array[tensor["offset"] : tensor["offset"] + 24]
    np.testing.assert_array_equal(raw.view(tensor["stored_as"]), np.full(6, 3.0, np.float32))


def test_trimming_keeps_what_is_not_older(store: Store) -> None:
    for step in (1, 2, 3):
        write_segment(store, "p", step, 0, [entry(0, 0)])
    write_segment(store, "q", 1, 0, [entry(0, 0)])
    trim_journal(store, 2)
    assert journalled_steps(store, "p") == [2, 3]
    assert journalled_steps(store, "q") == []


def test_what_a_stage_sent_from_a_step_on_can_be_deleted(store: Store) -> None:
    for step in (1, 2):
        for stage in (1, 11):
            write_segment(store, "p", step, stage, [entry(stage, 0)])
    delete_segments(store, "p", 2, 1)

    def stages(step: int) -> set[int]:
        return {key.stage for s in read_segments(store, "p", step) for key in s.facts}

    assert (stages(1), stages(2)) == ({1, 11}, {11})
