from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage import (
    ALIGNMENT_BYTES,
    ArraySpec,
    DamagedData,
    NotFound,
    Store,
    StoredArray,
    StoreUnreachable,
    read_arrays,
    write_arrays,
)
from dagflow_storage.arrays import arrays as arrays_module
from dagflow_storage.arrays.flat import FlatArray

Data = dict[str, np.ndarray]
SMALL_CHUNK_BYTES = 64


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", SMALL_CHUNK_BYTES)


def specs_of(data: Data, role: str = "parameter") -> list[ArraySpec]:
    return [ArraySpec(name, role, array.dtype.name, array.shape) for name, array in data.items()]


def write(store: Store, data: Data) -> list[StoredArray]:
    return write_arrays(store, "set", specs_of(data), data.__getitem__)


def counted(sizes: list[int], dtype: str = "float32") -> Data:
    return {f"a{i}": np.arange(size, dtype=dtype) + 100 * i for i, size in enumerate(sizes)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are read from flat arrays."""
    seen: list[tuple[int, int]] = []
    original = FlatArray.read_into

    def recording(self: FlatArray, pieces: Sequence[tuple[int, np.ndarray]]) -> None:
        seen.append((pieces[0][0], pieces[-1][0] + pieces[-1][1].size))
        original(self, pieces)

    monkeypatch.setattr(FlatArray, "read_into", recording)
    return seen


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "float64", "int64", "bool", "uint8"])


@given(layout=st.lists(st.tuples(dtypes, shapes), max_size=12), picked=st.data())
@settings(max_examples=40, deadline=None)
def test_any_subset_of_any_arrays_comes_back(
    layout: list[tuple[str, tuple[int, ...]]], picked: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    data = {f"a{i}": rng.integers(0, 2, shape).astype(t) for i, (t, shape) in enumerate(layout)}
    root, name = Store("memory://"), f"arrays-{rng.integers(2**62)}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arrays_module, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
            index = write(root.child(name), data)
        subset = [s for s in index if picked.draw(st.booleans(), label=s.name)]
        found = read_arrays(root.child(name), "set", subset)
    finally:
        root.delete(name)
    assert found.keys() == {stored.name for stored in subset}
    for name, array in found.items():
        np.testing.assert_array_equal(array, data[name], strict=True)


@given(st.builds(StoredArray, st.text(), st.text(), st.text(), shapes, st.text(), st.integers(0)))
def test_an_index_survives_json(stored: StoredArray) -> None:
    assert StoredArray.from_json(stored.to_json()) == stored


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("sizes", [[1], [16], [17], [64, 1], [63, 2], [5] * 40, [1000, 3, 500]])
def test_chunk_borders_lose_nothing(folder: Store, sizes: list[int]) -> None:
    data = counted(sizes)
    found = read_arrays(folder, "set", write(folder, data))
    for name, expected in data.items():
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_bfloat16_travels_as_integers_under_its_own_label(store: Store) -> None:
    bits = np.array([[0x3F80, 0xC000], [0x7FC0, 0]], dtype=np.uint16)
    specs = [
        ArraySpec("half", "parameter", "bfloat16", (2, 2)),
        ArraySpec("ids", "buffer", "uint16", (2, 2)),
    ]
    index = write_arrays(store, "set", specs, lambda _: bits)
    assert [stored.array for stored in index] == ["bfloat16", "uint16"]
    assert [stored.dtype for stored in index] == ["bfloat16", "uint16"]
    found = read_arrays(store, "set", index)
    np.testing.assert_array_equal(found["half"], bits, strict=True)


def test_arrays_that_are_not_contiguous_are_written_in_their_own_order(store: Store) -> None:
    data = {"t": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    np.testing.assert_array_equal(read_arrays(store, "set", write(store, data))["t"], data["t"])


def test_each_array_is_asked_for_once_and_in_order(memory: Store) -> None:
    data: Data = {**counted([3, 0, 4]), "i": np.arange(2), "z": np.ones(1, np.float32)}
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return data[name]

    write_arrays(memory, "set", specs_of(data), read)
    assert asked == list(data)


def test_no_chunk_is_written_twice(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
    written: dict[int, int] = {}
    original = FlatArray.write_chunk

    def recording(self: FlatArray, number: int, data: np.ndarray) -> None:
        assert number not in written
        written[number] = data.size
        original(self, number, data)

    monkeypatch.setattr(FlatArray, "write_chunk", recording)
    write(folder, counted([5, 200, 7, 64, 1]))
    assert sorted(written) == list(range(len(written)))
    assert sum(written.values()) == 277
    assert max(written.values()) * 4 <= SMALL_CHUNK_BYTES


def test_what_was_read_may_be_written_to(store: Store) -> None:
    found = read_arrays(store, "set", write(store, counted([3, 3])))
    found["a0"][:] = -1
    assert found["a1"].tolist() == [100, 101, 102]


@pytest.mark.usefixtures("small_chunks")
def test_neighbours_are_read_at_once_and_strangers_left_alone(
    folder: Store, reads: list[tuple[int, int]]
) -> None:
    index = write(folder, counted([16] * 8))
    read_arrays(folder, "set", [index[i] for i in (6, 1, 2)])
    assert reads == [(16, 48), (96, 112)]


def test_arrays_are_aligned_and_have_memory_of_their_own(folder: Store) -> None:
    index = write(folder, counted([5, 200, 7]))
    found = read_arrays(folder, "set", index)
    assert all(array.ctypes.data % ALIGNMENT_BYTES == 0 for array in found.values())
    assert not any(np.shares_memory(found["a0"], found[name]) for name in ("a1", "a2"))


@pytest.mark.usefixtures("small_chunks")
def test_a_partial_read_does_not_touch_other_chunks(folder: Store) -> None:
    index = write(folder, counted([16] * 4))
    for number in (0, 2, 3):
        chunk_file(folder, number).unlink()
    assert read_arrays(folder, "set", [index[1]])["a1"][0] == 100


def chunk_file(store: Store, number: int) -> Path:
    return Path(store.url, "set", "float32", "c", str(number))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, empty, Path.unlink])
def test_a_damaged_chunk_is_noticed_and_named(
    folder: Store, damage: Callable[[Path], None]
) -> None:
    index = write(folder, counted([16] * 4))
    damage(chunk_file(folder, 2))
    with pytest.raises(DamagedData, match="set/float32/c/2 "):
        read_arrays(folder, "set", index)


def test_a_missing_chunk_of_zeros_is_noticed_too(folder: Store) -> None:
    index = write(folder, {"zeros": np.zeros(5, np.float32)})
    chunk_file(folder, 0).unlink()
    with pytest.raises(DamagedData, match="missing"):
        read_arrays(folder, "set", index)


def test_damage_that_a_second_read_does_not_find_is_read_again(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(folder, counted([4]))
    answers = iter([ValueError("checksum")])
    original = FlatArray._read

    def garbled_once(self: FlatArray, *where: Any) -> None:
        for error in answers:
            raise error
        original(self, *where)

    monkeypatch.setattr(FlatArray, "_read", garbled_once)
    assert read_arrays(folder, "set", index)["a0"].tolist() == [0, 1, 2, 3]


def test_reads_that_go_on_being_garbled_are_given_up(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write(folder, counted([4]))
    original, calls = FlatArray._read, iter(range(10**6))

    def garbled_every_other_time(self: FlatArray, *where: Any) -> None:
        if next(calls) % 2 == 0:
            raise ValueError("checksum")
        original(self, *where)

    monkeypatch.setattr(FlatArray, "_read", garbled_every_other_time)
    with pytest.raises(StoreUnreachable, match=r"second read; given up after \d+ attempts in 60 s"):
        read_arrays(folder, "set", index)


def test_damaged_metadata_is_noticed(folder: Store) -> None:
    index = write(folder, counted([4]))
    folder.write_bytes("set/float32/zarr.json", b"{")
    with pytest.raises(DamagedData, match="metadata of set/float32"):
        read_arrays(folder, "set", index)


def test_an_array_shorter_than_its_index_is_noticed(store: Store) -> None:
    write(store, counted([4]))
    beyond = StoredArray("a", "parameter", "float32", (9,), "float32", 0)
    with pytest.raises(DamagedData, match="4 elements"):
        read_arrays(store, "set", [beyond])


def test_arrays_that_are_not_there_are_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="set/float32"):
        read_arrays(store, "set", [StoredArray("a", "r", "float32", (1,), "float32", 0)])


def test_a_name_in_two_roles_is_refused(memory: Store) -> None:
    specs = [ArraySpec("w", role, "float32", (1,)) for role in ("parameter", "gradient")]
    with pytest.raises(ValueError, match="'parameter' and 'gradient'"):
        write_arrays(memory, "set", specs, lambda _: np.zeros(1, np.float32))


@pytest.mark.parametrize("data", [np.zeros(3, np.float32), np.zeros(2, np.float64)])
def test_data_that_is_not_what_the_spec_says_is_refused(memory: Store, data: np.ndarray) -> None:
    with pytest.raises(ValueError, match="'w' should"):
        write_arrays(memory, "set", [ArraySpec("w", "p", "float32", (2,))], lambda _: data)
