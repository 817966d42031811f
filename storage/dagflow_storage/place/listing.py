"""Everything that lies in a store, with sizes and times, for those who clean up or count."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dagflow_storage.errors import NotFound
from dagflow_storage.place.location import Store, _clean, _is_folder

# How file systems call the time of the last change.
_TIMES = ("LastModified", "mtime", "modified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class FoundObject:
    """An object in a store.

    Attributes
    ----------
    path
        From the store's root.
    size_bytes
        Bytes.
    modified_seconds
        When it was written, by the clock of whoever keeps the store; None if that isn't told. To
        be compared with other times from the same store only: our own clock may be hours off.
    """

    path: str
    size_bytes: int
    modified_seconds: float | None


def walk(store: Store, path: str = "") -> Iterator[FoundObject]:
    """All objects below `path`, unfinished ones included; none if it is absent."""
    if _is_folder(store.url):
        yield from _walk_folder(Path(store.url), _clean(path))
        return
    try:
        found = store._reading(path, lambda: _find(store, _clean(path)))
    except NotFound:
        return
    yield from found


def size_bytes(store: Store, path: str = "") -> int:
    """The bytes of everything below `path`."""
    return sum(found.size_bytes for found in walk(store, path))


def remove_empty_folders(store: Store, path: str) -> None:
    """Remove empty folders below `path`, where there is such a thing as a folder."""
    if not _is_folder(store.url):
        return
    for folder, _, _ in os.walk(Path(store.url, _clean(path)), topdown=False):
        try:
            # Never more than an empty folder: somebody may be writing here just now.
            os.rmdir(folder)
        except OSError:
            continue


def _walk_folder(root: Path, path: str) -> Iterator[FoundObject]:
    for folder, _, names in os.walk(root / path):
        for name in sorted(names):
            file = Path(folder, name)
            try:
                stat = file.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # gone since it was listed
            yield FoundObject(file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime)


def _find(store: Store, path: str) -> list[FoundObject]:
    filesystem, root = store._filesystem(store.url)
    filesystem.invalidate_cache()
    prefix = root.rstrip("/") + "/"
    wanted = f"{path}/" if path else ""
    infos: Mapping[str, Mapping[str, Any]] = filesystem.find(prefix + path, detail=True)
    names = {str(name).removeprefix(prefix): info for name, info in infos.items()}
    return [
        FoundObject(name, int(info.get("size") or 0), _modified_seconds(info))
        for name, info in sorted(names.items())
        if name.startswith(wanted)
    ]


def _modified_seconds(info: Mapping[str, Any]) -> float | None:
    for key in _TIMES:
        found = info.get(key)
        if isinstance(found, str):
            found = datetime.fromisoformat(found)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
    return None
