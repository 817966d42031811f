"""The two kinds of places a store can be: a folder, or objects behind a file system."""

import contextlib
import errno
import os
import shutil
import stat
import threading
import uuid
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

from dagflow_storage.place.retries import RetryPolicy
from dagflow_storage.place.translation import is_lost_race, is_unsupported

_UNFINISHED_SUFFIX = ".unfinished"
_PARALLEL_SYNCS = 4
# fsspec's memory and local file systems check and then put: one creator at a time keeps that
# atomic within a process. Across processes the server's own condition decides.
_one_at_a_time = threading.RLock()


_PATTERN_CHARACTERS = frozenset("*?[")
# Documents are smaller and chunks are smaller: what a request may move before it is late.
LARGEST_READ_BYTES = 16 * 2**20
# Documents of large models: a tokenizer's vocabulary, an operator DAG with its constants.
_LARGEST_FILE_BYTES = 2**31


class NoCondition(Exception):
    """The place can't put on the condition that nothing is there."""


class Backend(ABC):
    """Bytes under slash-separated paths; raises what the place itself raises."""

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def write(self, path: str, data: bytes, *, durable: bool = True) -> None: ...

    @abstractmethod
    def create(self, path: str, data: bytes, *, look_first: bool) -> bool:
        """Put unless something is there, decided by the place itself; or raise `NoCondition`.

        Looking first costs a request, and helps where the place ignores the condition.
        """

    def create_unguarded(self, path: str, data: bytes) -> bool:
        """Look, then put: all there is without a condition. Atomic within this process."""
        with _one_at_a_time:
            if self.exists(path):
                return False
            self.write(path, data)
            return True

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def list(self, path: str) -> list[str]: ...

    @abstractmethod
    def delete(self, path: str) -> None: ...

    @abstractmethod
    def flush(self, path: str) -> None: ...


class FolderBackend(Backend):
    """A folder on this machine.

    A file appears under its name complete and on disk, or not at all: it is written beside
    its place, synced, and moved there in one step.
    """

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def read(self, path: str) -> bytes:
        # What is no file (a pipe, a device) may never end, and opening it never return.
        with open(self._root / path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PermissionError(errno.EPERM, "this is no file", str(self._root / path))
            if status.st_size > _LARGEST_FILE_BYTES:
                raise OSError(
                    errno.EFBIG, f"{status.st_size} bytes are too many to be read at once"
                )
            return file.read()

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        target = self._root / path
        unfinished = _write_beside(target, data)
        try:
            os.replace(unfinished, target)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(target.parent)

    def create(self, path: str, data: bytes, *, look_first: bool) -> bool:
        target = self._root / path
        if target.exists():  # whatever `look_first` says: it costs nothing here
            return False
        unfinished = _write_beside(target, data)
        try:
            os.link(unfinished, target)
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links (FAT, some network drives): the name is still
            # taken by one creator only, but a crash here can leave a short file.
            return _create_exclusively(target, data)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()

    def list(self, path: str) -> list[str]:
        names = os.listdir(self._root / path)
        return [name for name in names if not name.endswith(_UNFINISHED_SUFFIX)]

    def delete(self, path: str) -> None:
        target = self._root / path
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()

    def flush(self, path: str) -> None:
        folders, files = [], []
        for folder, _, names in os.walk(self._root / path):
            folders.append(Path(folder))
            files += [Path(folder, name) for name in names]
        with ThreadPoolExecutor(_PARALLEL_SYNCS) as pool:  # each waits for the disk
            list(pool.map(_sync_file, files))
        for parent in folders:
            _sync_folder(parent)
        # Those above may be new as well.
        above = (self._root / path).parents
        for parent in above[: len(Path(path).parts) + 1]:
            _sync_name_in(parent)


class ObjectBackend(Backend):
    """Objects behind an fsspec file system: one put is atomic, nothing is appended."""

    def __init__(self, filesystem: Any, root: str, policy: RetryPolicy) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._policy = policy

    def read(self, path: str) -> bytes:
        limits = self._limits(LARGEST_READ_BYTES)
        return bytes(self._filesystem.cat_file(self._at(path), **limits))

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        self._filesystem.pipe_file(self._at(path), data, **self._limits(len(data)))

    def create(self, path: str, data: bytes, *, look_first: bool) -> bool:
        limits = self._limits(len(data))
        with _one_at_a_time:
            if look_first and self.exists(path):
                return False
            try:
                self._filesystem.pipe_file(self._at(path), data, mode="create", **limits)
            except Exception as error:
                if is_lost_race(error):
                    return False
                if is_unsupported(error):
                    raise NoCondition(str(error)) from error
                raise
            return True

    def exists(self, path: str) -> bool:
        # Not `exists` of the file system: that answers False when the server is away.
        self._forget_listings()
        try:
            self._filesystem.info(self._at(path), **self._limits(0))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, path: str) -> list[str]:
        self._forget_listings()
        parent = self._at(path)
        found = (str(name).rstrip("/") for name in self._filesystem.ls(parent, detail=False))
        prefix = parent + "/"
        return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

    def delete(self, path: str) -> None:
        self._forget_listings()
        target = self._at(path)
        with contextlib.suppress(FileNotFoundError):
            if not _PATTERN_CHARACTERS.isdisjoint(target):
                # `rm` would take the name for a pattern, and delete what fits.
                for found in self._filesystem.find(target):
                    self._filesystem.rm_file(found)
            else:
                self._filesystem.rm(target, recursive=True)

    def flush(self, path: str) -> None:
        """Nothing to do: a put has been answered only once it is durable."""

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _limits(self, num_bytes: int) -> dict[str, float]:
        # Only a coroutine can be stopped from outside; a listing or a deletion makes many
        # requests, which have limits of their own.
        if not getattr(self._filesystem, "async_impl", False):
            return {}
        return {"timeout": self._policy.deadline_seconds(num_bytes)}

    def _forget_listings(self) -> None:
        # Other processes write here too, and fsspec would answer from what it saw before.
        self._filesystem.invalidate_cache()


class MemoryBackend(ObjectBackend):
    """Objects in this process, one operation at a time.

    fsspec's memory file system looks an object up and then reads it: a listing fails with a
    KeyError when another thread deletes meanwhile.
    """

    def read(self, path: str) -> bytes:
        with _one_at_a_time:
            return super().read(path)

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        with _one_at_a_time:
            super().write(path, data)

    def exists(self, path: str) -> bool:
        with _one_at_a_time:
            return super().exists(path)

    def list(self, path: str) -> list[str]:
        with _one_at_a_time:
            return super().list(path)

    def delete(self, path: str) -> None:
        with _one_at_a_time:
            super().delete(path)


def _write_beside(target: Path, data: bytes) -> Path:
    _make_folder(target.parent)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_UNFINISHED_SUFFIX}")
    try:
        _write_synced(unfinished, data)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that their names survive a power cut like their content."""
    new = list(takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync_name_in(made.parent)


def _sync_name_in(folder: Path) -> None:
    # What isn't there has no names, and who may write to a folder may not always read it.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        _sync_folder(folder)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _create_exclusively(target: Path, data: bytes) -> bool:
    try:
        _write_synced(target, data)
    except FileExistsError:
        return False
    return True


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows has no way to sync a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
