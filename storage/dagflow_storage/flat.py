"""A one-dimensional zarr array that notices damage, the only kind dagflow stores.

Every chunk carries a checksum, and a chunk that is missing is an error; zarr alone would
answer zeros.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from dagflow_storage._chunk_files import ChunkFiles, each
from dagflow_storage._translation import reading, writing
from dagflow_storage.codec import Blosc2Codec
from dagflow_storage.documents import JSON
from dagflow_storage.errors import DagflowError, DamagedData, NotFound, StoreUnreachable
from dagflow_storage.location import Store

AnyArray = NDArray[Any]


class _MissingChunk(Exception):
    """A chunk that should be there is not."""


class _NoticingStore(WrapperStore[ZarrStore]):
    """Raises for a missing chunk where zarr would go on with the fill value."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        if found is None and not key.endswith("zarr.json"):
            raise _MissingChunk("it is missing")
        return found


class FlatArray:
    """A one-dimensional array in a store.

    Parameters
    ----------
    store, path
        Where it is.
    array
        The zarr array that reads and writes it.
    """

    def __init__(self, store: Store, path: str, array: "zarr.Array[Any]") -> None:
        self._store = store
        self._path = path
        self._where = _place(store, path)
        self._array = array
        self._files = _chunk_files(store, path, array)

    @classmethod
    def create(
        cls,
        store: Store,
        path: str,
        dtype: DTypeLike,
        num_elements: int,
        chunk_elements: int,
        attributes: Mapping[str, JSON] | None = None,
        codec: Blosc2Codec | None = None,
    ) -> "FlatArray":
        """A new array; `path` must be unused.

        All-zero chunks are written too, so that a missing one is always damage. Without a `codec`
        chunks aren't compressed.
        """
        compressors = [Crc32cCodec()] if codec is None else [codec, Crc32cCodec()]
        chunk = max(1, min(chunk_elements, num_elements))
        with writing(_place(store, path)):
            array = zarr.create_array(
                store.zarr_store(path),
                shape=(num_elements,),
                chunks=(chunk,),
                dtype=np.dtype(dtype),
                compressors=compressors,
                filters=None,
                fill_value=0,
                attributes=dict(attributes or {}),
                config={"write_empty_chunks": True},
            )
        return cls(store, path, array)

    @classmethod
    def open(cls, store: Store, path: str) -> "FlatArray":
        """An array that was created before.

        Raises
        ------
        NotFound
            If there is none.
        DamagedData
            If its metadata can't be read.
        """
        where = _place(store, path)
        try:
            with reading(where):
                source = _NoticingStore(store.zarr_store(path, read_only=True))
                array = zarr.open_array(source, mode="r", zarr_format=3)
        except DagflowError:
            raise
        except Exception as error:  # zarr has no error of its own for bad metadata
            raise DamagedData(f"the metadata of {where} can't be read: {error}") from error
        if array.ndim != 1:
            raise NotFound(f"{where} holds an array of shape {array.shape}, not a flat one")
        return cls(store, path, array)

    def __len__(self) -> int:
        return self._array.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return np.dtype(self._array.dtype)

    @property
    def chunk_elements(self) -> int:
        """Elements a chunk; the last one may be shorter."""
        return self._array.chunks[0]

    @property
    def attributes(self) -> dict[str, Any]:
        """The array's attributes."""
        return dict(self._array.attrs.asdict())

    def update_attributes(self, attributes: Mapping[str, JSON]) -> None:
        """Add to the attributes, in one write of the metadata."""
        with writing(self._where):
            self._array.update_attributes(dict(attributes))

    def resize(self, num_elements: int) -> None:
        """Make the array longer or shorter."""
        with writing(self._where):
            self._array.resize((num_elements,))

    def write(self, start: int, data: AnyArray) -> None:
        """Put `data` at `start`, which must be a chunk's first element.

        Up to a chunk's end or the array's: a partly written chunk would be read, merged and
        written again.
        """
        self.begin_write(start, data, None)

    def begin_write(
        self, start: int, data: AnyArray, pool: Executor | None
    ) -> "list[Future[None]]":
        """Begin to `write`, and return what there is to wait for; `data` mustn't change until then.

        Only chunks that are files are written behind the caller, by the threads of `pool`.
        """
        assert start % self.chunk_elements == 0, "writes begin at a chunk"
        if self._files is not None and data.size:
            return self._write_files(self._files, start, data, pool)
        if data.size:
            with writing(self._where):
                self._array[start : start + data.size] = data
        return []

    def read(self, start: int, stop: int) -> AnyArray:
        """Elements `start` to `stop`, a new array.

        Raises
        ------
        DamagedData
            Naming the chunk, if two reads found it damaged or missing.
        StoreUnreachable
            If the store did not answer, or reads went on being garbled on the way.
        """
        found = np.empty(stop - start, self.dtype)
        self.read_into([(start, found)])
        return found

    def read_into(self, pieces: Sequence[tuple[int, AnyArray]]) -> None:
        """Fill flat arrays, each with the elements from its start on; chunks are read once.

        Parameters
        ----------
        pieces
            In the order of their starts; they don't overlap.

        Raises
        ------
        DamagedData, StoreUnreachable
            As `read` does.
        """
        pieces = [(start, out) for start, out in pieces if out.size]
        if not pieces:
            return
        start, stop = pieces[0][0], max(first + out.size for first, out in pieces)
        if stop > len(self):
            raise DamagedData(
                f"{self._where} has {len(self)} elements, {start} to {stop} were to be read"
            )
        self._store.retries.run(lambda: self._read_checked(pieces, start, stop))

    def _read_checked(self, pieces: Sequence[tuple[int, AnyArray]], start: int, stop: int) -> None:
        try:
            self._read(pieces, start, stop)
        except DagflowError:
            raise
        except Exception as error:  # codecs raise ValueError, RuntimeError and more
            raise self._diagnosis(start, stop) from error

    def _write_files(
        self, files: ChunkFiles, start: int, data: AnyArray, pool: Executor | None
    ) -> "list[Future[None]]":
        chunk = self.chunk_elements

        def write(number: int) -> None:
            begin = number * chunk - start
            with writing(f"{self._where}/c/{number}"):
                size_bytes, checksum = files.write(number, data[begin : begin + chunk])
            self._store.written(f"{self._path}/c/{number}", size_bytes, checksum)

        def try_to_write(number: int) -> None:
            self._store.retries.run(lambda: write(number))

        numbers = range(start // chunk, -(-(start + data.size) // chunk))
        if pool is not None:
            return [pool.submit(try_to_write, number) for number in numbers]
        each(try_to_write, numbers)
        return []

    def _read(self, pieces: Sequence[tuple[int, AnyArray]], start: int, stop: int) -> None:
        if self._files is not None:
            self._read_files(self._files, pieces)
            return
        with reading(self._where):
            found = np.asarray(self._array[start:stop])
        for first, out in pieces:
            out[:] = found[first - start : first - start + out.size]

    def _read_files(self, files: ChunkFiles, pieces: Sequence[tuple[int, AnyArray]]) -> None:
        chunk = self.chunk_elements
        by_chunk: dict[int, list[tuple[int, AnyArray]]] = {}
        for first, out in pieces:
            for number in range(first // chunk, -(-(first + out.size) // chunk)):
                begin = max(first, number * chunk)
                end = min(first + out.size, (number + 1) * chunk)
                part = (begin - number * chunk, out[begin - first : end - first])
                by_chunk.setdefault(number, []).append(part)

        def read(number: int) -> None:
            try:
                with reading(f"{self._where}/c/{number}"):
                    files.read(number, by_chunk[number])
            except NotFound as error:
                raise _MissingChunk("it is missing") from error

        each(lambda number: self._store.retries.run(lambda: read(number)), by_chunk)

    def _diagnosis(self, start: int, stop: int) -> DagflowError:
        chunk = self.chunk_elements
        for number in range(start // chunk, -(-stop // chunk)):
            try:
                begin, end = number * chunk, min((number + 1) * chunk, len(self))
                self._read([(begin, np.empty(end - begin, self.dtype))], begin, end)
            except DagflowError as error:
                return error
            except Exception as error:
                place = _place(self._store, f"{self._path}/c/{number}".lstrip("/"))
                return DamagedData(f"chunk {place} is damaged, read twice: {error}")
        return StoreUnreachable(f"{self._where} arrived damaged, and whole at a second read")


def _place(store: Store, path: str) -> str:
    return f"{path} in {store!r}" if path else repr(store)


def _chunk_files(store: Store, path: str, array: "zarr.Array[Any]") -> ChunkFiles | None:
    """A shorter way to the chunks, where they are nothing but elements and a checksum."""
    folder = store.folder(path)
    dtype = np.dtype(array.dtype)
    if folder is None or array.ndim != 1:
        return None
    plain = (BytesCodec(endian="little" if dtype.itemsize > 1 else None), Crc32cCodec())
    is_plain = tuple(
        getattr(array.metadata, "codecs", ())
    ) == plain and dtype == dtype.newbyteorder("<")
    return ChunkFiles(folder, dtype, array.chunks[0]) if is_plain else None
