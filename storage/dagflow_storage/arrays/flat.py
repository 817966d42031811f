"""A one-dimensional zarr array that notices damage, the only kind dagflow stores.

Every chunk carries a checksum, and a chunk that is missing is an error; zarr alone would
answer zeros. zarr writes and reads the metadata, `Chunks` what they describe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from dagflow_storage.arrays.chunks import ChunkFiles, ChunkObjects, Chunks
from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.arrays.metadata import NotOurs, check_metadata
from dagflow_storage.errors import DagflowError, DamagedData, NotFound, StoreUnreachable
from dagflow_storage.place.documents import JSON
from dagflow_storage.place.location import Store
from dagflow_storage.place.translation import reading, writing

AnyArray = NDArray[Any]
_METADATA = "zarr.json"
# Of what is to take more memory than this, chunks must be there before it is taken.
_TRUSTED_BYTES = 2**28


class _MissingChunk(Exception):
    """A chunk that should be there is not."""


class FlatArray:
    """A one-dimensional array in a store.

    Parameters
    ----------
    store, path
        Where it is.
    metadata
        What zarr takes for a store; holds the metadata only.
    array
        The zarr array in it.
    read_soon
        As in `create`.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        metadata: "dict[str, Buffer]",
        array: "zarr.Array[Any]",
        *,
        read_soon: bool = True,
    ) -> None:
        self._store = store
        self._path = path
        self._where = _place(store, path)
        self._metadata = metadata
        self._array = array
        self._chunks = _chunks(store, path, array, read_soon)

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
        *,
        visible: bool = True,
        read_soon: bool = True,
    ) -> "FlatArray":
        """A new array; `path` must be unused.

        All-zero chunks are written too, so that a missing one is always damage. Without a `codec`
        chunks aren't compressed. Unless it is to be `visible`, nobody finds it before
        `put_metadata`. What isn't `read_soon` leaves the page cache once it is on the disk, and
        its pages to the next: fresh ones cost a system several times as much as the copy itself.
        """
        compressors = [Crc32cCodec()] if codec is None else [codec, Crc32cCodec()]
        chunk = max(1, min(chunk_elements, num_elements))
        metadata: dict[str, Buffer] = {}
        # In memory: zarr would ask the store what is there before it writes.
        array = zarr.create_array(
            MemoryStore(metadata),
            shape=(num_elements,),
            chunks=(chunk,),
            dtype=np.dtype(dtype).newbyteorder("<"),
            compressors=compressors,
            filters=None,
            fill_value=0,
            attributes=dict(attributes or {}),
        )
        created = cls(store, path, metadata, array, read_soon=read_soon)
        if visible:
            created.put_metadata()
        return created

    @classmethod
    def open(cls, store: Store, path: str) -> "FlatArray":
        """An array that was created before.

        Raises
        ------
        NotFound
            If there is none, or one that isn't dagflow's.
        DamagedData
            If its metadata can't be read.
        """
        where = _place(store, path)
        data = store.read_bytes(f"{path}/{_METADATA}")
        try:
            check_metadata(data)
            buffer = default_buffer_prototype().buffer.from_bytes(data)
            metadata = {_METADATA: buffer}
            array = zarr.open_array(MemoryStore(metadata), mode="r+", zarr_format=3)
            return cls(store, path, metadata, array)
        except DagflowError:
            raise
        except NotOurs as error:
            raise NotFound(f"{where} holds an array that dagflow didn't write: {error}") from error
        except Exception as error:  # zarr has no error of its own for bad metadata
            raise DamagedData(f"the metadata of {where} can't be read: {error}") from error

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
        self._array.update_attributes(dict(attributes))
        self.put_metadata()

    def resize(self, num_elements: int) -> None:
        """Make the array longer, or leave off what was never written."""
        self._array.resize((num_elements,))
        self.put_metadata()

    def write(self, start: int, data: AnyArray) -> None:
        """Put `data` at `start`, which must be a chunk's first element.

        Up to a chunk's end or the array's: a partly written chunk would be read, merged and
        written again.
        """
        chunk = self.chunk_elements
        assert start % chunk == 0, "writes begin at a chunk"
        numbers = range(start // chunk, -(-(start + data.size) // chunk))

        def write(number: int) -> None:
            begin = number * chunk - start
            self.write_chunk(number, data[begin : begin + chunk])

        self._chunks.each(write, numbers)

    def write_chunk(self, number: int, data: AnyArray) -> None:
        """Put one chunk; the last one may be short. Safe to call from several threads."""

        def attempt() -> None:
            with writing(f"{self._where}/c/{number}", self._store.hide):
                size_bytes, checksum = self._chunks.write(number, data)
            self._store.written(f"{self._path}/c/{number}", size_bytes, checksum)

        self._store.retries.run(attempt)

    def read(self, start: int, stop: int) -> AnyArray:
        """Elements `start` to `stop`, a new array.

        Raises
        ------
        DamagedData
            Naming the chunk, if two reads found it damaged or missing.
        StoreUnreachable
            If the store did not answer, or reads went on being garbled on the way.
        """
        self.check_there([(start, stop)])
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
        self._check_range(start, stop)
        self._store.retries.run(lambda: self._read_checked(pieces, start, stop))

    def check_there(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Return if elements can be there, for who is about to take memory for them.

        Metadata of two hundred bytes may say that there is a terabyte. What a store has no chunks of
        isn't there; small ranges are told when they are read, which saves a request.

        Parameters
        ----------
        ranges
            First element, and the one after the last.

        Raises
        ------
        DamagedData
        """
        for start, stop in ranges:
            self._check_range(start, stop)
        num_elements = sum(stop - start for start, stop in ranges)
        if num_elements * self.dtype.itemsize <= _TRUSTED_BYTES:
            return
        there = set(self._store.list(f"{self._path}/c"))
        chunk = self.chunk_elements
        for start, stop in ranges:
            # No more looks than there are chunks: the first one that isn't there ends it.
            for number in range(start // chunk, -(-stop // chunk)):
                if str(number) not in there:
                    place = _place(self._store, f"{self._path}/c/{number}".lstrip("/"))
                    raise DamagedData(f"chunk {place} is damaged: it is missing")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise DamagedData(
                f"{self._where} has {len(self)} elements, {start} to {stop} were to be read"
            )

    def _read_checked(self, pieces: Sequence[tuple[int, AnyArray]], start: int, stop: int) -> None:
        try:
            self._read(pieces)
        except DagflowError:
            raise
        except Exception as error:  # codecs raise ValueError, RuntimeError and more
            raise self._diagnosis(start, stop) from error

    def _read(self, pieces: Sequence[tuple[int, AnyArray]]) -> None:
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
                with reading(f"{self._where}/c/{number}", self._store.hide):
                    self._chunks.read(number, by_chunk[number])
            except NotFound as error:
                raise _MissingChunk("it is missing") from error

        self._chunks.each(lambda number: self._store.retries.run(lambda: read(number)), by_chunk)

    def put_metadata(self, *, durable: bool = True) -> None:
        """Write what zarr and `open` find the array by."""
        data = self._metadata[_METADATA].to_bytes()
        self._store.write_bytes(f"{self._path}/{_METADATA}", data, durable=durable)

    def _diagnosis(self, start: int, stop: int) -> DagflowError:
        chunk = self.chunk_elements
        for number in range(start // chunk, -(-stop // chunk)):
            try:
                begin, end = number * chunk, min((number + 1) * chunk, len(self))
                self._read([(begin, np.empty(end - begin, self.dtype))])
            except DagflowError as error:
                return error
            except Exception as error:
                place = _place(self._store, f"{self._path}/c/{number}".lstrip("/"))
                return DamagedData(f"chunk {place} is damaged, read twice: {error}")
        return StoreUnreachable(f"{self._where} arrived damaged, and whole at a second read")


def _place(store: Store, path: str) -> str:
    return f"{path} in {store!r}" if path else repr(store)


def _chunks(store: Store, path: str, array: "zarr.Array[Any]", read_soon: bool) -> Chunks:
    """What reads and writes an array's chunks, if it is one of ours."""
    dtype, codecs = np.dtype(array.dtype), list(getattr(array.metadata, "codecs", ()))
    plain = [BytesCodec(endian="little" if dtype.itemsize > 1 else None), Crc32cCodec()]
    codec = next((item for item in codecs if isinstance(item, Blosc2Codec)), None)
    expected = plain if codec is None else [plain[0], codec, plain[1]]
    if array.ndim != 1 or codecs != expected or dtype != dtype.newbyteorder("<"):
        raise NotFound(
            f"{_place(store, path)} holds an array that dagflow didn't write, of shape "
            f"{array.shape}, type {dtype} and with the codecs {codecs}"
        )
    folder = store.folder(path)
    if folder is not None and codec is None:
        return ChunkFiles(folder, dtype, array.chunks[0], read_soon=read_soon)
    return ChunkObjects(store.backend, path, dtype, array.chunks[0], codec)
