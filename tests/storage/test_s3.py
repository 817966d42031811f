"""S3: the conformance suite on a real server and on a mock, and what real HTTP faults do.

The real server checks signatures and conditions; the mock fails as told.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from s3_server import MotoServer, S3Server

from dagflow_storage import (
    ArraySpec,
    CredentialsExpired,
    DagflowError,
    NotFound,
    RetryPolicy,
    Snapshot,
    Store,
    StoreNotReadable,
    StoreNotWritable,
    StoreUnreachable,
    commit_snapshot,
    read_arrays,
    write_arrays,
    write_shard,
)
from dagflow_storage.faults import Fault, FaultKind, Operation, with_faults
from dagflow_storage.testing import StoreConformance

# The server's side of a test is real, so is its time: short pauses, short limits.
HASTY = RetryPolicy(
    total_seconds=20,
    first_delay_seconds=0.01,
    longest_delay_seconds=0.05,
    operation_seconds=5,
)
IMPATIENT = replace(HASTY, total_seconds=0.2, operation_seconds=0.5)
DATA = np.arange(5000, dtype=np.float32)
SPECS = [ArraySpec("w", "parameter", "float32", DATA.shape)]
CHUNK = r"/c/0$"
TRANSIENT = [FaultKind.UNAVAILABLE, FaultKind.RESET, FaultKind.LOST_ANSWER]
OPERATIONS: list[Operation] = ["put", "get", "info", "list", "delete"]


def write(store: Store) -> Any:
    return write_arrays(store, "set", SPECS, lambda _: DATA)


class TestRadosgw(StoreConformance):
    """A real S3 server."""

    @pytest.fixture
    def store(self, radosgw_store: Store) -> Store:
        return radosgw_store


class TestRadosgwThatFailsNowAndThen(StoreConformance):
    """A real S3 server with every transient fault between it and us."""

    num_children = 40

    @pytest.fixture
    def store(self, radosgw: S3Server, tmp_path: Path) -> Store:
        script = [
            Fault(kind, operation, first=first)
            for operation in OPERATIONS
            for number, kind in enumerate(TRANSIENT)
            for first in range(1 + number, 60, 7)
        ]
        return with_faults(radosgw.new_store(retry=HASTY), script, tmp_path / "counters")


class TestMoto(StoreConformance):
    """The mock, which takes ten milliseconds to write an object: listings in pages are the real one's."""

    num_children = 40

    @pytest.fixture
    def store(self, moto_store: Store) -> Store:
        return moto_store


class TestMotoBehindABadNetwork(StoreConformance):
    """The mock, answering with HTTP errors, resets and lost answers."""

    num_children = 40

    @pytest.fixture
    def store(self, moto: MotoServer) -> Store:
        store = moto.new_store(retry=HASTY)
        moto.faults.play(
            *[
                Fault(kind, operation, first=first)
                for operation in OPERATIONS
                for number, kind in enumerate(TRANSIENT)
                for first in range(1 + number, 60, 7)
            ]
        )
        return store


class TestMotoWithoutConditions(StoreConformance):
    """Like the many S3 servers that silently ignore ``If-None-Match``."""

    conditional_create = False
    num_children = 40

    @pytest.fixture
    def store(self, moto: MotoServer) -> Store:
        store = moto.new_store(retry=HASTY)
        moto.faults.play(Fault(FaultKind.CONDITION_IGNORED, "put", count=None))
        return store


@pytest.mark.parametrize("kind", [*TRANSIENT, FaultKind.HANG])
@pytest.mark.parametrize("operation", ["put", "get"])
def test_a_request_that_fails_is_made_again(
    moto: MotoServer, kind: FaultKind, operation: Operation
) -> None:
    retry = replace(HASTY, operation_seconds=0.5)
    store = moto.new_store(retry=retry)
    moto.faults.play(Fault(kind, operation, count=2, seconds=5))
    store.write_bytes("a", b"x")
    assert store.read_bytes("a") == b"x"
    # Nobody below us repeats requests: three are the two that failed and the one that didn't.
    assert moto.faults.requests[operation] == 3


@pytest.mark.parametrize("kind", [*TRANSIENT, FaultKind.HANG])
@pytest.mark.parametrize("operation", ["put", "get"])
def test_a_chunk_that_fails_is_transferred_again(
    moto: MotoServer, kind: FaultKind, operation: Operation
) -> None:
    store = moto.new_store(retry=replace(HASTY, operation_seconds=0.5))
    moto.faults.play(Fault(kind, operation, path=CHUNK, count=2, seconds=5))
    np.testing.assert_array_equal(read_arrays(store, "set", write(store))["w"], DATA)


def test_an_answer_that_breaks_off_is_asked_for_again(moto: MotoServer) -> None:
    store = moto.new_store(retry=HASTY)
    store.write_bytes("a", b"0123456789")
    moto.faults.play(Fault(FaultKind.TRUNCATED, "get", count=2))
    assert store.read_bytes("a") == b"0123456789"
    assert moto.faults.requests["get"] == 3


def test_a_chunk_takes_one_request(moto: MotoServer) -> None:
    store = moto.new_store(retry=HASTY)
    index = write(store)
    moto.faults.play()
    read_arrays(store, "set", index)
    assert moto.faults.requests == {"get": 2}  # the metadata, and the chunk


def test_a_server_that_hangs_is_given_up(moto: MotoServer) -> None:
    store = moto.new_store(retry=IMPATIENT)
    moto.faults.play(*[Fault(FaultKind.HANG, o, count=None, seconds=9) for o in OPERATIONS])
    with pytest.raises(StoreUnreachable, match=r"given up|[Tt]ime"):
        store.write_bytes("a", b"x")
    with pytest.raises(StoreUnreachable, match=r"given up|[Tt]ime"):
        write(store)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    store = Store("s3://b/a", S3Server("http://127.0.0.1:9").options, retry=IMPATIENT)
    for use in (store.probe, lambda: store.read_bytes("a"), lambda: write(store), store.list):
        with pytest.raises(StoreUnreachable):
            use()


@pytest.mark.parametrize(
    ("kind", "expected", "said"),
    [
        (FaultKind.FORBIDDEN, StoreNotWritable, "Access Denied"),
        (FaultKind.EXPIRED, CredentialsExpired, "renew them"),
        (FaultKind.NO_BUCKET, StoreNotWritable, "create the bucket"),
    ],
)
@pytest.mark.parametrize("use", [lambda store: store.write_bytes("a", b"x"), write])
def test_a_refused_write_is_not_repeated(
    moto: MotoServer,
    kind: FaultKind,
    expected: type[DagflowError],
    said: str,
    use: Callable[[Store], Any],
) -> None:
    store = moto.new_store(retry=HASTY)
    moto.faults.play(Fault(kind, "put", count=None))
    with pytest.raises(expected, match=said):
        use(store)
    assert moto.faults.requests["put"] == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(FaultKind.FORBIDDEN, StoreNotReadable), (FaultKind.EXPIRED, CredentialsExpired)],
)
def test_a_refused_read_is_not_repeated(
    moto: MotoServer, kind: FaultKind, expected: type[DagflowError]
) -> None:
    store = moto.new_store(retry=HASTY)
    index = write(store)
    moto.faults.play(Fault(kind, "get", count=None))
    for use in (lambda: store.read_bytes("a"), lambda: read_arrays(store, "set", index)):
        with pytest.raises(expected, match="could not read"):
            use()
    assert moto.faults.requests["get"] == 2


def test_a_head_without_a_reason_guesses_the_usual_one(moto: MotoServer) -> None:
    store = moto.new_store(retry=HASTY)
    moto.faults.play(Fault(FaultKind.EXPIRED, "info", count=None))
    with pytest.raises(StoreNotReadable, match="credentials that expired"):
        store.exists("a")


def test_a_put_that_succeeded_but_answered_an_error_has_won(moto: MotoServer) -> None:
    store = moto.new_store(retry=HASTY)
    moto.faults.play(Fault(FaultKind.LOST_ANSWER, "put"))
    assert store.create_bytes("a", b"mine, 4711")
    assert not store.create_bytes("a", b"theirs, 4712")


def test_a_wrong_secret_is_said_so(radosgw: S3Server) -> None:
    good = radosgw.new_store()
    bad = Store(good.url, replace(radosgw, secret="wrong").options, retry=HASTY)
    with pytest.raises(StoreNotWritable, match=r"SignatureDoesNotMatch.*secret key is wrong"):
        bad.write_bytes("a", b"x")
    with pytest.raises(StoreNotReadable, match="secret key is wrong"):
        bad.read_bytes("a")
    with pytest.raises(StoreNotWritable, match="tried to put"):
        bad.probe()


def test_an_unknown_key_is_said_so(radosgw: S3Server) -> None:
    good = radosgw.new_store()
    bad = Store(good.url, replace(radosgw, key="stranger").options, retry=HASTY)
    with pytest.raises(StoreNotWritable, match="doesn't know this access key"):
        bad.write_bytes("a", b"x")
    with pytest.raises(StoreNotWritable, match="doesn't know this access key"):
        write(bad)
    with pytest.raises(StoreNotReadable, match="doesn't know this access key"):
        bad.read_bytes("a")


def test_a_bucket_that_is_not_there_is_said_so(radosgw: S3Server) -> None:
    store = Store("s3://no-such-bucket/a", radosgw.options, retry=HASTY)
    with pytest.raises(StoreNotWritable, match="create the bucket"):
        store.write_bytes("a", b"x")
    with pytest.raises(StoreNotWritable, match="create the bucket"):
        store.probe()
    with pytest.raises(NotFound):
        store.read_bytes("a")


def test_of_creators_in_several_stores_one_wins(radosgw: S3Server) -> None:
    store = radosgw.new_store(retry=HASTY)
    assert store.probe().conditional_create
    for number in range(10):
        offers = [f"{number}: {creator}".encode() for creator in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda o, n=number: store.create_bytes(f"{n}", o), offers))
        assert won.count(True) == 1
        assert store.read_bytes(f"{number}") == offers[won.index(True)]


def test_plain_zarr_reads_our_arrays_from_a_real_server(radosgw_store: Store) -> None:
    write(radosgw_store)
    array = zarr.open(
        f"{radosgw_store.url}/set/float32", mode="r", storage_options=radosgw_store.options
    )
    np.testing.assert_array_equal(array[:], DATA)


def test_a_snapshot_survives_a_minute_like_any_other(radosgw: S3Server, tmp_path: Path) -> None:
    script = [
        Fault(FaultKind.UNAVAILABLE, "put", count=6),
        Fault(FaultKind.LOST_ANSWER, "put", path=r"manifest\.json"),
        Fault(FaultKind.FLIPPED, "get", path=CHUNK),
    ]
    store = with_faults(radosgw.new_store(retry=HASTY), script, tmp_path / "counters")
    commit_snapshot(store, 7, [write_shard(store, 7, "stage-0", SPECS, lambda _: DATA)], {})
    np.testing.assert_array_equal(Snapshot.open(store, 7).read("parameter", ["w"])["w"], DATA)
