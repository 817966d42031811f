"""A data set of tokens: one long array, read in windows."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.arrays.flat import AnyArray, FlatArray
from dagflow_storage.errors import FormatTooNew, NotFound, StoreNotWritable
from dagflow_storage.place import fields
from dagflow_storage.place.documents import JSON, sound
from dagflow_storage.place.location import Store

TOKENS_FORMAT = 1
CHUNK_TOKENS = 2**20
# 64 MB of uint16, 128 MB of uint32.
NUM_CACHED_CHUNKS = 32
_MARK = "dagflow_tokens"
# Written once, read often: worth six times the work of level 1, see docs/storage.md.
_CODEC = Blosc2Codec(clevel=5)


def write_tokens(
    url: str | Store,
    tokens: AnyArray | Iterable[AnyArray],
    *,
    dtype: DTypeLike = "uint16",
    attributes: Mapping[str, JSON] = {},
) -> int:
    """Write a data set of tokens, replacing a data set of tokens at the same place.

    The mark that makes it one is written last: a crash leaves none.

    Parameters
    ----------
    tokens
        Token ids, ``(N,)``, or pieces of them; one piece at a time is held in memory.
    dtype
        Unsigned integers wide enough for the vocabulary.
    attributes
        Kept beside the tokens: vocabulary size, tokenizer, source.

    Returns
    -------
    int
        The number of tokens.

    Raises
    ------
    ValueError
        If a token doesn't fit `dtype`.
    StoreNotWritable
        If something else than tokens is there.
    """
    store = _as_store(url)
    _make_room(store)
    pieces = [tokens] if isinstance(tokens, np.ndarray) else tokens
    array = FlatArray.create(
        store, "", dtype, CHUNK_TOKENS, CHUNK_TOKENS, {_MARK: None}, codec=_CODEC
    )
    num_tokens = 0
    for number, chunk in enumerate(_rechunked(pieces, np.dtype(dtype))):
        array.write_chunk(number, chunk)
        num_tokens += chunk.size
    array.resize(num_tokens)
    store.flush("")
    mark = {"format_version": TOKENS_FORMAT, "num_tokens": num_tokens}
    array.update_attributes({**attributes, _MARK: mark})
    return num_tokens


class TokenArray:
    """A data set of tokens, opened at its first use; may be pickled and shared by threads.

    The chunks used last stay decoded, so that random windows don't decode one each.

    Parameters
    ----------
    url
        Where `write_tokens` put them.
    num_cached_chunks
        How many decoded chunks, of `CHUNK_TOKENS` tokens, are held in memory.
    """

    def __init__(self, url: str | Store, *, num_cached_chunks: int = NUM_CACHED_CHUNKS) -> None:
        self._store = _as_store(url)
        self._num_cached_chunks = max(1, num_cached_chunks)
        self._lock = threading.Lock()
        self._array: FlatArray | None = None
        self._chunks: OrderedDict[int, AnyArray] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._store, self._num_cached_chunks)

    def __repr__(self) -> str:
        return f"TokenArray({self._store!r})"

    def __len__(self) -> int:
        return len(self._opened())

    @property
    def attributes(self) -> dict[str, Any]:
        """What was stored beside the tokens."""
        attributes = self._opened().attributes
        return {name: value for name, value in attributes.items() if name != _MARK}

    def read(self, offsets: NDArray[np.integer[Any]], length: int) -> NDArray[np.int64]:
        """Windows of tokens.

        Parameters
        ----------
        offsets
            First token of each window, ``(B,)``.
        length
            Tokens a window, T.

        Returns
        -------
        ndarray
            ``(B, T)``.

        Raises
        ------
        IndexError
            If a window reaches beyond the data.
        """
        starts = np.asarray(offsets, dtype=np.int64).reshape(-1)
        self._check_windows(starts, length)
        windows = np.empty((starts.size, length), dtype=np.int64)
        chunk_tokens = self._opened().chunk_elements
        for number in _chunks_touched(starts, length, chunk_tokens):
            first = number * chunk_tokens
            chunk = self._chunk(number)
            overlapping = (starts < first + chunk.size) & (starts + length > first)
            for row in np.flatnonzero(overlapping):
                begin = max(first, int(starts[row]))
                end = min(first + chunk.size, int(starts[row]) + length)
                target = slice(begin - int(starts[row]), end - int(starts[row]))
                windows[row, target] = chunk[begin - first : end - first]
        return windows

    def _check_windows(self, starts: NDArray[np.int64], length: int) -> None:
        num_tokens = len(self)
        if length < 1:
            raise IndexError(f"windows of {length} tokens were asked for")
        outside = starts[(starts < 0) | (starts > num_tokens - length)]
        if outside.size:
            raise IndexError(
                f"{self!r} has {num_tokens} tokens, a window of {length} was to be read at "
                f"{int(outside[0])}"
            )

    def _opened(self) -> FlatArray:
        if self._array is None:
            self._array = _open_tokens(self._store)
        return self._array

    def _chunk(self, number: int) -> AnyArray:
        with self._lock:
            if number in self._chunks:
                self._chunks.move_to_end(number)
                return self._chunks[number]
        array = self._opened()
        first = number * array.chunk_elements
        chunk = array.read(first, min(first + array.chunk_elements, len(array)))
        with self._lock:
            self._chunks[number] = chunk
            while len(self._chunks) > self._num_cached_chunks:
                self._chunks.popitem(last=False)
        return chunk


def _reopened(store: Store, num_cached_chunks: int) -> TokenArray:
    return TokenArray(store, num_cached_chunks=num_cached_chunks)


def _as_store(url: str | Store) -> Store:
    return url if isinstance(url, Store) else Store(url)


def _open_tokens(store: Store) -> FlatArray:
    try:
        array = FlatArray.open(store, "")
    except NotFound as error:
        raise NotFound(f"{store!r} holds no tokens; write_tokens writes them") from error
    mark = array.attributes.get(_MARK)
    if not isinstance(mark, dict):
        raise NotFound(
            f"{store!r} holds an array, but no tokens, or they were not completely written; "
            "write_tokens writes them"
        )
    with sound(f"what the tokens in {store!r} say of themselves is damaged"):
        fields.members(mark, "it", "format_version", "num_tokens")
        found = fields.integer(mark["format_version"], "format_version")
    if found > TOKENS_FORMAT:
        raise FormatTooNew(
            f"the tokens in {store!r} have format version {found}, this dagflow reads versions "
            f"up to {TOKENS_FORMAT}: upgrade dagflow"
        )
    with sound(f"the tokens in {store!r} are damaged"):
        fields.integer(mark["num_tokens"], "num_tokens", len(array), len(array))
        if array.dtype.kind not in "iu":
            raise ValueError(f"they are {array.dtype}, not integers")
    return array


def _make_room(store: Store) -> None:
    """Remove tokens from an earlier call, and never anything else."""
    if not store.list():
        return
    try:
        is_ours = _MARK in FlatArray.open(store, "").attributes
    except NotFound:
        is_ours = False
    if not is_ours:
        raise StoreNotWritable(
            f"{store!r} holds something else than tokens ({', '.join(store.list()[:5])}): "
            "choose an empty place"
        )
    # The metadata first: from here on there are no tokens, however far the rest gets.
    store.delete("zarr.json")
    store.delete("c")


def _rechunked(pieces: Iterable[AnyArray], dtype: np.dtype[Any]) -> Iterator[AnyArray]:
    buffer = np.empty(CHUNK_TOKENS, dtype)
    filled = 0
    for piece in pieces:
        rest = np.asarray(piece).reshape(-1)
        _check_range(rest, dtype)
        while rest.size:
            taken = min(rest.size, CHUNK_TOKENS - filled)
            buffer[filled : filled + taken] = rest[:taken]
            filled, rest = filled + taken, rest[taken:]
            if filled == CHUNK_TOKENS:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _check_range(tokens: AnyArray, dtype: np.dtype[Any]) -> None:
    if tokens.size == 0 or np.can_cast(tokens.dtype, dtype):
        return
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are integers, got {tokens.dtype}")
    lowest, highest = int(tokens.min()), int(tokens.max())
    limits = np.iinfo(dtype)
    if lowest < limits.min or highest > limits.max:
        raise ValueError(f"tokens from {lowest} to {highest} don't fit {dtype}: widen dtype")


def _chunks_touched(starts: NDArray[np.int64], length: int, chunk_tokens: int) -> list[int]:
    touched: set[int] = set()
    firsts = np.unique(starts // chunk_tokens)
    for first in firsts:
        members = starts[starts // chunk_tokens == first]
        last = (int(members.max()) + length - 1) // chunk_tokens
        touched.update(range(int(first), last + 1))
    return sorted(touched)
