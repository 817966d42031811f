import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import FROZEN, paths, take, write

from dagflow_storage import (
    FormatTooNew,
    FoundObject,
    GarbageReport,
    RunDirectory,
    Snapshot,
    Store,
    collect_garbage,
    commit_snapshot,
    delete_old_snapshots,
    delete_snapshot,
    first_journal_step,
    list_snapshots,
    set_aside_newer,
)
from dagflow_storage.records.garbage import Garbage, Needs, Settled, find_garbage
from dagflow_storage.records.recording import RecordingStore

HOURS = 3600.0


def idle(store: Store, **options: bool) -> GarbageReport:
    return collect_garbage(store, nobody_writes=lambda: True, **options)


def collected(report: GarbageReport) -> list[str]:
    return [item.path for item in report.garbage]


def shift(store: Store, pattern: str, seconds: float) -> None:
    """Move the times of everything that matches."""
    for path in Path(store.url).glob(pattern):
        for found in [path, *path.rglob("*")]:
            if found.is_file():
                stat = found.stat()
                os.utime(found, (stat.st_atime + seconds, stat.st_mtime + seconds))


def write_journal(store: Store, plan: str, *steps: int) -> None:
    for step in steps:
        store.write_bytes(f"journal/{plan}/step-{step:08d}/2F0-ab/c/0", b"x" * 10)


# What is needed


def test_a_clean_run_has_no_garbage(store: Store) -> None:
    run = RunDirectory(store)
    run.create({})
    run.write_programs("plan", ["{}"])
    run.append_metrics([{"step": 0}])
    take(store, 4, frozen=FROZEN)
    take(store, 8, frozen=FROZEN, earlier=Snapshot.open(store, 4))
    write_journal(store, "plan", 4, 5, 8)
    store.write_bytes("ledger/step-00000001.json", b"{}")
    store.write_bytes("lease/holder.unfinished", b"x")
    before = paths(store)
    assert idle(store) == GarbageReport()
    assert paths(store) == before


def test_unfinished_snapshots_and_losers_of_a_commit_go(store: Store) -> None:
    take(store, 4)
    loser = write(store, 4, "stage-0")
    assert not commit_snapshot(store, 4, [loser], {})
    unfinished = write(store, 8, "stage-1")
    whole = paths(store, "snapshots/step-00000004")
    report = idle(store)
    assert collected(report) == sorted([loser.path, unfinished.path])
    assert report.size_bytes == sum(o.size_bytes for r in (loser, unfinished) for o in r.objects)
    assert paths(store, "snapshots") == [p for p in whole if not p.startswith(loser.path)]
    assert Snapshot.open(store, 4).read("parameter", ["a"])["a"][0] == 4


def test_what_a_deleted_snapshot_lent_goes_with_its_last_reader(store: Store) -> None:
    take(store, 4)
    take(store, 8, frozen=["table", "a"], earlier=Snapshot.open(store, 4))
    delete_snapshot(store, 4)
    assert collected(idle(store)) == []
    assert Snapshot.open(store, 8).read("parameter", ["a"])["a"][0] == 4
    delete_snapshot(store, 8)
    take(store, 12)
    collect_garbage(store, nobody_writes=lambda: True)
    assert {path.split("/")[1] for path in paths(store, "snapshots")} == {"step-00000012"}


def test_the_journal_goes_up_to_the_second_newest_snapshot(store: Store) -> None:
    write_journal(store, "plan", *range(10))
    assert collected(idle(store)) == []
    for step in (2, 4, 8):
        take(store, step)
    report = idle(store)
    assert collected(report) == [f"journal/plan/step-{step:08d}" for step in range(4)]
    assert report.size_bytes == 40
    assert store.list("journal/plan") == [f"step-{step:08d}" for step in range(4, 10)]


def test_the_first_journal_step_is_the_second_newest_snapshot() -> None:
    assert first_journal_step([]) is None
    assert first_journal_step([4]) == 4
    assert first_journal_step([12, 4, 8]) == 8


def test_programs_of_plans_that_nothing_refers_to_go(folder: Store) -> None:
    run = RunDirectory(folder)
    for plan in ("old", "journalled", "named", "asked", "latest"):
        run.write_programs(plan, ["{}"])
    take(folder, 4, {"plan": "named"})
    write_journal(folder, "journalled", 4)
    shift(folder, "programs/latest", 1.0)
    report = collect_garbage(folder, nobody_writes=lambda: True, plans_in_use=["asked"])
    assert collected(report) == ["programs/old"]
    assert folder.list("programs") == ["asked", "journalled", "latest", "named"]


def test_leftovers_of_crashes_go(store: Store) -> None:
    take(store, 4)
    leftovers = [
        ".dagflow-probe-0af3",
        ".run.json.0af3.unfinished",
        "metrics/.part-00000001.jsonl.0af3.unfinished",
        f"{Snapshot.open(store, 4).shards[0].path}/float32/c/0.0af3.partial",
    ]
    for path in [*leftovers, "notes.txt", "elsewhere/a.unfinished"]:
        store.write_bytes(path, b"x")
    assert collected(idle(store)) == sorted(leftovers)
    assert store.exists("notes.txt")
    assert store.exists("elsewhere/a.unfinished")


def test_a_snapshot_that_was_set_aside_goes(store: Store) -> None:
    take(store, 4)
    take(store, 8)
    assert set_aside_newer(store, 4) == [8]
    idle(store)
    assert {path.split("/")[1] for path in paths(store, "snapshots")} == {"step-00000004"}


def test_no_empty_folder_is_left(folder: Store) -> None:
    take(folder, 4)
    write(folder, 8, "stage-0")
    Path(folder.url, "snapshots/step-00000012/stage-0-ab").mkdir(parents=True)
    idle(folder)
    assert os.listdir(Path(folder.url, "snapshots")) == ["step-00000004"]
    assert folder.list() == ["snapshots"]


def test_a_dry_run_tells_and_deletes_nothing(store: Store) -> None:
    take(store, 4)
    write(store, 2, "stage-0")
    before = paths(store)
    report = idle(store, dry_run=True)
    assert paths(store) == before
    assert len(report.garbage) == 1
    assert idle(store) == report


class Died(Exception):
    """A writer is gone between two puts."""


def test_wherever_a_writer_dies_no_orphan_is_left(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = RecordingStore.written
    puts_left = 0

    def die(self: RecordingStore, path: str, *facts: int) -> None:
        nonlocal puts_left
        if puts_left == 0:
            raise Died
        puts_left -= 1
        note(self, path, *facts)

    take(memory, 0, frozen=FROZEN)
    for last in range(100):
        puts_left = last
        with monkeypatch.context() as patch, contextlib.suppress(Died):
            patch.setattr(RecordingStore, "written", die)
            take(memory, last + 1, frozen=FROZEN)
        delete_old_snapshots(memory, keep=2)
        idle(memory)
        kept = list_snapshots(memory)
        wanted = {f"snapshots/step-{step:08d}/manifest.json" for step in kept}
        for step in kept:
            wanted |= Snapshot.open(memory, step).objects.keys()
        assert set(paths(memory)) == wanted
        if last + 1 in kept:
            break
    assert 5 < last < 99


# What can't be known


def test_a_manifest_that_cannot_be_read_protects_all_snapshots(store: Store) -> None:
    take(store, 4)
    take(store, 8)
    write(store, 2, "stage-0")
    write_journal(store, "plan", 1)
    store.write_bytes("snapshots/step-00000008/manifest.json", b"[")
    report = idle(store)
    assert collected(report) == ["journal/plan/step-00000001"]
    assert "step-00000008/manifest.json" in report.notes[0]


def test_a_newer_format_stops_everything(store: Store) -> None:
    take(store, 4)
    write(store, 2, "stage-0")
    store.write_bytes("snapshots/step-00000004/manifest.json", b'{"format_version": 9}')
    before = paths(store)
    with pytest.raises(FormatTooNew):
        idle(store)
    assert paths(store) == before


# While somebody writes


def test_young_things_stay_while_somebody_may_write(store: Store) -> None:
    take(store, 4)
    write(store, 2, "stage-0")
    write(store, 8, "stage-0")
    before = paths(store)
    report = collect_garbage(store)
    assert report.garbage == ()
    assert len(report.spared) == 2
    assert paths(store) == before


@pytest.mark.parametrize("wrong_by", [0.0, -8 * HOURS, 8 * HOURS])
def test_wrong_clocks_change_nothing(
    folder: Store, monkeypatch: pytest.MonkeyPatch, wrong_by: float
) -> None:
    for step in (1, 2):
        write(folder, step, "stage-0")
    late = write(folder, 3, "stage-0")
    take(folder, 4)
    shift(folder, "snapshots/*", -2 * HOURS)
    shift(folder, "snapshots/step-0000000[12]", -1.0)
    shift(folder, f"{late.path}", 2 * HOURS)
    # Where store and collector disagree about the time, the collector isn't asked.
    monkeypatch.setattr("time.time", lambda: 1.8e9 + wrong_by)
    report = collect_garbage(folder)
    assert [path.split("/")[1] for path in collected(report)] == ["step-00000001", "step-00000002"]
    assert [item.path for item in report.spared] == [late.path]


def test_what_is_committed_while_garbage_is_collected_stays(store: Store) -> None:
    take(store, 4)
    record = write(store, 8, "stage-0")

    def commit() -> bool:
        commit_snapshot(store, 8, [record], {})
        return True

    assert collect_garbage(store, nobody_writes=commit).garbage == ()
    assert Snapshot.open(store, 8).read("parameter", ["a"])["a"][0] == 8


def test_what_is_written_while_garbage_is_collected_stays(store: Store) -> None:
    take(store, 4)
    late: list[str] = []

    def write_more() -> bool:
        late.append(write(store, 8, "stage-0").path)
        return True

    assert collect_garbage(store, nobody_writes=write_more).garbage == ()
    assert paths(store, late[0])


NOW = 100_000.0
NEWEST = NOW - 3 * HOURS
TRUST = Settled(newest_step=8, newest_manifest_seconds=NEWEST, now_seconds=NOW, grace_seconds=HOURS)


@pytest.mark.parametrize(
    ("step", "modified_seconds", "settled"),
    [
        (4, NEWEST - 1, True),
        (None, NEWEST - 1, True),
        (8, NEWEST - 1, True),
        (9, NEWEST - 1, False),
        (4, NEWEST, False),
        (4, NEWEST + 1, False),
        (4, NOW + 9 * HOURS, False),
        (4, None, False),
    ],
)
def test_only_what_is_older_than_the_newest_manifest_is_settled(
    step: int | None, modified_seconds: float | None, settled: bool
) -> None:
    assert TRUST.includes(Garbage("p", "why", 1, 1, modified_seconds, step)) == settled


def test_nothing_is_settled_without_a_manifest_or_a_time() -> None:
    old = Garbage("p", "why", 1, 1, 0.0, None)
    assert not Settled(None, None, NOW, HOURS).includes(old)
    assert not Settled(8, None, NOW, HOURS).includes(old)
    assert not Settled(8, NEWEST, None, HOURS).includes(old)
    assert not Settled(8, 10.0, NOW, NOW).includes(old)


# The pure part

places = st.sampled_from(
    [
        "run.json",
        "snapshots/step-00000004/manifest.json",
        "snapshots/step-00000004/s-1/float32/c/0",
        "snapshots/step-00000004/s-1/int64/c/0",
        "snapshots/step-00000008/s-2/float32/zarr.json",
        "snapshots/notes.txt",
        "programs/p/stage-000.json",
        "programs/q/stage-000.json",
        "programs/readme",
        "journal/p/step-00000003/2F0/c/0",
        "journal/q/step-00000009/2F0/c/0",
        "journal/index",
        "metrics/part-00000001.jsonl",
        "ledger/a.unfinished",
        "lease/a.unfinished",
        "metrics/a.unfinished",
    ]
)
objects = st.builds(FoundObject, places, st.integers(0, 9), st.one_of(st.none(), st.floats(0, 9)))


@given(
    st.lists(objects, unique_by=lambda item: item.path),
    st.sets(st.sampled_from(["s-1", "s-1/float32", "s-2/float32"])),
    st.one_of(st.none(), st.integers(0, 12)),
)
@settings(max_examples=200)
def test_garbage_is_never_needed_and_never_overlaps(
    found: list[FoundObject], named: set[str], journal_from: int | None
) -> None:
    step_of = {"s-1": "step-00000004", "s-2": "step-00000008"}
    folders = {f"snapshots/{step_of[name.split('/')[0]]}/{name}" for name in named}
    folders.add("snapshots/step-00000004/manifest.json")
    garbage = find_garbage(found, Needs(frozenset(folders), journal_from))
    doomed = [
        {item.path for item in found if f"{item.path}/".startswith(f"{g.path}/")} for g in garbage
    ]
    gone = set().union(*doomed)
    assert sum(map(len, doomed)) == len(gone)
    assert [g.num_objects for g in garbage] == [len(paths) for paths in doomed]
    for path in gone:
        assert not any(f"{path}/".startswith(f"{folder}/") for folder in folders)
        assert path.split("/")[0] not in ("run.json", "ledger", "lease")
        assert path not in ("snapshots/notes.txt", "programs/readme", "journal/index")
        assert not path.endswith(".jsonl")
