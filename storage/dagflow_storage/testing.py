"""The test suite that every kind of store must pass; needs pytest.

Subclass `StoreConformance` in a test module and give it a ``store`` fixture that returns an
empty `Store`, new for each test. A store that is known to lack something says so in the subclass.
"""

import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from dagflow_storage.arrays.arrays import ArraySpec, read_arrays, write_arrays
from dagflow_storage.arrays.tokens import TokenArray, write_tokens
from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.faults import FakeClock, Fault, FaultKind, num_attempts, with_faults
from dagflow_storage.place.location import ConditionMissing, Store
from dagflow_storage.records.run_directory import RunDirectory
from dagflow_storage.records.snapshots import Snapshot, commit_snapshot, list_snapshots, write_shard

__all__ = [
    "FakeClock",
    "Fault",
    "FaultKind",
    "StoreConformance",
    "num_attempts",
    "with_faults",
]
NUM_CREATORS = 8
CHUNK = "arrays/float32/c/0"

Damage = Callable[[bytes], bytes]


def flipped(data: bytes) -> bytes:
    """One bit is wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def truncated(data: bytes) -> bytes:
    """The end is missing."""
    return data[:-3]


def emptied(_: bytes) -> bytes:
    """All is missing."""
    return b""


class StoreConformance:
    """What the rest of dagflow relies on in a store.

    Attributes
    ----------
    conditional_create
        Whether the store itself decides between several creators.
    num_children
        S3 lists 1000 objects a page, and deletes as many a request.
    """

    conditional_create: ClassVar[bool] = True
    num_children: ClassVar[int] = 1005

    def test_what_was_written_is_read(self, store: Store) -> None:
        store.write_bytes("a/b.bin", b"first")
        store.write_bytes("a/b.bin", b"second")
        assert store.read_bytes("a/b.bin") == b"second"

    def test_a_large_object_is_read_as_written(self, store: Store) -> None:
        data = np.random.default_rng(0).bytes(9 * 2**20 + 1)
        store.write_bytes("large", data)
        assert store.read_bytes("large") == data

    @pytest.mark.parametrize("name", ["with space", "a+b=c", "ü", "50%41", "a#b", "a@b:c", "[x]"])
    def test_odd_names_are_names(self, store: Store, name: str) -> None:
        store.write_bytes(f"odd/{name}", b"x")
        assert store.list("odd") == [name]
        assert store.read_bytes(f"odd/{name}") == b"x"
        store.delete(f"odd/{name}")
        assert not store.exists(f"odd/{name}")

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        store.write_bytes("empty", b"")
        assert store.exists("empty")
        assert store.read_bytes("empty") == b""

    def test_reading_what_is_absent_is_not_found(self, store: Store) -> None:
        store.write_bytes("file", b"x")
        for path in ("absent", "absent/below", "file/below"):
            with pytest.raises(NotFound, match=path):
                store.read_bytes(path)
            assert not store.exists(path)

    def test_create_does_not_replace(self, store: Store) -> None:
        assert store.create_bytes("a/once", b"first")
        assert not store.create_bytes("a/once", b"second")
        assert store.read_bytes("a/once") == b"first"
        assert store.list("a") == ["once"]

    def test_create_of_the_same_bytes_is_refused_too(self, store: Store) -> None:
        assert store.create_bytes("once", b"same")
        assert not store.create_bytes("once", b"same")

    def test_of_several_creators_one_wins(self, store: Store) -> None:
        offers = [f"creator {number}".encode() for number in range(NUM_CREATORS)]
        with ThreadPoolExecutor(NUM_CREATORS) as pool:
            won = list(pool.map(lambda offer: store.create_bytes("prize", offer), offers))
        assert won.count(True) == 1
        assert store.read_bytes("prize") == offers[won.index(True)]

    def test_list_names_direct_children_only(self, store: Store) -> None:
        for path in ("b", "a/x", "a/y/z", "ab"):
            store.write_bytes(path, b"x")
        assert store.list() == ["a", "ab", "b"]
        assert store.list("a") == ["x", "y"]
        assert store.list("absent") == []
        assert store.list("b") == []

    def test_list_sees_what_another_store_object_wrote(self, store: Store) -> None:
        assert store.list("a") == []
        pickle.loads(pickle.dumps(store)).write_bytes("a/new", b"x")
        assert store.list("a") == ["new"]

    def test_delete_takes_all_below_and_nothing_beside(self, store: Store) -> None:
        for path in ("a/x", "a/y/z", "ab"):
            store.write_bytes(path, b"x")
        store.delete("a")
        store.delete("a")
        assert store.list() == ["ab"]
        assert not store.exists("a/y/z")

    def test_many_children_are_listed_and_deleted(self, store: Store) -> None:
        names = [f"{number:05d}" for number in range(self.num_children)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.write_bytes(f"many/{name}", b""), names))
        assert store.list("many") == names
        store.delete("many")
        assert store.list() == []

    def test_a_child_is_a_prefix(self, store: Store) -> None:
        store.child("a", "b").write_bytes("c", b"x")
        assert store.read_bytes("a/b/c") == b"x"
        assert store.child("a").child("b") == store.child("a/b")

    def test_probe_leaves_nothing_behind(self, store: Store) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConditionMissing)
            store.probe()
        assert store.list() == []

    def test_probe_knows_whether_a_create_can_fail(self, store: Store) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = store.probe()
        assert report.conditional_create is self.conditional_create
        told = [warning.category for warning in said]
        assert told == ([] if self.conditional_create else [ConditionMissing])

    def test_create_works_after_a_probe(self, store: Store) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConditionMissing)
            store.probe()
        for place in (store, store.child("below"), pickle.loads(pickle.dumps(store.child("p")))):
            assert place.create_bytes("once", b"first")
            assert not place.create_bytes("once", b"second")
            assert place.read_bytes("once") == b"first"

    def test_arrays_survive(self, store: Store) -> None:
        data: dict[str, NDArray[Any]] = {
            "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
            "scalar": np.array(7, dtype=np.int64),
            "empty": np.empty((0, 4), dtype=np.float32),
        }
        specs = [ArraySpec(k, "parameter", v.dtype.name, v.shape) for k, v in data.items()]
        index = write_arrays(store, "arrays", specs, data.__getitem__)
        found = read_arrays(store, "arrays", index)
        for name, expected in data.items():
            np.testing.assert_array_equal(found[name], expected, strict=True)

    @pytest.mark.parametrize("damage", [flipped, truncated, emptied])
    def test_a_damaged_chunk_is_noticed_and_named(self, store: Store, damage: Damage) -> None:
        specs = [ArraySpec("w", "parameter", "float32", (99,))]
        index = write_arrays(store, "arrays", specs, lambda _: np.arange(99, dtype=np.float32))
        store.write_bytes(CHUNK, damage(store.read_bytes(CHUNK)))
        with pytest.raises(DamagedData, match=CHUNK):
            read_arrays(store, "arrays", index)

    def test_a_missing_chunk_is_noticed_and_named(self, store: Store) -> None:
        specs = [ArraySpec("w", "parameter", "float32", (99,))]
        index = write_arrays(store, "arrays", specs, lambda _: np.zeros(99, dtype=np.float32))
        store.delete(CHUNK)
        with pytest.raises(DamagedData, match=CHUNK):
            read_arrays(store, "arrays", index)

    def test_a_snapshot_exists_once_committed(self, store: Store) -> None:
        specs = [ArraySpec("w", "parameter", "float32", (3,))]
        record = write_shard(store, 4, "stage-0", specs, lambda _: np.ones(3, np.float32))
        assert list_snapshots(store) == []
        commit_snapshot(store, 4, [record], {"loss": 1.5})
        assert list_snapshots(store) == [4]
        found = Snapshot.open(store, 4)
        assert found.meta == {"loss": 1.5}
        np.testing.assert_array_equal(found.read("parameter", ["w"])["w"], np.ones(3))

    def test_a_run_survives(self, store: Store) -> None:
        run = RunDirectory(store)
        run.create({"lr": 0.1})
        run.append_metrics([{"step": 0, "loss": 2.0}])
        run.append_metrics([{"step": 1, "loss": 1.0}])
        assert run.settings() == {"lr": 0.1}
        assert [row["loss"] for row in run.read_metrics()] == [2.0, 1.0]

    def test_tokens_survive(self, store: Store) -> None:
        assert write_tokens(store.child("tokens"), np.arange(100)) == 100
        tokens = TokenArray(store.child("tokens"))
        assert tokens.read(np.array([0, 90]), 10).tolist() == [
            list(range(10)),
            list(range(90, 100)),
        ]
