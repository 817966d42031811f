"""Notes which objects are written, while they are: their sizes and checksums cost no reading."""

from dagflow_storage.place.location import Store
from dagflow_storage.records.manifest import StoredObject, claimed_crc32c


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

    def write_bytes(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """As `Store.write_bytes`."""
        self._store.write_bytes(path, data, durable=durable)
        self.written(path, len(data), claimed_crc32c(path, data))

    def written(self, path: str, size_bytes: int, crc32c: int) -> None:
        """As `Store.written`."""
        self._written[path] = (size_bytes, crc32c)
