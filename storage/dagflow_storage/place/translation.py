"""The one place where what a file system raises becomes an error of our tree."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagflow_storage.errors import (
    CredentialsExpired,
    DagflowError,
    NotFound,
    OutOfDescriptors,
    PermanentError,
    StoreNotReadable,
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
_CLIENT_LIBRARIES = frozenset(
    {"botocore", "aiobotocore", "aiohttp", "urllib3", "http", "google", "azure", "gcsfs", "adlfs"}
)
_REFUSAL_NAMES = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "ConfigParseError",
        "NoRegionError",
        "InvalidRegionError",
        "ParamValidationError",
    }
)
_EXPIRED_NAMES = frozenset(
    {
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "SSOTokenLoadError",
        "LoginRefreshRequired",
    }
)
# S3's own words, https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. A token of
# another account or region is invalid, too, but new credentials are the cure either way.
_EXPIRED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
)
# Refusals by their number (4xx) that mean a garbled or a late request.
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InvalidDigest",
        "OperationAborted",
        "ConditionalRequestConflict",
        "RequestTimeout",
        "SlowDown",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    }
)
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
_REFUSED_STATUSES = frozenset({501, 505, 507})
_HINTS = {
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "InvalidAccessKeyId": "the store doesn't know this access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "NoSuchBucket": "create the bucket, or correct the URL",
    # The answer to HEAD has no body to say why.
    "400": "the usual reason is credentials that expired",
    "403": "no permission, or wrong credentials",
    "QuotaExceeded": "the store's quota is used up",
    "TimeoutError": "no answer in time",
    "FSTimeoutError": "no answer in time",
    "NoCredentialsError": "set them, in the environment or as options of the Store",
}


@contextmanager
def reading(where: str, hide: Callable[[str], str] = str) -> Iterator[None]:
    """Raise an error of our tree for what goes wrong while reading `where`.

    `NotFound`, `StoreNotReadable`, `CredentialsExpired`, or `StoreUnreachable`. What `hide` takes out
    of a text is neither in its message nor in what it was raised from.
    """
    try:
        yield
    except DagflowError:
        raise
    except Exception as error:
        if isinstance(error, _ABSENT_TYPES):
            found: DagflowError = NotFound(f"nothing is stored at {where}")
        elif _is_from_the_store(error):
            found = _translated(error, f"could not read {where}", StoreNotReadable, hide)
        elif _tells(error, hide):
            found = PermanentError(f"could not read {where}: {_what_was_said(error, hide)}")
        else:
            raise
        raise found from (None if _tells(error, hide) else error)


@contextmanager
def writing(where: str, hide: Callable[[str], str] = str) -> Iterator[None]:
    """Raise an error of our tree for what goes wrong while writing `where`.

    `StoreNotWritable`, `CredentialsExpired`, or `StoreUnreachable`. See `reading` for `hide`.
    """
    try:
        yield
    except DagflowError:
        raise
    except Exception as error:
        if _is_from_the_store(error):
            found: DagflowError = _translated(
                error, f"could not write {where}", StoreNotWritable, hide
            )
        elif _tells(error, hide):
            found = PermanentError(f"could not write {where}: {_what_was_said(error, hide)}")
        else:
            raise
        raise found from (None if _tells(error, hide) else error)


def _tells(error: BaseException, hide: Callable[[str], str]) -> bool:
    """Whether an error, or one that it came from, says something that is to be hidden."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        said = f"{one} {one!r}"
        if hide(said) != said:
            return True
        waiting += [one.__cause__, one.__context__]
    return False


def is_lost_race(error: Exception) -> bool:
    """Whether a conditional put was refused because something is there.

    Servers differ in how they say it: RADOS leaves out the condition's name, and others answer
    in a text of their own.
    """
    if isinstance(error, FileExistsError) or _code(error) == "PreconditionFailed":
        return True
    return _status(error) == 412 or "precondition" in str(error).lower()


def is_unsupported(error: Exception) -> bool:
    """Whether a request failed because the store can't do such a thing at all."""
    if isinstance(error, (NotImplementedError, TypeError)):
        return True
    return _status(error) == 501 or (isinstance(error, OSError) and error.errno == errno.ENOSYS)


def _translated(
    error: Exception, what: str, refusal: type[PermanentError], hide: Callable[[str], str]
) -> DagflowError:
    said = f"{what}: {_what_was_said(error, hide)}"
    if _is_expired(error):
        return CredentialsExpired(f"{said} (the credentials expired or are not valid: renew them)")
    if _is_refusal(error):
        return refusal(said)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return OutOfDescriptors(f"{said} (raise the limit of open files: ulimit -n)")
    return StoreUnreachable(said)


def _is_from_the_store(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in _CLIENT_LIBRARIES


def _is_expired(error: Exception) -> bool:
    return type(error).__name__ in _EXPIRED_NAMES or _code(error) in _EXPIRED_CODES


def _is_refusal(error: Exception) -> bool:
    if _code(error) in _TRANSIENT_CODES:
        return False
    if isinstance(error, _REFUSAL_TYPES) or type(error).__name__ in _REFUSAL_NAMES:
        return True
    status = _status(error)
    if status is not None:
        refused = 400 <= status < 500 and status not in _TRANSIENT_STATUSES
        return refused or status in _REFUSED_STATUSES
    return isinstance(error, OSError) and error.errno in _REFUSALS


def _response(error: Exception) -> Mapping[str, Any]:
    """What a server of S3's kind answered; s3fs puts it behind an OSError as its cause."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, Mapping):
            return response
    return {}


def _code(error: Exception) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int | None:
    """The HTTP status, wherever the client library keeps it."""
    found = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status", "status_code", "code"):
        if found is None:
            found = getattr(error, name, None)
    try:
        status = int(found) if found is not None else 0
    except (TypeError, ValueError):
        return None
    return status if 100 <= status < 600 else None


def _what_was_said(error: Exception, hide: Callable[[str], str]) -> str:
    name, code = type(error).__name__, _code(error)
    said = f"{name}: {hide(str(error))}" if str(error) else name
    if code and code not in said:
        said += f" [{code}]"
    hint = _HINTS.get(code) or _HINTS.get(name)
    return f"{said} ({hint})" if hint else said
