from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dagflow_storage import (
    ArraySpec,
    DamagedData,
    FormatTooNew,
    NotFound,
    ShardRecord,
    Snapshot,
    Store,
    StoreNotWritable,
    commit_snapshot,
    delete_old_snapshots,
    delete_snapshot,
    list_snapshots,
    write_shard,
)
from dagflow_storage.arrays import flat
from dagflow_storage.place import documents

SPECS = {
    "stage-0": [
        ArraySpec("a", "parameter", "float32", (4,)),
        ArraySpec("a.m", "slot", "float32", (4,)),
    ],
    "stage-1": [
        ArraySpec("b", "parameter", "float32", (2, 2)),
        ArraySpec("n", "buffer", "int64", ()),
    ],
}


def value(spec: ArraySpec, step: int) -> np.ndarray:
    return np.full(spec.shape, step, dtype=spec.dtype)


def write(store: Store, step: int, shard: str) -> ShardRecord:
    specs = {spec.name: spec for spec in SPECS[shard]}
    return write_shard(store, step, shard, SPECS[shard], lambda name: value(specs[name], step))


def take(store: Store, step: int, meta: Mapping[str, int] | None = None) -> None:
    records = [write(store, step, shard) for shard in SPECS]
    commit_snapshot(store, step, records, meta or {})


def test_a_snapshot_knows_its_arrays(store: Store) -> None:
    take(store, 12, {"epoch": 3})
    snapshot = Snapshot.open(store, 12)
    assert snapshot.step == 12
    assert snapshot.meta == {"epoch": 3}
    assert snapshot.roles == ["buffer", "parameter", "slot"]
    assert snapshot.names("parameter") == ["a", "b"]
    assert snapshot.names("absent") == []
    assert snapshot.arrays["parameter", "b"].shape == (2, 2)


def test_a_read_crosses_shards_and_keeps_the_order_asked_for(store: Store) -> None:
    take(store, 12)
    found = Snapshot.open(store, 12).read("parameter", iter(["b", "a", "b"]))
    assert list(found) == ["b", "a"]
    np.testing.assert_array_equal(found["b"], np.full((2, 2), 12, np.float32), strict=True)


def test_reading_an_unknown_name_says_which(store: Store) -> None:
    take(store, 12)
    with pytest.raises(NotFound, match=r"step 12 .* no slot named b"):
        Snapshot.open(store, 12).read("slot", ["a.m", "b"])


def test_a_crash_between_shards_and_manifest_leaves_no_snapshot(store: Store) -> None:
    take(store, 4)
    write(store, 8, "stage-0")
    write(store, 8, "stage-1")
    assert list_snapshots(store) == [4]
    with pytest.raises(NotFound, match=r"step 8; complete are: \[4\]"):
        Snapshot.open(store, 8)


def test_failed_put_leaves_no_manifest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flat.Chunks, "write", refuse)
    with pytest.raises(StoreNotWritable, match="No space left"):
        take(store, 4)
    assert list_snapshots(store) == []


def test_failed_manifest_put_leaves_no_manifest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreNotWritable("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create_bytes", refuse)
        with pytest.raises(StoreNotWritable):
            take(store, 4)
    assert list_snapshots(store) == []
    take(store, 4)
    assert list_snapshots(store) == [4]


def test_shards_are_on_disk_before_the_manifest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, create = Store.flush, Store.create_bytes

    def recording_flush(self: Store, path: str) -> None:
        flush(self, path)
        events.append("flush")

    def recording_create(self: Store, path: str, data: bytes) -> bool:
        events.append("manifest")
        return create(self, path, data)

    monkeypatch.setattr(Store, "flush", recording_flush)
    monkeypatch.setattr(Store, "create_bytes", recording_create)
    take(store, 4)
    assert events == ["flush", "flush", "manifest"]


def test_a_shard_written_twice_overwrites_nothing(store: Store) -> None:
    first, second = write(store, 4, "stage-0"), write(store, 4, "stage-0")
    assert first.path != second.path
    assert first.arrays == second.arrays
    store.delete(first.path)
    commit_snapshot(store, 4, [second, write(store, 4, "stage-1")], {})
    assert Snapshot.open(store, 4).read("parameter", ["a"])["a"][0] == 4


def test_the_first_commit_of_a_step_wins(store: Store) -> None:
    take(store, 4, {"by": 1})
    take(store, 4, {"by": 2})
    assert Snapshot.open(store, 4).meta == {"by": 1}


def test_a_commit_over_a_damaged_manifest_is_not_quiet(store: Store) -> None:
    store.write_bytes("snapshots/step-00000004/manifest.json", b"[")
    with pytest.raises(DamagedData, match=r"step-00000004/manifest\.json"):
        take(store, 4)


def test_one_array_in_two_shards_is_refused(store: Store) -> None:
    record = write(store, 4, "stage-0")
    with pytest.raises(ValueError, match="two shards"):
        commit_snapshot(store, 4, [record, write(store, 4, "stage-0")], {})
    assert list_snapshots(store) == []


def test_a_record_survives_json(memory: Store) -> None:
    record = write(memory, 4, "stage-1")
    assert ShardRecord.from_json(record.to_json()) == record


def test_a_newer_format_is_refused_with_both_numbers(store: Store) -> None:
    take(store, 4)
    path = "snapshots/step-00000004/manifest.json"
    newer = store.read_bytes(path).replace(b'"format_version": 2', b'"format_version": 7')
    store.write_bytes(path, newer)
    with pytest.raises(FormatTooNew, match=r"version 7.*up to 2"):
        Snapshot.open(store, 4)


@pytest.mark.parametrize("content", [{}, {"step": 5, "meta": {}, "shards": []}, {"step": "x"}])
def test_a_manifest_that_makes_no_sense_is_damage(
    memory: Store, content: dict[str, object]
) -> None:
    path = "snapshots/step-00000004/manifest.json"
    memory.write_bytes(path, documents.encode_document(1, content))
    with pytest.raises(DamagedData, match="step-00000004"):
        Snapshot.open(memory, 4)


def test_a_damaged_chunk_leaves_the_older_snapshot_whole(folder: Store) -> None:
    take(folder, 4)
    take(folder, 8)
    chunk = next(Path(folder.url, "snapshots/step-00000008").glob("stage-0-*/float32/c/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(DamagedData, match="step-00000008/stage-0-"):
        Snapshot.open(folder, 8).read("parameter", ["a"])
    assert Snapshot.open(folder, 4).read("parameter", ["a"])["a"][0] == 4


def test_old_snapshots_go_and_unfinished_newer_ones_stay(store: Store) -> None:
    write(store, 2, "stage-0")
    for step in (4, 8, 12):
        take(store, step)
    write(store, 16, "stage-0")
    delete_old_snapshots(store, keep=2)
    assert list_snapshots(store) == [8, 12]
    folders = ["step-00000008", "step-00000012", "step-00000016"]
    assert store.list("snapshots") == folders


def test_the_newest_snapshot_is_never_deleted(store: Store) -> None:
    write(store, 2, "stage-0")
    delete_old_snapshots(store, keep=1)
    assert store.list("snapshots") == ["step-00000002"]
    take(store, 4)
    with pytest.raises(ValueError, match="keep is 0"):
        delete_old_snapshots(store, keep=0)
    delete_old_snapshots(store, keep=5)
    assert list_snapshots(store) == [4]


def test_an_interrupted_delete_leaves_no_half_snapshot(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(store, 4)
    take(store, 8)
    delete = Store.delete

    def only_files(self: Store, path: str) -> None:
        if not path.endswith(".json"):
            raise KeyboardInterrupt
        delete(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "delete", only_files)
        delete_old_snapshots(store, keep=1)
    assert list_snapshots(store) == [8]
    delete_old_snapshots(store, keep=1)
    assert store.list("snapshots") == ["step-00000008"]


def test_a_deleted_snapshot_can_be_taken_again(store: Store) -> None:
    take(store, 4, {"by": 1})
    delete_snapshot(store, 4)
    delete_snapshot(store, 4)
    take(store, 4, {"by": 2})
    assert Snapshot.open(store, 4).meta == {"by": 2}


def test_steps_sort_as_numbers(memory: Store) -> None:
    for step in (100_000_000, 5):
        take(memory, step)
    memory.write_bytes("snapshots/notes.txt", b"x")
    assert list_snapshots(memory) == [5, 100_000_000]
