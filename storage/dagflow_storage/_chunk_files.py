"""Chunks of an uncompressed array in a folder, without the way through zarr.

The files are those that zarr would read and write: the elements, and their CRC32C. A disk is faster
than any compressor, and zarr copies each chunk three times; past it, a chunk goes straight between
the file and the array.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 4
# Copies between files and memory, and waits for the disk, overlap.
NUM_THREADS = 4


class ChunkFiles:
    """The chunks of one array.

    Parameters
    ----------
    folder
        The array's.
    dtype, chunk_elements
        Its element type, little-endian, and elements a chunk.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], chunk_elements: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._chunk_elements = chunk_elements
        self._threads = threading.local()

    def place(self, number: int) -> Path:
        """The file of a chunk."""
        return self._folder / "c" / str(number)

    def write(self, number: int, data: NDArray[Any]) -> tuple[int, int]:
        """Put a chunk, which is on disk afterwards, complete, or not there at all.

        The last one may be short of elements; zarr wants it filled up with zeros. Returns the
        file's size in bytes, and the checksum that it ends in.
        """
        if data.size < self._chunk_elements:
            whole = np.zeros(self._chunk_elements, self._dtype)
            whole[: data.size] = data
            data = whole
        data = np.ascontiguousarray(data)
        target = self.place(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        checksum = _checksum(data)
        try:
            _write_synced(unfinished, _bytes_of(data), checksum)
            os.replace(unfinished, target)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return data.nbytes + CHECKSUM_BYTES, int.from_bytes(checksum, "little")

    def read(self, number: int, pieces: Sequence[tuple[int, NDArray[Any]]]) -> None:
        """Fill arrays with the chunk's elements, each from a place in the chunk on.

        Raises
        ------
        FileNotFoundError
            If there is no such chunk.
        ValueError
            If it is not what was written.
        """
        out = pieces[0][1]
        direct = len(pieces) == 1 and out.size == self._chunk_elements
        whole = out if direct else self._scratch()
        raw = _bytes_of(whole)
        with open(self.place(number), "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != len(raw) + CHECKSUM_BYTES:
                raise ValueError(f"it has {found} bytes, not {len(raw) + CHECKSUM_BYTES}")
            _read_fully(file, raw)
            checksum = file.read(CHECKSUM_BYTES)
        if checksum != _checksum(whole):
            raise ValueError("its checksum is wrong")
        if not direct:
            for first, piece in pieces:
                piece[:] = whole[first : first + piece.size]

    def _scratch(self) -> NDArray[Any]:
        """A chunk's memory, one a thread: new memory costs more than what is read into it."""
        scratch: NDArray[Any] | None = getattr(self._threads, "scratch", None)
        if scratch is None:
            scratch = self._threads.scratch = np.empty(self._chunk_elements, self._dtype)
        return scratch


def each(operation: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Run an operation for each chunk, some at once; the first error is raised."""
    wanted = list(numbers)
    if len(wanted) == 1:
        operation(wanted[0])
        return
    with ThreadPoolExecutor(min(NUM_THREADS, max(1, len(wanted)))) as pool:
        list(pool.map(operation, wanted))


def _checksum(elements: NDArray[Any]) -> bytes:
    # The array itself: this library takes no memoryview.
    raw = cast(bytes, elements.view(np.uint8))
    return int(google_crc32c.value(raw)).to_bytes(CHECKSUM_BYTES, "little")


def _bytes_of(elements: NDArray[Any]) -> memoryview:
    return memoryview(cast(bytes, elements.view(np.uint8)))


def _write_synced(path: Path, raw: memoryview, checksum: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        _write_fully(file, raw)
        _write_fully(file, memoryview(checksum))
        os.fsync(file.fileno())


def _write_fully(file: FileIO, raw: memoryview) -> None:
    while raw:
        raw = raw[file.write(raw) :]


def _read_fully(file: FileIO, raw: memoryview) -> None:
    while raw:
        num_read = file.readinto(raw)
        if not num_read:
            raise ValueError("it ended while it was read")
        raw = raw[num_read:]
