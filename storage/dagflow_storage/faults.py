"""Faults between a store and its file system, scripted by attempt; for tests.

`with_faults` gives the same store behind a file system that fails as told. Which attempt it is
gets counted in files, so that all processes of a test count together, and a script means the same
however many take part.
"""

import asyncio
import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped]

from dagflow_storage.place.location import Store, limited_options
from dagflow_storage.place.retries import Clock

PROTOCOL = "faulty"
# What was listed last, by script and path, for listings that are stale.
_LISTED: dict[tuple[str, str], Any] = {}
Operation = Literal["put", "get", "info", "list", "delete"]


class FaultKind(Enum):
    """What goes wrong; what a real store would say is raised."""

    UNAVAILABLE = "503, slow down"
    RESET = "connection reset"
    HANG = "no answer for some seconds, then all is well"
    LOST_ANSWER = "done, and the answer is an error"
    FORBIDDEN = "403"
    EXPIRED = "expired credentials"
    NO_BUCKET = "no such bucket"
    FULL = "disk full"
    FULL_MIDWAY = "disk full, with half of the bytes written"
    READ_ONLY = "read-only file system"
    TRUNCATED = "the last bytes are missing"
    FLIPPED = "one bit is wrong"
    STALE = "a listing is that of the time before"
    CONDITION_IGNORED = "a conditional put is done whatever is there"
    CONDITION_UNKNOWN = "501 for a conditional put"


@dataclass(frozen=True)
class Fault:
    """A fault of some attempts.

    Attributes
    ----------
    kind
        What goes wrong. `TRUNCATED` and `FLIPPED` damage what is read by a get, and what is
        stored by a put.
    operation
        Whose attempts are counted.
    path
        A regular expression that is searched in the path.
    first
        The first attempt it happens to, from 1.
    count
        To how many in a row; None is for ever.
    seconds
        How long a hang is.
    """

    kind: FaultKind
    operation: Operation
    path: str = ""
    first: int = 1
    count: int | None = 1
    seconds: float = 30.0

    def matches(self, operation: str, path: str) -> bool:
        """Whether this attempt is one of those it counts."""
        return operation == self.operation and re.search(self.path, path) is not None

    def happens_to(self, attempt: int) -> bool:
        """Whether it happens to the n-th of them."""
        return self.first <= attempt and (self.count is None or attempt < self.first + self.count)


def with_faults(store: Store, faults: Sequence[Fault], counters: str | os.PathLike[str]) -> Store:
    """The same place as `store` holds, reached through a file system with `faults`.

    Parameters
    ----------
    counters
        A folder where attempts are counted; an empty one for each script.
    """
    retries = store.retries
    protocol, _, path = store.url.rpartition("://")
    options = {
        "target_protocol": protocol or "file",
        "target_options": limited_options(store.url, store.options, retries.policy),
        "faults": list(faults),
        "counters": os.fspath(counters),
    }
    return Store(f"{PROTOCOL}://{path}", options, retry=retries.policy, clock=retries.clock)


def num_attempts(counters: str | os.PathLike[str], fault_index: int) -> int:
    """How many attempts a script's fault has seen so far."""
    counter = Path(counters) / str(fault_index)
    return counter.stat().st_size if counter.exists() else 0


class FakeClock(Clock):
    """A clock that jumps where others wait, and that remembers the jumps.

    Pauses are as long as they may be, so that a test can tell how long retries go on.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []

    def now(self) -> float:
        """The seconds that were waited."""
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Jump."""
        self.seconds += seconds
        self.pauses.append(seconds)

    def fraction(self) -> float:
        """The longest pause."""
        return 1.0


class FaultyFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """Another file system with faults, known to fsspec as ``faulty://``; see `with_faults`."""

    protocol = PROTOCOL
    cachable = False

    def __init__(
        self,
        target_protocol: str,
        target_options: Mapping[str, Any],
        faults: Sequence[Fault],
        counters: str,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._target = fsspec.filesystem(target_protocol, **target_options)
        self._target.retries = 1  # of s3fs; the others don't know it
        self._faults = tuple(faults)
        self._counters = Path(counters)
        self._counters.mkdir(parents=True, exist_ok=True)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        kinds = await self._meet("get", path)
        data = await asyncio.to_thread(self._target.cat_file, path, start=start, end=end)
        self._answered(kinds, None)
        return _damaged(kinds, bytes(data))

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        kinds = await self._meet("put", path)
        if mode == "create" and FaultKind.CONDITION_UNKNOWN in kinds:
            raise OSError(
                errno.ENOSYS, "A header you provided implies functionality that is not implemented"
            )
        if FaultKind.CONDITION_IGNORED in kinds:
            mode = "overwrite"
        await asyncio.to_thread(self._put, path, _damaged(kinds, value), mode)
        self._answered(kinds, None)

    async def _info(self, path: str, **_: Any) -> Any:
        kinds = await self._meet("info", path)
        return self._answered(kinds, await asyncio.to_thread(self._target.info, path))

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        kinds = await self._meet("list", path)
        where = (str(self._counters), path)
        if FaultKind.STALE in kinds and where in _LISTED:
            found = _LISTED[where]
        else:
            found = await asyncio.to_thread(self._target.ls, path, detail=True)
            _LISTED[where] = found
        # Some file systems begin all paths with a slash.
        lead = "/" if path.startswith("/") else ""
        entries = [{**entry, "name": lead + entry["name"].strip("/")} for entry in found]
        return self._answered(kinds, entries if detail else [e["name"] for e in entries])

    async def _rm(self, path: Any, recursive: bool = False, **_: Any) -> None:
        kinds = await self._meet("delete", str(path))
        await asyncio.to_thread(self._target.rm, path, recursive=recursive)
        self._answered(kinds, None)

    async def _rm_file(self, path: str, **_: Any) -> None:
        kinds = await self._meet("delete", path)
        await asyncio.to_thread(self._target.rm_file, path)
        self._answered(kinds, None)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings, the other file system's too."""
        self._target.invalidate_cache(path)
        super().invalidate_cache(path)

    def _put(self, path: str, data: bytes, mode: str) -> None:
        if "file" in self._target.protocol:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._target.pipe_file(path, data, mode=mode)

    async def _meet(self, operation: Operation, path: str) -> frozenset[FaultKind]:
        """The faults of this attempt that come later; raises those that come first."""
        met = [
            fault
            for index, fault in enumerate(self._faults)
            if fault.matches(operation, path) and fault.happens_to(self._count(index))
        ]
        for fault in met:
            if fault.kind is FaultKind.HANG:
                await asyncio.sleep(fault.seconds)
            elif fault.kind in _REFUSALS:
                raise _said(fault.kind)
        return frozenset(fault.kind for fault in met)

    def _answered(self, kinds: frozenset[FaultKind], answer: Any) -> Any:
        for late in kinds & _LATE:
            raise _said(late)
        return answer

    def _count(self, index: int) -> int:
        """The number of this attempt. Appending is atomic: no two get the same number."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        counter = os.open(self._counters / str(index), flags, 0o644)
        try:
            os.write(counter, b".")
            return os.lseek(counter, 0, os.SEEK_CUR)
        finally:
            os.close(counter)


_S3_ANSWERS = {
    FaultKind.UNAVAILABLE: ("SlowDown", 503, "Please reduce your request rate."),
    FaultKind.LOST_ANSWER: ("InternalError", 500, "We encountered an internal error."),
    FaultKind.FORBIDDEN: ("AccessDenied", 403, "Access Denied"),
    FaultKind.EXPIRED: ("ExpiredToken", 400, "The provided token has expired."),
    FaultKind.NO_BUCKET: ("NoSuchBucket", 404, "The specified bucket does not exist"),
}
_SYSTEM_ANSWERS = {
    FaultKind.RESET: errno.ECONNRESET,
    FaultKind.FULL: errno.ENOSPC,
    FaultKind.FULL_MIDWAY: errno.ENOSPC,
    FaultKind.READ_ONLY: errno.EROFS,
}
_LATE = {FaultKind.LOST_ANSWER, FaultKind.FULL_MIDWAY}
_REFUSALS = (_S3_ANSWERS.keys() | _SYSTEM_ANSWERS.keys()) - _LATE


def _said(kind: FaultKind) -> Exception:
    """What s3fs, or the operating system, raises then."""
    if kind in _SYSTEM_ANSWERS:
        number = _SYSTEM_ANSWERS[kind]
        return OSError(number, os.strerror(number))
    from botocore.exceptions import ClientError  # type: ignore[import-untyped]
    from s3fs.errors import translate_boto_error  # type: ignore[import-untyped]

    code, status, message = _S3_ANSWERS[kind]
    answer = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = translate_boto_error(ClientError(answer, "PutObject"))
    assert isinstance(error, Exception)
    return error


def _damaged(kinds: frozenset[FaultKind], data: bytes) -> bytes:
    if FaultKind.TRUNCATED in kinds:
        data = data[:-3]
    if FaultKind.FULL_MIDWAY in kinds:
        data = data[: len(data) // 2]
    if FaultKind.FLIPPED in kinds and data:
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
    return data


# A store with faults brings its `Fault`s when it is unpickled elsewhere, and they bring this.
fsspec.register_implementation(PROTOCOL, FaultyFileSystem, clobber=True)
