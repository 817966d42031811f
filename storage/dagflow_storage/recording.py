"""Notes which objects are written, while they are: their sizes and checksums cost no reading."""

from collections.abc import Iterable
from typing import Self

from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer
from zarr.storage import WrapperStore

from dagflow_storage.location import Store
from dagflow_storage.manifest import StoredObject, claimed_crc32c


class RecordingStore(Store):
    """A store that remembers what was put through it.

    Parameters
    ----------
    store
        Where everything goes.
    """

    def __init__(self, store: Store) -> None:
        vars(self).update(vars(store))
        self._store = store
        self._written: dict[str, tuple[int, int]] = {}

    def written_below(self, path: str) -> tuple[StoredObject, ...]:
        """What was put below `path`, by path relative to it; an object put twice as it is now."""
        prefix = f"{path}/"
        return tuple(
            StoredObject(found.removeprefix(prefix), *facts)
            for found, facts in sorted(self._written.items())
            if found.startswith(prefix)
        )

    def write_bytes(self, path: str, data: bytes) -> None:
        """As `Store.write_bytes`."""
        self._store.write_bytes(path, data)
        self._note(path, data)

    def zarr_store(self, path: str, *, read_only: bool = False) -> ZarrStore:
        """As `Store.zarr_store`."""
        return _RecordingZarrStore(self._store.zarr_store(path, read_only=read_only), self, path)

    def written(self, path: str, size_bytes: int, crc32c: int) -> None:
        """As `Store.written`."""
        self._written[path] = (size_bytes, crc32c)

    def _note(self, path: str, data: bytes) -> None:
        self._written[path] = (len(data), claimed_crc32c(path, data))

    def _note_buffer(self, path: str, value: Buffer) -> None:
        # No copy of a chunk: its checksum is in its last bytes.
        end = value if path.endswith("zarr.json") else value[-4:]
        self._written[path] = (len(value), claimed_crc32c(path, end.to_bytes()))


class _RecordingZarrStore(WrapperStore[ZarrStore]):
    def __init__(self, store: ZarrStore, recorder: RecordingStore, path: str) -> None:
        super().__init__(store)
        self._recorder = recorder
        self._path = path

    def _with_store(self, store: ZarrStore) -> Self:
        return type(self)(store, self._recorder, self._path)

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, value)
        self._recorder._note_buffer(f"{self._path}/{key}", value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._store.set_if_not_exists(key, value)
        self._recorder._note_buffer(f"{self._path}/{key}", value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)
