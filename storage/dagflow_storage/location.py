"""Where a run's data is: the one module that opens file systems."""

import json
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.asyn_wrapper import (  # type: ignore[import-untyped]
    AsyncFileSystemWrapper,
)
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from zarr.abc.store import Store as ZarrStore
from zarr.storage import FsspecStore, LocalStore

from dagflow_storage._backends import Backend, FolderBackend, ObjectBackend
from dagflow_storage._translation import reading, writing
from dagflow_storage.errors import DagflowError, NotFound, PermanentError, StoreNotWritable

_FOLDER_PROTOCOLS = ("file", "local")
_MEMORY_PROTOCOL = "memory"


class Store:
    """A place for a run's files: a folder, or a prefix on any fsspec file system.

    Cheap to make, to pickle and to send: it holds a URL and options, and opens nothing before
    it is used. Safe to use from several threads.

    Parameters
    ----------
    url
        A path, ``file://``, ``memory://``, ``s3://bucket/prefix`` or anything else that fsspec
        knows. A relative path is made absolute here, once.
    options
        Passed to the file system (endpoint, credentials).

    Raises
    ------
    ValueError
        If fsspec doesn't know the URL's protocol.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None
    ) -> None:
        self._url = _normalised(os.fspath(url))
        self._options = dict(options or {})

    @property
    def url(self) -> str:
        """The URL; for a folder its absolute path."""
        return self._url

    @property
    def is_process_local(self) -> bool:
        """Whether only this process sees the data (``memory://``)."""
        return _protocol(self._url) == _MEMORY_PROTOCOL

    def child(self, *parts: str) -> "Store":
        """The store below this one, with the same options."""
        return Store(self._join("/".join(_clean(part) for part in parts)), self._options)

    def read_bytes(self, path: str) -> bytes:
        """The whole content of `path`.

        Raises
        ------
        NotFound
            If there is none.
        """
        with reading(self._shown(path)):
            return self._backend().read(_clean(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Put `data` at `path`: afterwards it holds all of it, or what it held before."""
        with writing(self._shown(path)):
            self._backend().write(_required(path), data)

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Put `data` at `path` unless something is there; of several creators one wins.

        Returns
        -------
        bool
            Whether this call created it. False can also mean that this call's own success got
            lost on the way: who must know puts a random number into `data` and reads back.
        """
        with writing(self._shown(path)):
            return self._backend().create(_required(path), data)

    def exists(self, path: str) -> bool:
        """Whether there is a file, or something below it, at `path`."""
        with reading(self._shown(path)):
            return self._backend().exists(_clean(path))

    def list(self, path: str = "") -> list[str]:
        """The names of the direct children of `path`, sorted; none when it is absent."""
        try:
            with reading(self._shown(path)):
                return sorted(self._backend().list(_clean(path)))
        except NotFound:
            return []

    def delete(self, path: str) -> None:
        """Remove `path` and all below it; absent is fine."""
        with writing(self._shown(path)):
            self._backend().delete(_required(path))

    def flush(self, path: str) -> None:
        """Return once everything below `path` would survive a power cut."""
        with writing(self._shown(path)):
            self._backend().flush(_clean(path))

    def zarr_store(self, path: str, *, read_only: bool = False) -> ZarrStore:
        """What zarr reads and writes `path` through."""
        url = self._join(_clean(path))
        if _is_folder(self._url):
            return LocalStore(url, read_only=read_only)
        with reading(self._shown(path)):
            filesystem, root = self._filesystem(url)
        if filesystem.async_impl:
            return FsspecStore.from_url(url, storage_options=self._options, read_only=read_only)
        wrapped = AsyncFileSystemWrapper(filesystem, asynchronous=True)
        return FsspecStore(wrapped, path=root, read_only=read_only)

    def probe(self) -> None:
        """Write, read back and delete a small object, to fail now and not in an hour.

        Raises
        ------
        StoreNotWritable
            With what was tried and what the operating system said. Not retried.
        StoreUnreachable
            If the store did not answer.
        """
        path = f".dagflow-probe-{uuid.uuid4().hex}"
        data = path.encode()
        try:
            self.write_bytes(path, data)
            found = self.read_bytes(path)
            self.delete(path)
        except NotFound as error:
            found = str(error).encode()
        except DagflowError as error:
            message = f"tried to put, get and delete {len(data)} bytes in {self!r}: {error}"
            raise type(error)(message) from error
        if found != data:
            raise StoreNotWritable(
                f"{self!r} does not keep what it is given: put {data!r}, got back {found!r}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"Store({_without_secrets(self._url)!r})"

    def _identity(self) -> tuple[str, str]:
        return self._url, json.dumps(self._options, sort_keys=True, default=repr)

    def _join(self, path: str) -> str:
        if not path:
            return self._url
        return f"{self._url}{path}" if self._url.endswith("/") else f"{self._url}/{path}"

    def _shown(self, path: str) -> str:
        return _without_secrets(self._join(path))

    def _backend(self) -> Backend:
        # Not kept: fsspec caches its file systems by thread and process itself, and a file
        # system carried over a fork would hang.
        if _is_folder(self._url):
            return FolderBackend(self._url)
        return ObjectBackend(*self._filesystem(self._url))

    def _filesystem(self, url: str) -> tuple[Any, str]:
        try:
            filesystem, root = fsspec.core.url_to_fs(url, **self._options)
        except ImportError as error:
            raise PermanentError(f"{self!r} needs a package: {error}") from error
        return filesystem, root


def _normalised(url: str) -> str:
    if _is_folder(url):
        if re.match(r"[a-z][a-z0-9]+:/+[^/]", url) and "://" not in url:
            raise ValueError(f"{url!r} is neither a path nor a URL: a URL has '://'")
        return str(LocalFileSystem._strip_protocol(url))
    protocol = _protocol(url)
    if protocol not in fsspec.available_protocols():
        raise ValueError(f"fsspec knows no protocol {protocol!r} (in {_without_secrets(url)})")
    root = f"{protocol}://"
    return url if url == root else url.rstrip("/")


def _is_folder(url: str) -> bool:
    return _protocol(url) in _FOLDER_PROTOCOLS


def _protocol(url: str) -> str:
    first = url.partition("::")[0]
    if "::" in url and "://" not in first:
        return first
    return first.partition("://")[0] if "://" in first else "file"


def _clean(path: str) -> str:
    """`path` relative to the store, without a way out of it."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"a path in a store can't contain '..': {path!r}")
    return "/".join(parts)


def _required(path: str) -> str:
    cleaned = _clean(path)
    if not cleaned:
        raise ValueError("a path inside the store is needed, not the store itself")
    return cleaned


def _without_secrets(url: str) -> str:
    url = re.sub(r"://[^/@]*@", "://***@", url)
    return re.sub(r"\?.*", "?***", url)
