"""What the server answers when it can't do what it was asked to, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dagflow.errors import (
    BatchInvalid,
    DagflowError,
    LeaseLost,
    RequestTooLarge,
    SessionInUse,
    SettingsInvalid,
    StoreUnreachable,
    TransientError,
)

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5
_STORE = "What answers are kept in can't be reached now, or another server has it."


class ApiError(Exception):
    """An answer that says no.

    Attributes
    ----------
    status : int
        Of HTTP.
    code : str or None
        For programs.
    param : str or None
        Which option is wrong.
    headers : mapping
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self._type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def as_api_error(error: BaseException) -> ApiError:
    """Return how the server says that something went wrong."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTooLarge):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, BatchInvalid | SettingsInvalid):
        return ApiError(400, str(error))
    if isinstance(error, SessionInUse):
        headers = {"Retry-After": "1"}
        return ApiError(409, "The answer is being made just now.", "in_progress", headers=headers)
    if isinstance(error, TransientError | LeaseLost):
        headers = {"Retry-After": str(_RETRY_SECONDS)}
        # Where a store is is nothing that clients should know.
        why = _STORE if isinstance(error, LeaseLost | StoreUnreachable) else str(error)
        return ApiError(503, f"{type(error).__name__}: {why}", "unavailable", headers=headers)
    if isinstance(error, DagflowError):
        return ApiError(500, f"{type(error).__name__}: {error}", "failed")
    logger.error("A request has failed.", exc_info=error)
    message = f"{type(error).__name__}: the server's log says more."
    return ApiError(500, message, "failed")
