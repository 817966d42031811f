import json
from typing import Any

import numpy as np
import pytest
import snapshots
from snapshots import FROZEN, paths, take, write

from dagflow_storage import (
    ArraySpec,
    DamagedData,
    NotFound,
    Snapshot,
    Store,
    commit_snapshot,
    delete_snapshot,
    list_snapshots,
    walk,
    write_shard,
)
from dagflow_storage.arrays import arrays
from dagflow_storage.records.manifest import claimed_crc32c, computed_crc32c

MANIFEST = "snapshots/step-00000004/manifest.json"


def edit(store: Store, **changes: Any) -> None:
    document = json.loads(store.read_bytes(MANIFEST))
    store.write_bytes(MANIFEST, json.dumps({**document, **changes}).encode())


def test_the_manifest_lists_every_object_with_its_size_and_checksum(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    take(store, 4, frozen=FROZEN)
    listed = Snapshot.open(store, 4).objects
    found = {item.path: item.size_bytes for item in walk(store, "snapshots")}
    del found[MANIFEST]
    assert {path: stored.size_bytes for path, stored in listed.items()} == found
    assert len(found) > 10
    for path, stored in listed.items():
        assert computed_crc32c(path, store.read_bytes(path)) == stored.crc32c


def test_nothing_is_read_back_for_the_checksums(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read back")

    monkeypatch.setattr(Store, "read_bytes", refuse)
    assert write(store, 4, "stage-0").objects


def test_different_chunks_have_different_checksums(store: Store) -> None:
    take(store, 4)
    take(store, 8)
    first, second = (
        {
            stored.crc32c
            for path, stored in Snapshot.open(store, step).objects.items()
            if "/c/" in path
        }
        for step in (4, 8)
    )
    assert len(first) == 3
    assert not first & second


def test_a_changed_byte_changes_either_checksum() -> None:
    whole = bytes(range(40))
    for place in range(len(whole)):
        changed = bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]])
        before = claimed_crc32c("c/0", whole), computed_crc32c("c/0", whole)
        assert (claimed_crc32c("c/0", changed), computed_crc32c("c/0", changed)) != before
        assert claimed_crc32c("zarr.json", changed) != claimed_crc32c("zarr.json", whole)


@pytest.mark.parametrize(
    "changes", [{"step": 5}, {"meta": {"loss": 0.1}}, {"shards": []}, {"checksum": "sha256:0"}]
)
def test_an_edited_manifest_is_noticed(store: Store, changes: dict[str, Any]) -> None:
    take(store, 4, {"loss": 0.5})
    edit(store, **changes)
    with pytest.raises(DamagedData, match="changed after it was written, by hand"):
        Snapshot.open(store, 4)


def test_a_manifest_without_its_checksum_is_noticed(store: Store) -> None:
    take(store, 4)
    document = json.loads(store.read_bytes(MANIFEST))
    del document["checksum"]
    store.write_bytes(MANIFEST, json.dumps(document).encode())
    with pytest.raises(DamagedData, match="checksum None"):
        Snapshot.open(store, 4)


def test_another_layout_of_the_same_manifest_is_fine(store: Store) -> None:
    take(store, 4, {"loss": 0.1 + 0.2, "nothing": None, "pair": (1, 2), "name": "Gauß"})
    edit(store)
    assert Snapshot.open(store, 4).meta["loss"] == 0.1 + 0.2


def test_a_manifest_of_an_older_dagflow_is_read(store: Store) -> None:
    take(store, 4)
    document = json.loads(store.read_bytes(MANIFEST))
    del document["checksum"], document["nonce"]
    for record in document["shards"]:
        del record["objects"]
    store.write_bytes(MANIFEST, json.dumps({**document, "format_version": 1}).encode())
    snapshot = Snapshot.open(store, 4)
    assert snapshot.read("parameter", ["b"])["b"].tolist() == [[4, 4], [4, 4]]
    assert snapshot.objects == {}


def test_a_lost_answer_to_the_manifest_is_no_lost_race(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create_bytes

    def answer_lost(self: Store, path: str, data: bytes) -> bool:
        assert create(self, path, data)
        return create(self, path, data)

    monkeypatch.setattr(Store, "create_bytes", answer_lost)
    assert commit_snapshot(store, 4, [write(store, 4, "stage-0")], {})


def test_who_commits_second_is_told(store: Store) -> None:
    assert commit_snapshot(store, 4, [write(store, 4, "stage-0")], {"by": 1})
    assert not commit_snapshot(store, 4, [write(store, 4, "stage-0")], {"by": 2})


# Frozen arrays


def test_frozen_arrays_are_written_once(store: Store) -> None:
    take(store, 4, frozen=FROZEN)
    take(store, 8, frozen=FROZEN, earlier=Snapshot.open(store, 4))
    take(store, 12, frozen=FROZEN, earlier=Snapshot.open(store, 8))
    assert len([p for p in paths(store) if "-frozen/" in p and "/c/" in p]) == 1
    for step in (4, 8, 12):
        found = Snapshot.open(store, step).read("parameter", ["b", "table", "a"])
        assert found["table"].tolist() == [7] * 40
        assert found["a"].tolist() == [step] * 40


def test_a_frozen_array_that_is_there_is_not_asked_for(store: Store) -> None:
    take(store, 4)
    asked: list[str] = []

    def read(name: str) -> np.ndarray[Any, Any]:
        asked.append(name)
        return np.zeros(40, np.float32)

    write_shard(
        store,
        8,
        "stage-0",
        snapshots.SPECS["stage-0"],
        read,
        frozen=FROZEN,
        earlier=Snapshot.open(store, 4),
    )
    assert asked == ["a", "a.m"]


@pytest.mark.parametrize(
    "spec",
    [
        ArraySpec("table", "parameter", "float32", (39,)),
        ArraySpec("table", "parameter", "float64", (40,)),
        ArraySpec("table", "buffer", "float32", (40,)),
        ArraySpec("other", "parameter", "float32", (40,)),
    ],
)
def test_a_frozen_array_of_another_kind_is_written(memory: Store, spec: ArraySpec) -> None:
    take(memory, 4, frozen=FROZEN)
    record = write_shard(
        memory,
        8,
        "stage-0",
        [spec],
        lambda _: np.ones(spec.shape, spec.dtype),
        frozen=[spec.name],
        earlier=Snapshot.open(memory, 4),
    )
    (part,) = record.flattened()
    assert part.path.startswith("snapshots/step-00000008/")


def test_deleting_a_snapshot_spares_what_a_later_one_refers_to(store: Store) -> None:
    take(store, 4, frozen=FROZEN)
    take(store, 8, frozen=FROZEN, earlier=Snapshot.open(store, 4))
    delete_snapshot(store, 4)
    assert list_snapshots(store) == [8]
    assert all("-frozen/" in path for path in paths(store, "snapshots/step-00000004"))
    assert Snapshot.open(store, 8).read("parameter", ["table"])["table"][0] == 7
    delete_snapshot(store, 8)
    take(store, 4)
    assert Snapshot.open(store, 4).read("parameter", ["a"])["a"][0] == 4


def test_a_reference_to_something_deleted_is_not_committed(store: Store) -> None:
    take(store, 4, frozen=FROZEN)
    late = write(store, 8, "stage-0", frozen=FROZEN, earlier=Snapshot.open(store, 4))
    delete_snapshot(store, 4)
    with pytest.raises(NotFound, match="without earlier="):
        commit_snapshot(store, 8, [late], {})
    assert list_snapshots(store) == []


def test_a_shard_that_was_deleted_is_not_committed(store: Store) -> None:
    records = [write(store, 4, shard) for shard in snapshots.SPECS]
    store.delete(records[1].path)
    with pytest.raises(NotFound, match=r"stage-1-[0-9a-f]+ was deleted after it was written"):
        commit_snapshot(store, 4, records, {})
    assert list_snapshots(store) == []


def test_a_shard_of_frozen_arrays_alone_can_be_committed(store: Store) -> None:
    spec = ArraySpec("w", "parameter", "float32", (3,))
    for step, earlier in ((4, None), (8, 4), (12, 8)):
        record = write_shard(
            store,
            step,
            "s",
            [spec],
            lambda _: np.arange(3, dtype=np.float32),
            frozen=["w"],
            earlier=None if earlier is None else Snapshot.open(store, earlier),
        )
        commit_snapshot(store, step, [record], {})
    assert Snapshot.open(store, 12).read("parameter", ["w"])["w"].tolist() == [0, 1, 2]
