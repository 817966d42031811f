import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshots import FROZEN, paths, take, write

from dagflow_storage import (
    DamagedData,
    Retention,
    Snapshot,
    SnapshotFacts,
    Store,
    apply_retention,
    commit_snapshot,
    list_snapshots,
)

steps = st.integers(0, 500)
losses = st.one_of(st.none(), st.floats(allow_nan=True), st.sampled_from([0.5, 1.0]))
snapshots_taken = st.dictionaries(steps, losses, max_size=30)
retentions = st.builds(
    Retention, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 100)), st.integers(0, 4)
)


@given(retentions, snapshots_taken)
def test_the_newest_are_kept_and_nothing_is_invented(
    retention: Retention, taken: dict[int, float | None]
) -> None:
    kept = retention.kept(taken)
    assert kept <= taken.keys()
    assert set(sorted(taken)[-retention.newest :]) <= kept


@given(retentions, snapshots_taken)
def test_a_kept_set_is_kept(retention: Retention, taken: dict[int, float | None]) -> None:
    kept = retention.kept(taken)
    assert retention.kept({step: taken[step] for step in kept}) == kept


@given(retentions, st.lists(st.tuples(st.integers(1, 40), losses), max_size=40))
def test_applied_after_each_snapshot_or_once_at_the_end_it_keeps_the_same(
    retention: Retention, gaps: list[tuple[int, float | None]]
) -> None:
    everything: dict[int, float | None] = {}
    remaining: dict[int, float | None] = {}
    step = 0
    for gap, loss in gaps:
        everything[step] = remaining[step] = loss
        kept = retention.kept(remaining)
        remaining = {s: found for s, found in remaining.items() if s in kept}
        step += gap
    assert set(remaining) == retention.kept(everything)


@given(st.integers(1, 100), snapshots_taken)
def test_every_keeps_one_in_each_stretch(every: int, taken: dict[int, float | None]) -> None:
    kept = Retention(newest=1, every=every).kept(taken)
    assert {step // every for step in kept} == {step // every for step in taken}
    newest = {max(taken)} if taken else set()
    assert len(kept - newest) <= len({step // every for step in taken})


@given(st.integers(1, 4), snapshots_taken)
def test_nothing_dropped_is_better_than_the_best(best: int, taken: dict[int, float | None]) -> None:
    kept = Retention(newest=1, best=best).kept(taken)
    known = {s: loss for s, loss in taken.items() if loss is not None and not math.isnan(loss)}
    chosen = sorted(loss for s, loss in known.items() if s in kept)[:best]
    assert chosen == sorted(known.values())[:best]


def test_the_rules_add_up() -> None:
    taken = {step: float(step != 250) for step in range(0, 1001, 50)}
    found = Retention(newest=2, every=400, best=1).kept(taken)
    assert found == {0, 400, 800, 250, 950, 1000}


@pytest.mark.parametrize("options", [{"newest": 0}, {"every": 0}, {"best": -1}])
def test_a_rule_that_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Retention(**options)


def test_the_loss_comes_from_the_manifest(store: Store) -> None:
    for step, loss in ((4, 0.5), (8, 0.1), (12, 0.3), (16, 0.4)):
        take(store, step, {"loss": loss})
    assert apply_retention(store, Retention(newest=1, best=2)) == [4]
    assert list_snapshots(store) == [8, 12, 16]
    assert apply_retention(store, Retention(newest=1, best=2)) == []


def test_each_manifest_is_read_once(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = Snapshot.open

    def recording(store: Store, step: int) -> Snapshot:
        opened.append(step)
        return original(store, step)

    monkeypatch.setattr(Snapshot, "open", recording)
    facts: dict[int, SnapshotFacts] = {}
    for step in (4, 8, 12):
        take(memory, step)
        apply_retention(memory, Retention(newest=2), facts)
    assert opened == [4, 8, 12]
    assert sorted(facts) == list_snapshots(memory) == [8, 12]


def test_what_a_kept_snapshot_refers_to_stays(store: Store) -> None:
    earlier = None
    for step in (4, 8, 12, 16):
        take(store, step, frozen=FROZEN, earlier=earlier)
        earlier = Snapshot.open(store, step)
        apply_retention(store, Retention(newest=1))
    assert list_snapshots(store) == [16]
    assert Snapshot.open(store, 16).read("parameter", ["table"])["table"][0] == 7
    assert {path.split("/")[1] for path in paths(store, "snapshots")} == {
        "step-00000004",
        "step-00000016",
    }


def test_a_damaged_manifest_takes_no_good_snapshots_place(store: Store) -> None:
    for step in (4, 8, 12):
        take(store, step)
    store.write_bytes("snapshots/step-00000012/manifest.json", b"[")
    assert apply_retention(store, Retention(newest=2)) == []
    take(store, 16)
    take(store, 20)
    assert apply_retention(store, Retention(newest=2)) == [4, 8, 12]
    assert list_snapshots(store) == [16, 20]


def test_without_a_good_snapshot_nothing_is_deleted(store: Store) -> None:
    write(store, 2, "stage-0")
    take(store, 4)
    store.write_bytes("snapshots/step-00000004/manifest.json", b"[")
    assert apply_retention(store, Retention(newest=1)) == []
    with pytest.raises(DamagedData):
        Snapshot.open(store, 4)
    assert store.list("snapshots") == ["step-00000002", "step-00000004"]


def test_a_snapshot_that_is_overtaken_while_it_is_written_is_left_alone(store: Store) -> None:
    slow = write(store, 4, "stage-0")
    take(store, 8)
    assert apply_retention(store, Retention(newest=1), in_flight=[4]) == []
    assert commit_snapshot(store, 4, [slow], {})
    assert Snapshot.open(store, 4).read("parameter", ["a"])["a"][0] == 4
    assert apply_retention(store, Retention(newest=1)) == [4]
