"""Where a run's data is: the one module that opens file systems."""

import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from dagflow_storage.errors import (
    DagflowError,
    NotFound,
    PermanentError,
    StoreNotWritable,
    StoreUnreachable,
)
from dagflow_storage.place.backends import (
    Backend,
    FolderBackend,
    MemoryBackend,
    NoCondition,
    ObjectBackend,
)
from dagflow_storage.place.redaction import hidden, keep_requests_out_of_logs, shown_url
from dagflow_storage.place.retries import Clock, Retries, RetryPolicy
from dagflow_storage.place.translation import reading, writing

T = TypeVar("T")
_FOLDER_PROTOCOLS = ("file", "local")
_MEMORY_PROTOCOL = "memory"
_S3_PROTOCOLS = ("s3", "s3a")
# A probe has somebody waiting for it, who may have mistyped the address.
_LONGEST_PROBE_SECONDS = 10.0
# Without a condition, creators that looked at the same time have put by then.
_SETTLE_SECONDS = 1.0


class ConditionMissing(UserWarning):
    """The store can't put on the condition that nothing is there."""


@dataclass(frozen=True)
class ProbeReport:
    """What `Store.probe` found out.

    Attributes
    ----------
    conditional_create
        Whether the store itself decides between several creators of one object. Where it
        doesn't, `Store.create_bytes` looks before it puts, and reads back after a second: two
        creators that are further apart in time than that are told apart, and two that are
        closer nearly always.
    """

    conditional_create: bool


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
    retry
        What fails for a transient reason is tried again according to this, everywhere: each
        method, and each chunk that zarr reads or writes. Permanent errors are never retried.
    clock
        What measures and waits; for tests.

    Raises
    ------
    ValueError
        If fsspec doesn't know the URL's protocol.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        *,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._url = _normalised(os.fspath(url))
        self._options = dict(options or {})
        self._retries = Retries(retry or RetryPolicy(), clock or Clock())
        # Unknown until probed; where unknown, `create_bytes` looks first.
        self._has_condition: bool | None = True if _is_folder(self._url) else None

    @property
    def url(self) -> str:
        """The URL as it is opened, secrets included; for a folder its absolute path."""
        return self._url

    @cached_property
    def shown(self) -> str:
        """The URL for people to read: without the names and secrets that may be in it."""
        return shown_url(self._url)

    def hide(self, text: str) -> str:
        """A text about this store, without the names and secrets that it was opened with."""
        configured = fsspec.config.conf.get(_protocol(self._url), {})
        return hidden(text, self._url, {**configured, **self._options})

    @property
    def is_process_local(self) -> bool:
        """Whether only this process sees the data (``memory://``)."""
        return _protocol(self._url) == _MEMORY_PROTOCOL

    @property
    def options(self) -> dict[str, Any]:
        """What the file system is given."""
        return dict(self._options)

    def folder(self, path: str) -> Path | None:
        """Where `path` is on this machine, if the store is a folder."""
        return Path(self._join(_clean(path))) if _is_folder(self._url) else None

    @property
    def retries(self) -> Retries:
        """What runs an operation on this store again while it doesn't answer."""
        return self._retries

    def child(self, *parts: str) -> "Store":
        """The store below this one, with the same options, retries and probe's result."""
        url = self._join("/".join(_clean(part) for part in parts))
        return self._like(url, self._retries)

    def read_bytes(self, path: str) -> bytes:
        """The whole content of `path`.

        Raises
        ------
        NotFound
            If there is none.
        """
        return self._reading(path, lambda: self.backend().read(_clean(path)))

    def write_bytes(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Put `data` at `path`: afterwards it holds all of it, or what it held before.

        What needn't be `durable` a power cut may take, whole; that saves a folder a sync.
        """
        target = _required(path)
        self._writing(path, lambda: self.backend().write(target, data, durable=durable))

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Put `data` at `path` unless something is there; of several creators one wins.

        Creators that must know who won put a random number into `data`: if a put's answer got
        lost, what is found there decides, and two creators of the same bytes have both won.

        Returns
        -------
        bool
            Whether this call created it.
        """
        target = _required(path)
        return self._created_once(path, data, lambda: self._create(target, data))

    def exists(self, path: str) -> bool:
        """Whether there is a file, or something below it, at `path`."""
        return self._reading(path, lambda: self.backend().exists(_clean(path)))

    def list(self, path: str = "") -> list[str]:
        """The names of the direct children of `path`, sorted; none when it is absent."""
        try:
            return self._reading(path, lambda: sorted(self.backend().list(_clean(path))))
        except NotFound:
            return []

    def delete(self, path: str) -> None:
        """Remove `path` and all below it; absent is fine."""
        target = _required(path)
        self._writing(path, lambda: self.backend().delete(target))

    def flush(self, path: str) -> None:
        """Return once everything below `path` would survive a power cut."""
        self._writing(path, lambda: self.backend().flush(_clean(path)))

    def backend(self) -> Backend:
        """What reads and writes, without retries and with errors of its own; not to be kept."""
        # fsspec caches its file systems by thread and process itself, and a file system carried
        # over a fork would hang.
        if _is_folder(self._url):
            return FolderBackend(self._url)
        kind = MemoryBackend if self.is_process_local else ObjectBackend
        return kind(*self._filesystem(self._url), self._retries.policy)

    def written(self, path: str, size_bytes: int, crc32c: int) -> None:
        """Hear of an object that was put past this store's own methods."""

    def probe(self) -> ProbeReport:
        """Write, read back and delete a small object, to fail now and not in an hour.

        What it finds out, this object, its children and copies keep in mind.

        Warns
        -----
        ConditionMissing
            If the store can't put on the condition that nothing is there.

        Raises
        ------
        StoreNotWritable
            With what was tried and what the operating system said. Not retried.
        StoreUnreachable
            If the store did not answer.
        """
        path = f".dagflow-probe-{uuid.uuid4().hex}"
        policy = self._retries.policy
        total_seconds = min(policy.total_seconds, _LONGEST_PROBE_SECONDS)
        retries = replace(self._retries, policy=replace(policy, total_seconds=total_seconds))
        hasty = self._like(self._url, retries)
        try:
            report = hasty._probed(path)
            hasty.delete(path)
        except DagflowError as error:
            message = f"tried to put, get and delete {len(path)} bytes in {self!r}: {error}"
            raise type(error)(message) from error
        self._has_condition = report.conditional_create
        if not report.conditional_create:
            warnings.warn(
                f"{self!r} can't put an object on the condition that there is none yet, so two "
                "runs that start in it within the same second may not notice each other",
                ConditionMissing,
                stacklevel=2,
            )
        return report

    def _probed(self, path: str) -> ProbeReport:
        first, second = f"{path}-first".encode(), f"{path}-second".encode()

        def create(data: bytes) -> bool:
            return self.backend().create(path, data, look_first=False)

        try:
            created = self._created_once(path, first, lambda: create(first))
        except NoCondition:
            self.write_bytes(path, first)
            return self._kept(path, first, ProbeReport(conditional_create=False))
        if not created:
            raise StoreNotWritable(f"{path}, which nobody knew, was said to be there already")
        self._kept(path, first, None)
        # The second creator must be refused, and refused without having written.
        again = self._created_once(path, second, lambda: create(second))
        return ProbeReport(conditional_create=not again and self.read_bytes(path) == first)

    def _kept(self, path: str, data: bytes, result: T) -> T:
        try:
            found = self.read_bytes(path)
        except NotFound as error:
            found = str(error).encode()
        if found != data:
            raise StoreNotWritable(
                f"{self!r} does not keep what it is given: put {data!r}, got back {found!r}"
            )
        return result

    def _create(self, target: str, data: bytes) -> bool:
        backend = self.backend()
        if self._has_condition is not False:
            try:
                # Not probed: some servers silently ignore the condition.
                return backend.create(target, data, look_first=not self._has_condition)
            except NoCondition:
                self._has_condition = False
        if not backend.create_unguarded(target, data):
            return False
        self._retries.clock.sleep(_SETTLE_SECONDS)
        return backend.read(target) == data

    def _created_once(self, path: str, data: bytes, create: Callable[[], bool]) -> bool:
        """Whether `create` put `data` there, in this attempt or one whose answer got lost."""
        lost_answers = 0

        def attempt() -> bool:
            nonlocal lost_answers
            try:
                with writing(self._shown(path), self.hide):
                    created = create()
                return created or (lost_answers > 0 and self._holds(path, data))
            except StoreUnreachable:
                lost_answers += 1
                raise

        return self._retries.run(attempt)

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            with reading(self._shown(path), self.hide):
                return self.backend().read(_clean(path)) == data
        except NotFound:
            return False

    def _reading(self, path: str, operation: Callable[[], T]) -> T:
        def attempt() -> T:
            with reading(self._shown(path), self.hide):
                return operation()

        return self._retries.run(attempt)

    def _writing(self, path: str, operation: Callable[[], T]) -> T:
        def attempt() -> T:
            with writing(self._shown(path), self.hide):
                return operation()

        return self._retries.run(attempt)

    def _like(self, url: str, retries: Retries) -> "Store":
        other = Store(url, self._options, retry=retries.policy, clock=retries.clock)
        other._has_condition = self._has_condition
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"Store({self.shown!r})"

    def __str__(self) -> str:
        return self.shown

    def _identity(self) -> tuple[str, str]:
        return self._url, json.dumps(self._options, sort_keys=True, default=repr)

    def _join(self, path: str) -> str:
        if not path:
            return self._url
        return f"{self._url}{path}" if self._url.endswith("/") else f"{self._url}/{path}"

    def _shown(self, path: str) -> str:
        return f"{self.shown}/{path}" if path else self.shown

    def _filesystem(self, url: str) -> tuple[Any, str]:
        keep_requests_out_of_logs()
        options = limited_options(url, self._options, self._retries.policy)
        try:
            filesystem, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise PermanentError(f"{self!r} needs a package: {self.hide(str(error))}") from error
        if _protocol(url) in _S3_PROTOCOLS:
            # The loop around ours would multiply the time that a hang takes.
            filesystem.retries = 1
        return filesystem, root


def limited_options(url: str, options: Mapping[str, Any], policy: RetryPolicy) -> dict[str, Any]:
    """The options that a file system is given: for S3, with what bounds a single request.

    What the user says goes first.
    """
    if _protocol(url) not in _S3_PROTOCOLS:
        return dict(options)
    config = {
        "connect_timeout": min(5.0, policy.operation_seconds),
        "read_timeout": policy.operation_seconds,
        # Retries are ours: only so are they bounded, and is a lost answer noticed.
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 32,
        # Chunks bring a checksum of their own, and many servers don't know the new ones of S3.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **options.get("config_kwargs", {}),
    }
    # With more than 1, s3fs asks for an object's size before it reads it. Ours are small.
    return {"max_concurrency": 1, **options, "config_kwargs": config}


def _normalised(url: str) -> str:
    if _is_folder(url):
        if re.match(r"[a-z][a-z0-9]+:/+[^/]", url) and "://" not in url:
            scheme = url.partition(":")[0]  # what follows may be somebody's key
            raise ValueError(f"'{scheme}:...' is neither a path nor a URL: a URL has '://'")
        return str(LocalFileSystem._strip_protocol(url))
    protocol = _protocol(url)
    if protocol not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise ValueError(f"fsspec knows no protocol {protocol!r} (in {shown_url(url)})")
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
