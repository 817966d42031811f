import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage import (
    DamagedData,
    FormatTooNew,
    NotFound,
    Store,
    StoreNotWritable,
    TokenArray,
    write_tokens,
)
from dagflow_storage.arrays import tokens as tokens_module
from dagflow_storage.arrays.flat import FlatArray

SMALL_CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK_TOKENS", SMALL_CHUNK)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first tokens of the chunks that are decoded."""
    seen: list[int] = []
    original = FlatArray.read

    def recording(self: FlatArray, start: int, stop: int) -> np.ndarray:
        seen.append(start)
        return original(self, start, stop)

    monkeypatch.setattr(FlatArray, "read", recording)
    return seen


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 100])
def test_any_number_of_tokens_comes_back(store: Store, num_tokens: int) -> None:
    expected = np.arange(num_tokens)
    assert write_tokens(store, expected, attributes={"vocabulary_size": 100}) == num_tokens
    tokens = TokenArray(store)
    assert len(tokens) == num_tokens
    assert tokens.attributes == {"vocabulary_size": 100}
    if num_tokens:
        np.testing.assert_array_equal(tokens.read(np.array([0]), num_tokens)[0], expected)


@pytest.mark.parametrize("sizes", [[], [0, 3], [16, 16], [5] * 20, [40, 1, 40]])
def test_pieces_are_joined(store: Store, sizes: list[int]) -> None:
    expected = np.arange(sum(sizes))

    def pieces() -> Iterator[np.ndarray]:
        yield from np.split(expected, np.cumsum(sizes)[:-1]) if sizes else []

    assert write_tokens(store, pieces()) == len(TokenArray(store)) == expected.size


@given(
    offsets=st.lists(st.integers(0, 60), max_size=20),
    length=st.integers(1, 40),
    num_cached=st.integers(1, 3),
)
@settings(deadline=None, max_examples=50)
def test_windows_are_slices(offsets: list[int], length: int, num_cached: int) -> None:
    expected = np.random.default_rng(0).integers(0, 1000, 100)
    root, name = Store("memory://"), f"tokens-{id(offsets)}"
    try:
        write_tokens(root.child(name), expected)
        tokens = TokenArray(root.child(name), num_cached_chunks=num_cached)
        found = tokens.read(np.array(offsets, dtype=np.int64), length)
    finally:
        root.delete(name)
    assert found.dtype == np.int64
    assert found.shape == (len(offsets), length)
    for row, offset in zip(found, offsets, strict=True):
        np.testing.assert_array_equal(row, expected[offset : offset + length])


def test_a_chunk_is_decoded_once(memory: Store, decoded: list[int]) -> None:
    write_tokens(memory, np.arange(100))
    tokens = TokenArray(memory)
    for _ in range(3):
        tokens.read(np.array([70, 3, 9, 40, 1]), 10)
    assert sorted(decoded) == [0, 16, 32, 48, 64]


def test_the_cache_is_bounded_and_keeps_what_was_used_last(
    memory: Store, decoded: list[int]
) -> None:
    write_tokens(memory, np.arange(100))
    tokens = TokenArray(memory, num_cached_chunks=2)
    for offset in (0, 16, 0, 32, 0, 16):
        tokens.read(np.array([offset]), 1)
    assert decoded == [0, 16, 32, 16]


def test_a_token_array_survives_pickling(memory: Store) -> None:
    write_tokens(memory, np.arange(100))
    tokens = TokenArray(memory)
    tokens.read(np.array([0]), 5)
    assert pickle.loads(pickle.dumps(tokens)).read(np.array([95]), 5)[0, -1] == 99


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (96, 5), (0, 101), (0, 0)])
def test_windows_beyond_the_data_are_refused(memory: Store, offset: int, length: int) -> None:
    write_tokens(memory, np.arange(100))
    with pytest.raises(IndexError, match=f"of {length}"):
        TokenArray(memory).read(np.array([offset]), length)


@pytest.mark.parametrize("token", [-1, 65536])
def test_tokens_that_do_not_fit_are_refused(memory: Store, token: int) -> None:
    with pytest.raises(ValueError, match="uint16"):
        write_tokens(memory, np.array([1, token]))
    with pytest.raises(NotFound, match="not completely written"):
        TokenArray(memory).read(np.array([0]), 1)


def test_wide_vocabularies_have_wide_tokens(store: Store) -> None:
    write_tokens(store, np.array([70000]), dtype="uint32")
    assert TokenArray(store).read(np.array([0]), 1)[0, 0] == 70000


def test_a_place_without_tokens_says_so(store: Store) -> None:
    store.write_bytes("a", b"x")
    with pytest.raises(NotFound, match="holds no tokens"):
        len(TokenArray(store))


def test_a_crash_while_writing_leaves_no_tokens(store: Store) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(40)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(store, pieces())
    with pytest.raises(NotFound, match="not completely written"):
        len(TokenArray(store))
    write_tokens(store, np.arange(7))
    assert len(TokenArray(store)) == 7


def test_tokens_replace_tokens(store: Store) -> None:
    write_tokens(store, np.arange(100), attributes={"old": 1})
    write_tokens(store, np.arange(20))
    assert len(TokenArray(store)) == 20
    assert TokenArray(store).attributes == {}


def test_tokens_replace_nothing_else(store: Store) -> None:
    store.write_bytes("thesis.txt", b"years of work")
    with pytest.raises(StoreNotWritable, match=r"thesis\.txt"):
        write_tokens(store, np.arange(100))
    assert store.read_bytes("thesis.txt") == b"years of work"


def test_a_damaged_chunk_of_tokens_is_named(folder: Store) -> None:
    write_tokens(folder, np.arange(100))
    chunk = Path(folder.url, "c", "2")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(DamagedData, match="c/2"):
        TokenArray(folder).read(np.array([0]), 100)


def test_newer_tokens_are_refused(store: Store) -> None:
    write_tokens(store, np.arange(100))
    newer = store.read_bytes("zarr.json").replace(b'"format_version": 1', b'"format_version": 9')
    store.write_bytes("zarr.json", newer)
    with pytest.raises(FormatTooNew, match=r"version 9.*up to 1"):
        len(TokenArray(store))
