import json
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshots import FROZEN, file, take, write

from dagflow_storage import (
    DamagedData,
    FormatTooNew,
    NotFound,
    Snapshot,
    Store,
    StoreUnreachable,
    commit_snapshot,
    differences,
    glance_at_snapshot,
    list_snapshots,
    newest_whole_snapshot,
    set_aside_newer,
    verify_snapshot,
)
from dagflow_storage.arrays import flat

CHUNK = "snapshots/step-00000008/stage-0-*/float32/c/0"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_with_another_steps(path: Path) -> None:
    take(Store(str(path.parents[5])), 9)  # a chunk as long as that of step 8
    (other,) = path.parents[4].glob("step-00000009/stage-0-*/float32/c/0")
    path.write_bytes(other.read_bytes())


def flip_own_checksum(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def taken(folder: Store) -> Store:
    take(folder, 4)
    take(folder, 8)
    return folder


def test_a_whole_snapshot_has_no_damage_and_nothing_is_decoded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(store, 4, frozen=FROZEN)
    take(store, 8, frozen=FROZEN, earlier=Snapshot.open(store, 4))

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(flat.FlatArray, "read_into", refuse)
    seen: list[str] = []
    assert verify_snapshot(store, 8, seen.append) == []
    assert sorted(seen) == sorted(Snapshot.open(store, 8).objects)
    assert glance_at_snapshot(store, 8) == []


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (Path.unlink, "missing"),
        (cut, "truncated"),
        (flip, "aren't those that were written"),
        (flip_own_checksum, "aren't those that were written"),
        (replace_with_another_steps, "aren't those that were written"),
    ],
)
def test_damage_is_named(taken: Store, harm: Callable[[Path], None], what: str) -> None:
    harm(file(taken, CHUNK))
    (damage,) = verify_snapshot(taken, 8)
    assert damage.path.startswith("snapshots/step-00000008/stage-0-")
    assert damage.path.endswith("/float32/c/0")
    assert what in damage.what
    assert verify_snapshot(taken, 4) == []


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip])
def test_damaged_metadata_is_damage(taken: Store, harm: Callable[[Path], None]) -> None:
    harm(file(taken, "snapshots/step-00000008/stage-1-*/int64/zarr.json"))
    (damage,) = verify_snapshot(taken, 8)
    assert damage.path.endswith("/int64/zarr.json")


@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_a_glance_sees_what_is_missing_or_too_short(
    taken: Store, harm: Callable[[Path], None]
) -> None:
    harm(file(taken, CHUNK))
    (damage,) = glance_at_snapshot(taken, 8)
    assert damage.path.endswith("/float32/c/0")


def test_damage_of_a_shared_array_is_seen_by_all_who_share(folder: Store) -> None:
    take(folder, 4, frozen=FROZEN)
    take(folder, 8, frozen=FROZEN, earlier=Snapshot.open(folder, 4))
    flip(file(folder, "snapshots/*/stage-0-*-frozen/float32/c/0"))
    assert len(verify_snapshot(folder, 4)) == len(verify_snapshot(folder, 8)) == 1


def test_an_edited_manifest_is_damage(taken: Store) -> None:
    path = "snapshots/step-00000008/manifest.json"
    document = json.loads(taken.read_bytes(path))
    taken.write_bytes(path, json.dumps({**document, "meta": {"loss": 0}}).encode())
    (damage,) = verify_snapshot(taken, 8)
    assert damage.path == path
    assert "by hand" in damage.what


def test_a_snapshot_of_an_older_dagflow_is_decoded(taken: Store) -> None:
    path = "snapshots/step-00000008/manifest.json"
    document = json.loads(taken.read_bytes(path))
    shards = [{k: v for k, v in r.items() if k != "objects"} for r in document["shards"]]
    old = {"format_version": 1, "step": 8, "meta": {}, "shards": shards}
    taken.write_bytes(path, json.dumps(old).encode())
    assert verify_snapshot(taken, 8) == []
    flip(file(taken, CHUNK))
    (damage,) = verify_snapshot(taken, 8)
    assert "float32/c/0" in damage.what


def test_an_absent_snapshot_and_a_newer_one_are_no_damage(taken: Store) -> None:
    with pytest.raises(NotFound):
        verify_snapshot(taken, 12)
    taken.write_bytes("snapshots/step-00000008/manifest.json", b'{"format_version": 9}')
    with pytest.raises(FormatTooNew):
        verify_snapshot(taken, 8)


def test_a_store_that_is_away_is_no_damage(taken: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Store.read_bytes

    def away(self: Store, path: str) -> bytes:
        if "/c/" in path:
            raise StoreUnreachable("away")
        return original(self, path)

    monkeypatch.setattr(Store, "read_bytes", away)
    with pytest.raises(StoreUnreachable):
        verify_snapshot(taken, 8)


# Falling back


@pytest.mark.parametrize(("harm", "thorough"), [(Path.unlink, False), (cut, False), (flip, True)])
def test_a_damaged_newest_snapshot_is_passed_over_with_a_note(
    taken: Store, harm: Callable[[Path], None], thorough: bool
) -> None:
    harm(file(taken, CHUNK))
    notes: list[str] = []
    assert newest_whole_snapshot(taken, thorough=thorough, note=notes.append) == 4
    (note,) = notes
    assert "step 8 can't be used" in note
    assert "float32/c/0" in note


def test_an_edited_manifest_is_passed_over(taken: Store) -> None:
    taken.write_bytes("snapshots/step-00000008/manifest.json", b"[")
    assert newest_whole_snapshot(taken) == 4


def test_a_half_copied_run_falls_back_as_far_as_needed(taken: Store) -> None:
    take(taken, 12)
    for step in ("08", "12"):
        for path in Path(taken.url).glob(f"snapshots/step-000000{step}/stage-1-*/**/c/*"):
            path.unlink()
    assert newest_whole_snapshot(taken) == 4


def test_no_whole_snapshot_is_said_with_every_reason(taken: Store) -> None:
    for path in Path(taken.url).glob("snapshots/*/stage-0-*/float32/c/0"):
        path.unlink()
    with pytest.raises(DamagedData, match=r"step 8: .* missing.*; step 4: .* missing"):
        newest_whole_snapshot(taken)


def test_no_snapshot_at_all_is_not_found(store: Store) -> None:
    write(store, 4, "stage-0")
    with pytest.raises(NotFound, match="no complete snapshot"):
        newest_whole_snapshot(store)


def test_a_newer_format_is_never_passed_over(taken: Store) -> None:
    taken.write_bytes("snapshots/step-00000008/manifest.json", b'{"format_version": 9}')
    with pytest.raises(FormatTooNew):
        newest_whole_snapshot(taken)


def test_a_snapshot_of_another_model_is_passed_over(store: Store) -> None:
    take(store, 4)
    commit_snapshot(store, 8, [write(store, 8, "stage-1")], {})
    wanted = {"a": "float32[40]", "table": "float32[40]", "b": "float32[2, 2]"}
    notes: list[str] = []
    found = newest_whole_snapshot(
        store, check=lambda s: differences(s, "parameter", wanted), note=notes.append
    )
    assert found == 4
    assert "parameter 'a' is absent there and float32[40] in this run" in notes[0]


def test_steps_that_were_set_aside_can_be_taken_again(store: Store) -> None:
    for step in (4, 8, 12):
        take(store, step, {"by": 1})
    assert set_aside_newer(store, 4) == [8, 12]
    assert list_snapshots(store) == [4]
    take(store, 8, {"by": 2})
    assert Snapshot.open(store, 8).meta == {"by": 2}
    assert store.exists("snapshots/step-00000008/manifest.damaged.json")
    assert verify_snapshot(store, 8) == []
