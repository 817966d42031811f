"""What has a name is written behind, whatever the store does, and deleted in its time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from local import wait_until

import dagflow.serving.keeping
from dagflow.errors import LeaseLost, NotFound, SessionInUse, SettingsInvalid, StoreInUse
from dagflow.serving.keeping import ANSWER, SESSION, Keeper, keeping
from dagflow_storage import RetryPolicy, SequenceLog, Store, list_sequences, write_behind
from dagflow_storage.faults import Fault, FaultKind, num_attempts, with_faults

HEAD = {"kind": ANSWER, "model": "m", "request": {}}
DAY = 86_400.0


def away(folder: Path, attempts: int | None) -> Store:
    """Return a store in which sequences can't be put so many times in a row."""
    fault = Fault(FaultKind.UNAVAILABLE, "put", path="sessions/", count=attempts)
    (folder / "counters").mkdir()
    inner = Store(folder / "store", retry=RetryPolicy(total_seconds=0.0))
    return with_faults(inner, [fault], folder / "counters")


def write(keeper: Keeper, name: str, tokens: list[int], head: Any = None, **more: Any) -> None:
    record = keeper.take_up(name, head or HEAD)
    record.add(0, tokens, **more)
    record.close()


def tokens_in(store: Store | Path, name: str) -> tuple[int, ...]:
    return SequenceLog(store if isinstance(store, Store) else Store(store), name).read().tokens


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_is_noted_is_there_once_the_keeper_has_left(kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path if kind == "folder" else "memory://keeping")
    with keeping(store) as keeper:
        record = keeper.take_up("a", HEAD)
        for position in range(100):
            record.add(position, [position], [[0.5, position]])
        record.add(100, [7], [[0.25]], "stop")
    with keeping(store) as keeper:
        found = keeper.stored()["a"]
    assert found.tokens == (*range(100), 7)
    assert (found.details[3], found.details[-1], found.end) == ([0.5, 3], [0.25], "stop")


def test_a_store_that_is_away_holds_nobody_up_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 0.05)
    store, said = away(tmp_path, attempts=3), list[str]()
    with keeping(store, said.append) as keeper:
        record = keeper.take_up("a", HEAD)
        record.add(0, [1])
        wait_until(lambda: keeper.trouble != "", "the trouble")
        record.add(1, [2, 3])
        wait_until(lambda: len(said) == 2, "the end of the trouble")
        assert keeper.trouble == ""
    assert "answers go on" in said[0]
    assert "SlowDown" in said[0]
    assert "lacks nothing" in said[1]
    assert tokens_in(tmp_path / "store", "a") == (1, 2, 3)


def test_memory_is_bounded_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(dagflow.serving.keeping, "_LAST_SECONDS", 1.0)
    monkeypatch.setattr(dagflow.serving.keeping, "_MOST_WAITING", 150)
    store, said = away(tmp_path, attempts=None), list[str]()
    with keeping(store, said.append) as keeper:
        first, second = keeper.take_up("first", HEAD), keeper.take_up("second", HEAD)
        for position in range(100):
            first.add(position, [1])
            second.add(position, [2])
            assert keeper._num_waiting <= 150
        wait_until(lambda: num_attempts(tmp_path / "counters", 0) > 4, "attempts")
        for position in range(100, 120):
            first.add(position, [1])
        assert sum(len(row.get("tokens", ())) for row in first.rows) < 100
    assert sum("kept no longer" in text for text in said) >= 1
    assert "computes them again" in said[-1]


def test_a_driver_that_lives_is_not_taken_over(tmp_path: Path) -> None:
    with (
        keeping(tmp_path, patience_seconds=0.6, beat_seconds=0.05),
        pytest.raises(StoreInUse, match=str(os.getpid())),
        keeping(tmp_path, patience_seconds=0.6, beat_seconds=0.05),
    ):
        pass


def test_who_has_lost_the_lease_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dagflow.serving.keeping, "_LAST_SECONDS", 1.0)
    said: list[str] = []
    with keeping(tmp_path, said.append) as keeper:
        record = keeper.take_up("a", HEAD)
        keeper._lease.release()
        record.add(0, [1])
        with pytest.raises(LeaseLost, match="other one"):
            record.check()
        with pytest.raises(LeaseLost):
            keeper.take_up("b", HEAD)
    assert not (tmp_path / "sessions").exists()
    assert "LeaseLost" in said[0]


def test_one_maker_at_a_time_and_unknown_names_are_said(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        record = keeper.take_up("a", HEAD)
        for use in (lambda: keeper.take_up("a", HEAD), lambda: keeper.forget("a")):
            with pytest.raises(SessionInUse, match="'a'"):
                use()
        assert keeper.names() == []
        record.close()
        record.add(0, [1])  # too late: it may be somebody else's by now
        again = keeper.take_up("a", HEAD)
        assert again.found is not None
        assert again.found.tokens == ()
        for name in ("b", "sessions"):
            with pytest.raises(NotFound, match=name):
                keeper.take_up(name)
        with pytest.raises(SettingsInvalid, match="no name"):
            keeper.take_up("../b", HEAD)
    with pytest.raises(SettingsInvalid, match="nowhere"), keeping("nowhere://x"):
        pass


def test_what_was_begun_and_never_written_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "sessions" / "a").mkdir(parents=True)
    with keeping(tmp_path) as keeper:
        assert keeper.stored() == {}
        write(keeper, "a", [4])
    assert tokens_in(tmp_path, "a") == (4,)


def test_damage_is_told_and_hides_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    with keeping(tmp_path) as keeper:
        for name in ("a", "b"):
            write(keeper, name, [1])
    (tmp_path / "sessions" / "a" / "part-00000000.jsonl").write_bytes(b"{")
    with keeping(tmp_path, said.append) as keeper:
        assert list(keeper.stored()) == ["b"]
        assert "sessions/a" in said[0]
        keeper.forget("a")
        assert keeper.names() == ["b"]


def test_old_answers_are_deleted_sessions_and_what_can_be_gone_on_with_are_not(
    tmp_path: Path,
) -> None:
    with keeping(tmp_path) as keeper:
        for age in ("old", "young"):
            write(keeper, f"{age}-finished", [1], end="length")
            write(keeper, f"{age}-unfinished", [1])
            write(keeper, f"{age}-session", [1], {"kind": SESSION, "model": "m"})
    names = list_sequences(Store(tmp_path))
    long_ago = time.time() - DAY - 60
    for part in tmp_path.glob("sessions/old-*/*"):
        os.utime(part, (long_ago, long_ago))
    with keeping(tmp_path, keep_seconds=None) as keeper:
        keeper.tidy()
        assert keeper.names() == names
    with keeping(tmp_path, keep_seconds=DAY) as keeper:
        wait_until(lambda: "old-finished" not in keeper.names(), "tidying")
        keeper.tidy()
        assert keeper.names() == [name for name in names if name != "old-finished"]
        # A day later nobody has gone on with the other one.
        keeper._came -= DAY + 60
        held = keeper.take_up("old-unfinished")
        keeper.tidy()
        assert (tmp_path / "sessions" / "old-unfinished").exists()  # somebody has, just now
        held.close()
        keeper.tidy()
        assert keeper.names() == [n for n in names if n not in ("old-finished", "old-unfinished")]
