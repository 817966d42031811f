"""Chunks of a zarr array, without the way through zarr.

What is stored is what zarr would read and write: the elements, perhaps compressed, and a CRC32C.
zarr copies each chunk three times, and waits for some before it begins with the next; here a chunk
goes straight between the array and the file or the request, in a thread of whoever calls.
"""

import os
import sys
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.place.backends import Backend

CHECKSUM_BYTES = 4


class Chunks(ABC):
    """The chunks of one array; raises what the place itself raises.

    Parameters
    ----------
    dtype, chunk_elements
        The array's element type, little-endian, and elements a chunk.
    """

    # Operations worth running at once: copies, compression and waiting overlap.
    num_threads: ClassVar[int]

    def __init__(self, dtype: np.dtype[Any], chunk_elements: int) -> None:
        self._dtype = dtype
        self._chunk_elements = chunk_elements
        self._threads = threading.local()

    def write(self, number: int, data: NDArray[Any]) -> tuple[int, int]:
        """Put a chunk, which is there afterwards, complete, or not at all.

        The last one may be short of elements; zarr wants it filled up with zeros. Returns the
        object's size in bytes, and the checksum that it ends in.
        """
        if data.size < self._chunk_elements:
            whole = np.zeros(self._chunk_elements, self._dtype)
            whole[: data.size] = data
            data = whole
        size_bytes, checksum = self._put(number, np.ascontiguousarray(data).view(np.uint8))
        return size_bytes, int.from_bytes(checksum, "little")

    @abstractmethod
    def read(self, number: int, pieces: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """Fill arrays with the chunk's elements, each from a place in the chunk on.

        Parameters
        ----------
        pieces
            In the order of their places; they don't overlap.

        Raises
        ------
        FileNotFoundError
            If there is no such chunk.
        ValueError
            If it is not what was written; the arrays hold anything then.
        """

    def each(self, operation: Callable[[int], None], numbers: Iterable[int]) -> None:
        """Run an operation for each chunk, some at once; the first error is raised."""
        wanted = list(numbers)
        if len(wanted) == 1:
            operation(wanted[0])
            return
        with ThreadPoolExecutor(min(self.num_threads, max(1, len(wanted)))) as pool:
            list(pool.map(operation, wanted))

    @abstractmethod
    def _put(self, number: int, raw: NDArray[np.uint8]) -> tuple[int, bytes]:
        """Store a chunk; return the bytes it takes, and its checksum."""

    def _scratch(self) -> NDArray[Any]:
        """A chunk's memory, one a thread: new memory costs more than what is read into it."""
        scratch: NDArray[Any] | None = getattr(self._threads, "scratch", None)
        if scratch is None:
            scratch = self._threads.scratch = np.empty(self._chunk_elements, self._dtype)
        return scratch


class ChunkFiles(Chunks):
    """Uncompressed chunks in a folder, each synced as it is written.

    Parameters
    ----------
    folder
        The array's.
    read_soon
        Whether what is written should stay in the page cache.
    """

    num_threads = 4

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], chunk_elements: int, *, read_soon: bool = True
    ) -> None:
        super().__init__(dtype, chunk_elements)
        self._folder = folder
        self._read_soon = read_soon

    def _put(self, number: int, raw: NDArray[np.uint8]) -> tuple[int, bytes]:
        target = self._place(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        checksum = _checksum(raw)
        try:
            _write_synced(unfinished, _memory(raw), checksum, self._read_soon)
            os.replace(unfinished, target)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return raw.nbytes + CHECKSUM_BYTES, checksum

    def read(self, number: int, pieces: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """See `Chunks.read`; nothing is copied but from the file."""
        checksum = 0
        with open(self._place(number), "rb", buffering=0) as file:
            size_bytes = self._chunk_elements * self._dtype.itemsize
            _check_size(os.fstat(file.fileno()).st_size, size_bytes)
            for part in self._covering(pieces):
                _read_fully(file, _memory(part))
                checksum = google_crc32c.extend(checksum, part)
            _check(checksum, file.read(CHECKSUM_BYTES))

    def _covering(self, pieces: Sequence[tuple[int, NDArray[Any]]]) -> Iterator[NDArray[np.uint8]]:
        """Memory for a whole chunk: the pieces, and scratch for what lies around them."""
        position = 0
        for first, piece in pieces:
            if first > position:
                yield self._scratch()[position:first].view(np.uint8)
            yield piece.view(np.uint8)
            position = first + piece.size
        if position < self._chunk_elements:
            yield self._scratch()[position:].view(np.uint8)

    def _place(self, number: int) -> Path:
        return self._folder / "c" / str(number)


class ChunkObjects(Chunks):
    """Chunks as objects of any backend, perhaps compressed.

    Parameters
    ----------
    backend
        Gives what reads and writes; asked in the thread that does.
    path
        The array's.
    codec
        None for uncompressed chunks.
    """

    num_threads = 8

    def __init__(
        self,
        backend: Callable[[], Backend],
        path: str,
        dtype: np.dtype[Any],
        chunk_elements: int,
        codec: Blosc2Codec | None,
    ) -> None:
        super().__init__(dtype, chunk_elements)
        self._backend = backend
        self._path = path
        self._codec = codec

    def _put(self, number: int, raw: NDArray[np.uint8]) -> tuple[int, bytes]:
        body = raw.tobytes() if self._codec is None else self._codec.compressed(raw)
        checksum = _checksum(np.frombuffer(body, np.uint8))
        content = body + checksum
        self._backend().write(self._place(number), content)
        return len(content), checksum

    def read(self, number: int, pieces: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """See `Chunks.read`."""
        content = np.frombuffer(self._backend().read(self._place(number)), np.uint8)
        body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:].tobytes()
        _check(google_crc32c.value(cast(bytes, body)), checksum)
        if self._codec is None:
            _check_size(content.nbytes, self._chunk_elements * self._dtype.itemsize)
            whole = body.view(self._dtype)
        else:
            out = pieces[0][1]
            direct = len(pieces) == 1 and out.size == self._chunk_elements
            whole = out if direct else self._scratch()
            self._codec.decompress(body, whole.view(np.uint8))
            if direct:
                return
        for first, piece in pieces:
            piece[:] = whole[first : first + piece.size]

    def _place(self, number: int) -> str:
        return f"{self._path}/c/{number}".lstrip("/")


def _check(checksum: int, expected: bytes) -> None:
    if checksum.to_bytes(CHECKSUM_BYTES, "little") != expected:
        raise ValueError("its checksum is wrong")


def _check_size(found: int, num_bytes: int) -> None:
    if found != num_bytes + CHECKSUM_BYTES:
        raise ValueError(f"it has {found} bytes, not {num_bytes + CHECKSUM_BYTES}")


def _checksum(raw: NDArray[np.uint8]) -> bytes:
    # The array itself: this library takes no memoryview.
    return int(google_crc32c.value(cast(bytes, raw))).to_bytes(CHECKSUM_BYTES, "little")


def _memory(raw: NDArray[np.uint8]) -> memoryview:
    return memoryview(cast(bytes, raw))


def _write_synced(path: Path, raw: memoryview, checksum: bytes, read_soon: bool) -> None:
    with open(path, "xb", buffering=0) as file:
        _write_fully(file, raw)
        _write_fully(file, memoryview(checksum))
        os.fsync(file.fileno())
        if not read_soon and sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_fully(file: FileIO, raw: memoryview) -> None:
    while raw:
        raw = raw[file.write(raw) :]


def _read_fully(file: FileIO, raw: memoryview) -> None:
    while raw:
        num_read = file.readinto(raw)
        if not num_read:
            raise ValueError("it ended while it was read")
        raw = raw[num_read:]
