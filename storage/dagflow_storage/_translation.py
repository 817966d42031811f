"""The one place where what a file system raises becomes an error of our tree."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dagflow_storage.errors import (
    DagflowError,
    NotFound,
    StoreNotWritable,
    StoreUnreachable,
)

# What no retry cures. ENOENT stands for a bucket that does not exist, ENOTDIR and EEXIST for
# a path below a regular file.
_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        getattr(errno, "EDQUOT", errno.ENOSPC),  # Windows has no quota error
        errno.EFBIG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ENOSYS,
    }
)
_REFUSAL_TYPES = (
    PermissionError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
)
_ABSENT_TYPES = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Client libraries whose errors (no connection, no credentials, timeouts) are no OSErrors;
# named, not imported, because they are optional.
_CLIENT_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "urllib3", "google", "azure", "gcsfs")


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise `NotFound` or `StoreUnreachable` for what goes wrong while reading `where`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DagflowError) or not _is_from_the_store(error):
            raise
        if isinstance(error, _ABSENT_TYPES):
            raise NotFound(f"nothing is stored at {where}") from error
        raise StoreUnreachable(f"could not read {where}: {_what_was_said(error)}") from error


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Raise `StoreNotWritable` or `StoreUnreachable` for what goes wrong writing `where`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DagflowError) or not _is_from_the_store(error):
            raise
        said = f"could not write {where}: {_what_was_said(error)}"
        if _is_refusal(error):
            raise StoreNotWritable(said) from error
        raise StoreUnreachable(said) from error


def _is_from_the_store(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in _CLIENT_LIBRARIES


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, _REFUSAL_TYPES):
        return True
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return True
    return isinstance(error, OSError) and error.errno in _REFUSALS


def _what_was_said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
