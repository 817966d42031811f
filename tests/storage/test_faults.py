"""A store whose file system fails as told."""

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dagflow_storage import (
    ArraySpec,
    ConditionMissing,
    CredentialsExpired,
    DagflowError,
    DamagedData,
    NotFound,
    RetryPolicy,
    RunDirectory,
    Snapshot,
    Store,
    StoredArray,
    StoreNotReadable,
    StoreNotWritable,
    StoreUnreachable,
    commit_snapshot,
    delete_snapshot,
    list_snapshots,
    newest_whole_snapshot,
    read_arrays,
    set_aside_newer,
    walk,
    write_arrays,
    write_shard,
)
from dagflow_storage.faults import (
    FakeClock,
    Fault,
    FaultKind,
    Operation,
    num_attempts,
    with_faults,
)
from dagflow_storage.records.journal import (
    Entry,
    EntryKey,
    journalled_steps,
    read_segments,
    trim_journal,
    write_segment,
)
from dagflow_storage.records.rows import RowLog
from dagflow_storage.testing import StoreConformance

TRANSIENT = [FaultKind.UNAVAILABLE, FaultKind.RESET, FaultKind.LOST_ANSWER]
OPERATIONS: list[Operation] = ["put", "get", "info", "list", "delete"]
DATA = np.arange(5000, dtype=np.float32)
SPECS = [ArraySpec("w", "parameter", "float32", DATA.shape)]
CHUNK = r"/c/0$"

Broken = Callable[..., Store]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def broken(memory: Store, tmp_path: Path, clock: FakeClock) -> Broken:
    """Makes the memory store fail as told."""

    def make(*faults: Fault, retry: RetryPolicy | None = None) -> Store:
        place = Store(memory.url, retry=retry, clock=clock)
        return with_faults(place, faults, tmp_path / "counters")

    return make


def write(store: Store) -> list[StoredArray]:
    return write_arrays(store, "set", SPECS, lambda _: DATA)


def read(store: Store, index: list[StoredArray]) -> np.ndarray:
    return read_arrays(store, "set", index)["w"]


class TestAStoreThatFailsNowAndThen(StoreConformance):
    """Every operation fails in every transient way, again and again, and nobody notices."""

    num_children = 100

    @pytest.fixture
    def store(self, broken: Broken) -> Store:
        script = [
            Fault(kind, operation, first=first)
            for operation in OPERATIONS
            for number, kind in enumerate(TRANSIENT)
            for first in range(1 + number, 60, 7)
        ]
        return broken(*script)


@pytest.mark.filterwarnings("ignore::dagflow_storage.ConditionMissing")
class TestAStoreThatIgnoresConditions(StoreConformance):
    conditional_create = False
    num_children = 100

    @pytest.fixture
    def store(self, broken: Broken) -> Store:
        return broken(Fault(FaultKind.CONDITION_IGNORED, "put", count=None))


@pytest.mark.filterwarnings("ignore::dagflow_storage.ConditionMissing")
class TestAStoreThatKnowsNoConditions(StoreConformance):
    conditional_create = False
    num_children = 100

    @pytest.fixture
    def store(self, broken: Broken) -> Store:
        return broken(Fault(FaultKind.CONDITION_UNKNOWN, "put", count=None))


@pytest.mark.parametrize("kind", TRANSIENT)
def test_the_nth_put_fails_and_is_put_again(
    broken: Broken, tmp_path: Path, kind: FaultKind
) -> None:
    store = broken(Fault(kind, "put", first=3, count=2))
    for number in range(4):
        store.write_bytes(f"{number}", b"x")
    assert store.list() == ["0", "1", "2", "3"]
    assert num_attempts(tmp_path / "counters", 0) == 6


@pytest.mark.parametrize("kind", TRANSIENT)
@pytest.mark.parametrize("operation", ["put", "get"])
def test_chunks_are_retried_one_by_one(
    broken: Broken, tmp_path: Path, kind: FaultKind, operation: Operation
) -> None:
    store = broken(Fault(kind, operation, path=CHUNK, count=3))
    np.testing.assert_array_equal(read(store, write(store)), DATA)
    assert num_attempts(tmp_path / "counters", 0) == 4


def test_a_store_that_is_away_for_a_minute_is_waited_for(broken: Broken, clock: FakeClock) -> None:
    # 0.1, 0.2, ... 6.4 and then 10 s each: twelve attempts a minute.
    store = broken(Fault(FaultKind.RESET, "put", count=11))
    store.write_bytes("a", b"x")
    assert store.read_bytes("a") == b"x"
    assert 50 < clock.seconds < 60


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.write_bytes("a", b"x"),
        lambda store: store.create_bytes("a", b"x"),
        lambda store: write(store),
    ],
)
def test_a_store_that_stays_away_is_given_up_after_a_minute(
    broken: Broken, clock: FakeClock, use: Callable[[Store], object]
) -> None:
    store = broken(Fault(FaultKind.RESET, "put", count=None))
    with pytest.raises(StoreUnreachable, match=r"reset.*given up after \d+ attempts in 60 s"):
        use(store)
    assert clock.seconds == pytest.approx(60)


def test_a_hang_is_cut_off_and_tried_again(broken: Broken, tmp_path: Path) -> None:
    retry = RetryPolicy(operation_seconds=0.1, slowest_bytes_per_second=1e12)
    hangs = [Fault(FaultKind.HANG, operation) for operation in ("put", "get", "info")]
    store = broken(*hangs, retry=retry)
    store.write_bytes("a", b"x")
    assert store.read_bytes("a") == b"x"
    assert store.exists("a")
    for index in range(len(hangs)):
        assert num_attempts(tmp_path / "counters", index) == 2


def test_a_chunk_that_hangs_is_cut_off_and_tried_again(broken: Broken, tmp_path: Path) -> None:
    retry = RetryPolicy(operation_seconds=0.1, slowest_bytes_per_second=1e12)
    hangs = [Fault(FaultKind.HANG, operation, path=CHUNK) for operation in ("put", "get")]
    store = broken(*hangs, retry=retry)
    np.testing.assert_array_equal(read(store, write(store)), DATA)
    for index in range(len(hangs)):
        assert num_attempts(tmp_path / "counters", index) == 2


PERMANENT: list[tuple[FaultKind, type[DagflowError], str]] = [
    (FaultKind.FORBIDDEN, StoreNotWritable, "Access Denied"),
    (FaultKind.EXPIRED, CredentialsExpired, "renew them"),
    (FaultKind.NO_BUCKET, StoreNotWritable, "create the bucket"),
    (FaultKind.FULL, StoreNotWritable, "No space left"),
    (FaultKind.READ_ONLY, StoreNotWritable, "Read-only file system"),
]


@pytest.mark.parametrize(("kind", "expected", "said"), PERMANENT)
@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.write_bytes("a", b"x"),
        lambda store: store.create_bytes("a", b"x"),
        lambda store: store.probe(),
        lambda store: write(store),
    ],
)
def test_a_refused_write_is_not_tried_again(
    broken: Broken,
    clock: FakeClock,
    tmp_path: Path,
    kind: FaultKind,
    expected: type[DagflowError],
    said: str,
    use: Callable[[Store], object],
) -> None:
    store = broken(Fault(kind, "put", count=None))
    with pytest.raises(expected, match=said):
        use(store)
    assert num_attempts(tmp_path / "counters", 0) == 1
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(FaultKind.FORBIDDEN, StoreNotReadable), (FaultKind.EXPIRED, CredentialsExpired)],
)
def test_a_refused_read_is_not_tried_again(
    broken: Broken,
    clock: FakeClock,
    memory: Store,
    kind: FaultKind,
    expected: type[DagflowError],
) -> None:
    index = write(memory)
    store = broken(Fault(kind, "get", count=None), Fault(kind, "info", count=None))
    for use in (
        lambda: store.read_bytes("a"),
        lambda: store.exists("a"),
        lambda: read(store, index),
    ):
        with pytest.raises(expected, match="could not read"):
            use()
    assert clock.pauses == []


def test_credentials_that_expire_in_the_middle_are_said_so(broken: Broken) -> None:
    store = broken(Fault(FaultKind.EXPIRED, "put", path=CHUNK, first=2, count=None))
    write_shard(store, 1, "stage-0", SPECS, lambda _: DATA)
    with pytest.raises(CredentialsExpired, match=r"step-00000002/.*renew them"):
        write_shard(store, 2, "stage-0", SPECS, lambda _: DATA)


def test_a_create_whose_answer_got_lost_has_won(broken: Broken) -> None:
    store = broken(Fault(FaultKind.LOST_ANSWER, "put"))
    assert store.create_bytes("a", b"mine, 4711")
    assert not store.create_bytes("a", b"theirs, 4712")


def test_a_create_whose_answer_got_lost_has_won_where_the_store_decides(broken: Broken) -> None:
    store = broken(Fault(FaultKind.LOST_ANSWER, "put", path="a$"))
    store.probe()
    assert store.create_bytes("a", b"mine, 4711")


def test_a_lost_race_is_lost_whatever_happened_to_the_answer(broken: Broken, memory: Store) -> None:
    memory.write_bytes("a", b"theirs")
    store = broken(Fault(FaultKind.RESET, "info"), Fault(FaultKind.RESET, "get"))
    assert not store.create_bytes("a", b"mine")
    assert store.read_bytes("a") == b"theirs"


def test_a_run_is_created_once_though_the_answer_got_lost(broken: Broken) -> None:
    run = RunDirectory(broken(Fault(FaultKind.LOST_ANSWER, "put", path=r"run\.json")))
    run.create({"lr": 0.1})
    assert run.settings() == {"lr": 0.1}


def test_a_manifest_whose_answer_got_lost_is_committed(broken: Broken) -> None:
    store = broken(Fault(FaultKind.LOST_ANSWER, "put", path=r"manifest\.json"))
    record = write_shard(store, 3, "stage-0", SPECS, lambda _: DATA)
    commit_snapshot(store, 3, [record], {})
    np.testing.assert_array_equal(Snapshot.open(store, 3).read("parameter", ["w"])["w"], DATA)


def test_a_put_that_fails_for_good_leaves_no_manifest(broken: Broken) -> None:
    store = broken(Fault(FaultKind.FULL, "put", path=CHUNK, count=None))
    with pytest.raises(StoreNotWritable, match="No space left"):
        write_shard(store, 3, "stage-0", SPECS, lambda _: DATA)
    assert list_snapshots(store) == []


def test_no_space_in_the_middle_of_a_manifests_put_leaves_no_snapshot_to_go_on_from(
    broken: Broken,
) -> None:
    store = broken(Fault(FaultKind.FULL_MIDWAY, "put", path=r"step-00000004/manifest\.json"))
    for step in (2, 4):
        record = write_shard(store, step, "stage-0", SPECS, lambda _: DATA)
        if step == 4:
            with pytest.raises(StoreNotWritable, match=r"manifest\.json.*No space left"):
                commit_snapshot(store, step, [record], {})
        else:
            commit_snapshot(store, step, [record], {})
    # Half of it is there: a put of this store isn't atomic.
    with pytest.raises(DamagedData, match=r"step-00000004/manifest\.json"):
        Snapshot.open(store, 4)
    assert newest_whole_snapshot(store) == 2
    # Whoever goes on from there comes to step 4 again.
    assert set_aside_newer(store, 2) == [4]
    assert commit_snapshot(store, 4, [record], {})
    np.testing.assert_array_equal(Snapshot.open(store, 4).read("parameter", ["w"])["w"], DATA)


def test_a_folder_without_space_has_no_part_of_a_manifest(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = write_shard(folder, 4, "stage-0", SPECS, lambda _: DATA)
    before = [found.path for found in walk(folder, "")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)  # where file systems that allocate late say it
        with pytest.raises(StoreNotWritable, match=r"manifest\.json.*No space left"):
            commit_snapshot(folder, 4, [record], {})
    assert list_snapshots(folder) == []
    assert [found.path for found in walk(folder, "")] == before
    assert commit_snapshot(folder, 4, [record], {})


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_stale_listing_still_names_is_left_out(broken: Broken, memory: Store) -> None:
    store = broken(Fault(FaultKind.STALE, "list", count=None))
    key = EntryKey("forward", 0, 0)
    for step in (1, 2):
        write_segment(memory, "p", step, 0, [Entry(key, {}, {}, {"step": step})])
    rows = RowLog(memory, "ledger")
    rows.append([{"step": 0}])
    rows.append([{"step": 1, "long": "x"}] * 64)
    rows = RowLog(store, "ledger")
    record = write_shard(memory, 3, "stage-0", SPECS, lambda _: DATA)
    commit_snapshot(memory, 3, [record], {})
    # Listed once; from here on nothing new is seen, and nothing goes away.
    assert (list_snapshots(store), journalled_steps(store, "p")) == ([3], [1, 2])
    assert len(read_segments(store, "p", 1)) == 1
    assert len(rows.read()) == 65
    delete_snapshot(store, 3)
    trim_journal(store, 2)
    store.delete("ledger/part-00000001.jsonl")
    assert (list_snapshots(store), journalled_steps(store, "p")) == ([], [1, 2])
    assert read_segments(store, "p", 1) == []
    assert [row["step"] for row in rows.read()] == [0]


def test_a_snapshot_is_committed_though_a_stale_listing_lacks_a_shard(broken: Broken) -> None:
    store = broken(Fault(FaultKind.STALE, "list", count=None))
    other = [ArraySpec("v", "parameter", "float32", DATA.shape)]
    records = [write_shard(store, 3, "stage-0", SPECS, lambda _: DATA)]
    assert len(store.list("snapshots/step-00000003")) == 1
    records.append(write_shard(store, 3, "stage-1", other, lambda _: DATA))
    assert len(store.list("snapshots/step-00000003")) == 1
    assert commit_snapshot(store, 3, records, {})
    # What was really deleted meanwhile is still noticed.
    store.delete(records[1].path)
    with pytest.raises(NotFound, match="was deleted after it was written"):
        commit_snapshot(store, 3, records, {})


@pytest.mark.parametrize("kind", [FaultKind.TRUNCATED, FaultKind.FLIPPED])
def test_a_chunk_garbled_on_its_way_is_read_again(
    broken: Broken, tmp_path: Path, kind: FaultKind
) -> None:
    store = broken(Fault(kind, "get", path=CHUNK))
    np.testing.assert_array_equal(read(store, write(store)), DATA)
    # The garbled one, the second look, and the read that counts.
    assert num_attempts(tmp_path / "counters", 0) == 3


@pytest.mark.parametrize("kind", [FaultKind.TRUNCATED, FaultKind.FLIPPED])
def test_a_chunk_damaged_at_rest_is_named_and_not_tried_for_a_minute(
    broken: Broken, clock: FakeClock, kind: FaultKind
) -> None:
    store = broken(Fault(kind, "put", path=CHUNK))
    index = write(store)
    with pytest.raises(DamagedData, match="set/float32/c/0 "):
        read(store, index)
    assert clock.pauses == []


@pytest.mark.parametrize("kind", [FaultKind.CONDITION_IGNORED, FaultKind.CONDITION_UNKNOWN])
def test_a_store_without_conditions_is_told_once_and_remembered(
    broken: Broken, kind: FaultKind
) -> None:
    store = broken(Fault(kind, "put", count=None))
    with pytest.warns(ConditionMissing, match="may not notice each other"):
        report = store.probe()
    assert not report.conditional_create
    for place in (store, store.child("a"), pickle.loads(pickle.dumps(store))):
        assert place._has_condition is False


def test_without_conditions_the_one_that_is_overwritten_has_lost(
    broken: Broken, memory: Store, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = broken(Fault(FaultKind.CONDITION_UNKNOWN, "put", count=None))

    def someone_else_looked_at_the_same_time(_: float) -> None:
        memory.write_bytes("a", b"theirs")

    monkeypatch.setattr(clock, "sleep", someone_else_looked_at_the_same_time)
    assert not store.create_bytes("a", b"mine")


def test_counters_are_shared_by_all_copies_of_a_store(broken: Broken, tmp_path: Path) -> None:
    store = broken(Fault(FaultKind.RESET, "put", first=2))
    store.write_bytes("a", b"x")
    pickle.loads(pickle.dumps(store)).write_bytes("b", b"x")
    assert num_attempts(tmp_path / "counters", 0) == 3


def test_a_folder_can_fail_too(folder: Store, tmp_path: Path) -> None:
    script = [Fault(FaultKind.UNAVAILABLE, "put", path=CHUNK)]
    store = with_faults(folder, script, tmp_path / "counters")
    np.testing.assert_array_equal(read(store, write(store)), DATA)
    assert num_attempts(tmp_path / "counters", 0) == 2


def test_absent_stays_absent(broken: Broken, clock: FakeClock) -> None:
    with pytest.raises(NotFound):
        broken().read_bytes("a")
    assert clock.pauses == []
