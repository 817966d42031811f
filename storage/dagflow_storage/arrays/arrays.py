"""Many named arrays, stored as one flat zarr array per dtype.

A model has hundreds of small arrays; one file, or one request, for each costs three to four
times as much as laying them end to end in chunks of 8 MiB.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.arrays.flat import AnyArray, FlatArray
from dagflow_storage.errors import DamagedData
from dagflow_storage.place import fields
from dagflow_storage.place.location import Store

CHUNK_BYTES = 8 * 2**20
# At once: their compression and their requests overlap, while the next ones are gathered.
NUM_CHUNKS_UNDER_WAY = 4
# Kernels may round differently on what isn't aligned to their vectors; torch aligns to this.
ALIGNMENT_BYTES = 64
_MOST_ITEMSIZE = 16  # of complex128
_MOST_INTEGER = 10**40  # that `parse_json` takes

_NUMPY_LABELS = frozenset(np.dtype(code).name for code in "?bBhHiIlLqQefdFD")


@dataclass(frozen=True)
class ArraySpec:
    """An array to be written: `dtype` is a label, and may be one that numpy lacks."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredArray:
    """An array as it lies in the store: `offset` elements into the flat array `array`."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    array: str
    offset: int

    @property
    def num_elements(self) -> int:
        """Elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def end(self) -> int:
        """The flat array's first element after this one."""
        return self.offset + self.num_elements

    def to_json(self) -> dict[str, Any]:
        """As it goes into a manifest."""
        return {
            "name": self.name,
            "role": self.role,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "array": self.array,
            "offset": self.offset,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StoredArray":
        """As it comes out of a manifest; ValueError if it is none."""
        wanted = ("name", "role", "dtype", "shape", "array", "offset")
        given = fields.members(data, "an array", *wanted)
        name = fields.text(given["name"], "an array's name")
        return cls(
            name,
            fields.text(given["role"], f"the role of {name!r}"),
            fields.text(given["dtype"], f"the dtype of {name!r}"),
            fields.shape(given["shape"], f"the shape of {name!r}", _MOST_ITEMSIZE),
            fields.text(given["array"], f"where {name!r} lies"),
            fields.integer(given["offset"], f"the offset of {name!r}", most=_MOST_INTEGER),
        )


def check_places(arrays: Sequence[StoredArray]) -> None:
    """Raise ValueError unless arrays lie in one folder, beside each other."""
    for stored in arrays:
        fields.name(stored.array, f"where {stored.name!r} lies")
        fields.integer(stored.end, f"the end of {stored.name!r}")
    ends: dict[str, tuple[int, str]] = {}
    for stored in sorted(arrays, key=lambda stored: (stored.array, stored.offset, stored.end)):
        end, other = ends.get(stored.array, (0, ""))
        if stored.num_elements and stored.offset < end:
            raise ValueError(f"{stored.name!r} and {other!r} overlap in {stored.array!r}")
        if stored.end > end:
            ends[stored.array] = stored.end, stored.name


def write_arrays(
    store: Store,
    path: str,
    specs: Sequence[ArraySpec],
    read: Callable[[str], AnyArray],
) -> list[StoredArray]:
    """Write arrays below `path`, which must be unused, and tell where each one lies.

    Memory on top of what `read` returns: `NUM_CHUNKS_UNDER_WAY` chunks a dtype and one, and as many
    again where they are compressed.

    Parameters
    ----------
    specs
        What is written, in this order. Names must differ, whatever their roles.
    read
        Called once a name, in order, when its turn comes. What numpy lacks arrives as integers
        of the same size: ``"bfloat16"`` as ``uint16``. What it returns mustn't change before this
        function returns: it is written behind.

    Raises
    ------
    ValueError
        If names repeat, or `read` returns something else than the spec says.
    """
    _check_names(specs)
    index = _layout(specs)
    num_elements = {stored.array: stored.end for stored in index}
    writers: dict[str, _FlatWriter] = {}
    with ThreadPoolExecutor(NUM_CHUNKS_UNDER_WAY) as pool:
        for spec, stored in zip(specs, index, strict=True):
            data = np.ascontiguousarray(read(spec.name))
            _check_data(spec, data)
            label = stored.array
            if label not in writers:
                place = f"{path}/{label}"
                writers[label] = _FlatWriter(store, place, data.dtype, num_elements[label], pool)
            writers[label].append(data.reshape(-1))
        for writer in writers.values():
            writer.finish()
    return index


def read_arrays(store: Store, path: str, index: Iterable[StoredArray]) -> dict[str, AnyArray]:
    """The arrays of `index`, by name; only the chunks they lie in are fetched.

    Arrays that lie side by side are read at once. Each has memory of its own, aligned as
    tensors are, and may be written to.

    Raises
    ------
    NotFound, DamagedData, StoreUnreachable
        As `FlatArray.read` does.
    """
    wanted = sorted(index, key=lambda stored: (stored.array, stored.offset))
    _check_names(wanted)
    found: dict[str, AnyArray] = {}
    for label, members in groupby(wanted, key=lambda stored: stored.array):
        source = FlatArray.open(store, f"{path}/{label}")
        here = list(members)
        _check_source(source, here, f"{path}/{label} in {store!r}")
        for run in _runs(here, source.chunk_elements):
            found.update(_read_run(source, run))
    return found


class _FlatWriter:
    """Lays arrays end to end and writes them chunk by chunk, a few at once."""

    def __init__(
        self, store: Store, path: str, dtype: np.dtype[Any], num_elements: int, pool: Executor
    ) -> None:
        chunk = chunk_elements(num_elements, dtype.itemsize)
        codec = codec_for(store)
        self._target = FlatArray.create(store, path, dtype, num_elements, chunk, codec=codec)
        self._pool = pool
        self._buffer, self._num_buffered = self._new_buffer(), 0
        self._spare: list[AnyArray] = []
        # Each with the buffer that it is written from, if any.
        self._under_way: deque[tuple[Future[None], AnyArray | None]] = deque()
        self._num_begun = 0

    def append(self, data: AnyArray) -> None:
        while data.size:
            if not self._num_buffered and data.size >= self._buffer.size:
                # Past the buffer: a large array is written from where it lies.
                self._begin(data[: self._buffer.size], None)
                data = data[self._buffer.size :]
            else:
                data = self._take(data)

    def finish(self) -> None:
        if self._num_buffered:
            self._begin(self._buffer[: self._num_buffered], None)
        while self._under_way:
            self._wait()

    def _take(self, data: AnyArray) -> AnyArray:
        taken = min(data.size, self._buffer.size - self._num_buffered)
        self._buffer[self._num_buffered : self._num_buffered + taken] = data[:taken]
        self._num_buffered += taken
        if self._num_buffered == self._buffer.size:
            self._begin(self._buffer, self._buffer)
            self._buffer = self._spare.pop() if self._spare else self._new_buffer()
            self._num_buffered = 0
        return data[taken:]

    def _begin(self, chunk: AnyArray, buffer: AnyArray | None) -> None:
        if len(self._under_way) == NUM_CHUNKS_UNDER_WAY:
            self._wait()
        future = self._pool.submit(self._target.write_chunk, self._num_begun, chunk)
        self._under_way.append((future, buffer))
        self._num_begun += 1

    def _wait(self) -> None:
        """Wait for the oldest."""
        future, buffer = self._under_way.popleft()
        future.result()
        if buffer is not None:
            self._spare.append(buffer)

    def _new_buffer(self) -> AnyArray:
        return np.empty(self._target.chunk_elements, self._target.dtype)


def chunk_elements(num_elements: int, itemsize: int) -> int:
    """How many elements of an array go into a chunk: zarr fills up the last one, so all are alike.

    >>> chunk_elements(10**6, 4), chunk_elements(3 * 10**6, 4)
    (1000000, 1500000)
    """
    num_chunks = -(-num_elements * itemsize // CHUNK_BYTES)
    elements = -(-num_elements // max(1, num_chunks))
    aligned = max(1, ALIGNMENT_BYTES // itemsize)
    return -(-elements // aligned) * aligned


def codec_for(store: Store, itemsize: int = 0) -> Blosc2Codec | None:
    """How a store's chunks are compressed, of elements of a size or of that of the array.

    None where they aren't: a local disk is faster than any compressor; see docs/storage.md.
    """
    return None if store.folder("") is not None else Blosc2Codec(typesize=itemsize)


def _layout(specs: Sequence[ArraySpec]) -> list[StoredArray]:
    ends: dict[str, int] = {}
    index = []
    for spec in specs:
        offset = ends.get(spec.dtype, 0)
        stored = StoredArray(spec.name, spec.role, spec.dtype, spec.shape, spec.dtype, offset)
        ends[spec.dtype] = stored.end
        index.append(stored)
    return index


def _check_names(items: Sequence[ArraySpec] | Sequence[StoredArray]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        if item.name in seen:
            raise ValueError(
                f"two arrays are named {item.name!r}, with roles {seen[item.name]!r} and "
                f"{item.role!r}: names must differ within one call"
            )
        seen[item.name] = item.role


def _check_data(spec: ArraySpec, data: AnyArray) -> None:
    if data.size != prod(spec.shape):
        raise ValueError(
            f"{spec.name!r} should have {prod(spec.shape)} elements (shape {spec.shape}), "
            f"got {data.size} (shape {data.shape})"
        )
    if spec.dtype in _NUMPY_LABELS and data.dtype.name != spec.dtype:
        raise ValueError(f"{spec.name!r} should be {spec.dtype}, got {data.dtype.name}")


def _check_source(source: FlatArray, index: Sequence[StoredArray], where: str) -> None:
    """Refuse what can't be read as its index says, before there is memory for it."""
    for stored in index:
        if stored.dtype in _NUMPY_LABELS and stored.dtype != source.dtype.name:
            raise DamagedData(
                f"{where} holds {source.dtype}, and its index says that {stored.name!r} is "
                f"{stored.dtype}"
            )
    source.check_there([(stored.offset, stored.end) for stored in index if stored.num_elements])


def _runs(members: Iterable[StoredArray], chunk: int) -> Iterator[list[StoredArray]]:
    """Groups to be read at once, so that no chunk is fetched twice."""
    run: list[StoredArray] = []
    for stored in members:
        # A gap inside one chunk is cheaper to read over than the chunk to decode again.
        if (
            run
            and stored.offset > run[-1].end
            and stored.offset // chunk > (run[-1].end - 1) // chunk
        ):
            yield run
            run = []
        run.append(stored)
    if run:
        yield run


def _read_run(source: FlatArray, run: Sequence[StoredArray]) -> dict[str, AnyArray]:
    found = {stored.name: aligned_empty(stored.num_elements, source.dtype) for stored in run}
    source.read_into([(stored.offset, found[stored.name]) for stored in run])
    return {stored.name: found[stored.name].reshape(stored.shape) for stored in run}


def aligned_empty(num_elements: int, dtype: np.dtype[Any]) -> AnyArray:
    """A new array in memory that begins where vector instructions like it, as numpy's own does by chance."""
    num_bytes = num_elements * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[begin : begin + num_bytes].view(dtype)
