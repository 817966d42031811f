"""Token sequences: what was written whole is found again, whatever was not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dagflow_storage import (
    DamagedData,
    FormatTooNew,
    NotFound,
    SequenceLog,
    Store,
    delete_sequence,
    is_sequence_name,
    list_sequences,
)

HEAD: dict[str, Any] = {"kind": "answer", "request": {"bias": {"5": 0.1}, "words": "ärger"}}


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "folder" else f"memory://{tmp_path.name}")


def part_path(name: str, first: int) -> str:
    return f"sessions/{name}/part-{first:08d}.jsonl"


def test_tokens_are_read_as_they_were_appended(store: Store) -> None:
    log = SequenceLog(store, "a")
    log.append([HEAD, {"at": 0, "tokens": [1, 2]}])
    log.append([{"at": 2, "tokens": [3], "details": [[-0.1, 3, float("-inf")]]}])
    log.append([{"at": 3, "tokens": [], "end": "stop"}])
    found = SequenceLog(store, "a").read()
    assert {key: found.head[key] for key in HEAD} == HEAD
    assert found.tokens == (1, 2, 3)
    assert found.details == (None, None, [-0.1, 3, float("-inf")])
    assert (found.end, found.num_rows, found.is_damaged) == ("stop", 4, False)


def test_a_position_supersedes_what_was_there(store: Store) -> None:
    log = SequenceLog(store, "a")
    log.append([HEAD, {"at": 0, "tokens": [1, 2, 3]}, {"at": 1, "tokens": [9]}])
    assert log.read().tokens == (1, 9)
    log.append([{"at": 1, "tokens": []}])
    assert log.read().tokens == (1,)


def test_another_writer_goes_on_where_the_first_ended(store: Store) -> None:
    SequenceLog(store, "a").append([HEAD, {"at": 0, "tokens": [1]}])
    second = SequenceLog(store, "a")
    second.read()
    second.append([{"at": 1, "tokens": [2]}])
    third = SequenceLog(store, "a")
    third.read()
    third.append([{"at": 2, "tokens": [3]}])
    assert SequenceLog(store, "a").read().tokens == (1, 2, 3)


def test_rows_of_a_writer_that_was_superseded_do_not_count(store: Store) -> None:
    first, second = SequenceLog(store, "a"), SequenceLog(store, "a")
    first.append([HEAD, {"at": 0, "tokens": [1]}])
    second.read()
    second.append([{"at": 1, "tokens": [2]}])
    first.append([{"at": 1, "tokens": [7]}, {"at": 2, "tokens": [7]}])  # too late
    assert SequenceLog(store, "a").read().tokens == (1, 2)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_half_written_end_is_ignored_and_written_again(store: Store, cut: int) -> None:
    log = SequenceLog(store, "a")
    log.append([HEAD, {"at": 0, "tokens": [1, 2]}, {"at": 2, "tokens": [3]}])
    whole = store.read_bytes(part_path("a", 0))
    store.write_bytes(part_path("a", 0), whole[:-cut])
    second = SequenceLog(store, "a")
    found = second.read()
    assert (found.tokens, found.is_damaged) == ((1, 2) if cut > 1 else (1, 2, 3), False)
    second.append([{"at": len(found.tokens), "tokens": [8, 9]}])
    assert SequenceLog(store, "a").read().tokens == (*found.tokens, 8, 9)


def test_a_changed_row_is_noticed_and_so_is_what_follows_it(store: Store) -> None:
    log = SequenceLog(store, "a")
    log.append([HEAD, {"at": 0, "tokens": [11]}, {"at": 1, "tokens": [22]}])
    log.append([{"at": 2, "tokens": [33]}])
    whole = store.read_bytes(part_path("a", 0))
    store.write_bytes(part_path("a", 0), whole.replace(b"[22]", b"[23]"))
    found = SequenceLog(store, "a").read()
    assert (found.tokens, found.is_damaged) == ((11,), True)
    store.write_bytes(part_path("a", 0), whole.replace(b"ger", b"gar"))
    with pytest.raises(DamagedData, match="sessions/a"):
        SequenceLog(store, "a").read()


def test_what_is_not_there_or_too_new_is_said(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="sessions/a"):
        SequenceLog(store, "a").read()
    monkeypatch.setattr("dagflow_storage.records.sequences.SEQUENCE_FORMAT", 2)
    SequenceLog(store, "a").append([HEAD])
    monkeypatch.undo()
    with pytest.raises(FormatTooNew, match="upgrade"):
        SequenceLog(store, "a").read()


def test_an_early_crash_leaves_nothing_and_a_late_deletion_something_sound(tmp_path: Path) -> None:
    store = Store(tmp_path)
    os.makedirs(tmp_path / "sessions" / "early")
    with pytest.raises(NotFound):
        SequenceLog(store, "early").read()
    for number in range(2):
        log = SequenceLog(store, "a")
        if number:
            log.read()
        log.append([HEAD] if number == 0 else [{"at": 0, "tokens": [1]}])
    deleted: list[str] = []

    class Dying(Store):
        def delete(self, path: str) -> None:
            super().delete(path)
            deleted.append(path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delete_sequence(Dying(tmp_path), "a")
    assert deleted == [part_path("a", 1)]
    assert SequenceLog(store, "a").read().tokens == ()
    delete_sequence(store, "a")
    delete_sequence(store, "a")
    assert list_sequences(store) == ["early"]


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a", True), ("A-1._b", True), ("a" * 128, True), ("a" * 129, False), ("", False)]
    + [(name, False) for name in (".a", "a/b", "..", "a b", "ä", "-a", "a\n")],
)
def test_names_can_be_folders_everywhere(name: str, fits: bool) -> None:
    assert is_sequence_name(name) == fits
