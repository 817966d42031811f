"""The test suite that every kind of store must pass; needs pytest.

Subclass `StoreConformance` in a test module and give it a ``store`` fixture that returns an
empty `Store`, new for each test.
"""

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dagflow_storage.arrays import ArraySpec, read_arrays, write_arrays
from dagflow_storage.errors import NotFound
from dagflow_storage.location import Store
from dagflow_storage.runs import RunDirectory
from dagflow_storage.snapshots import Snapshot, commit_snapshot, list_snapshots, write_shard
from dagflow_storage.tokens import TokenArray, write_tokens

NUM_CREATORS = 8


class StoreConformance:
    """What the rest of dagflow relies on in a store."""

    def test_what_was_written_is_read(self, store: Store) -> None:
        store.write_bytes("a/b.bin", b"first")
        store.write_bytes("a/b.bin", b"second")
        assert store.read_bytes("a/b.bin") == b"second"

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

    def test_a_child_is_a_prefix(self, store: Store) -> None:
        store.child("a", "b").write_bytes("c", b"x")
        assert store.read_bytes("a/b/c") == b"x"
        assert store.child("a").child("b") == store.child("a/b")

    def test_probe_leaves_nothing_behind(self, store: Store) -> None:
        store.probe()
        assert store.list() == []

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
