"""Who a request comes from, as far as its API key tells."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

from starlette.datastructures import Headers

from dagflow.errors import SettingsInvalid
from dagflow.server.errors import ApiError

EVERYBODY = ""


class Keys:
    """The API keys of a server, as digests: nothing that holds one shows a key.

    Raises
    ------
    SettingsInvalid
        If one is empty, which whoever sends none would have.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        as_sent = [key.strip().encode(errors="surrogateescape") for key in keys]
        if not all(as_sent):
            raise SettingsInvalid("An API key is empty: leave it out, or give it characters.")
        self._digests = [sha256(key).digest() for key in as_sent]

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, headers: Headers) -> str:
        """Return a name for whoever has a request's key; one for all if the server has no keys.

        It says which key it is, not what it is. All keys are compared in any case, and as digests:
        how long that takes tells nothing of them.

        Raises
        ------
        ApiError
            401 if it is none of the server's.
        """
        if not self._digests:
            return EVERYBODY
        scheme, _, key = headers.get("authorization", "").encode("latin-1").partition(b" ")
        given = sha256(key.strip()).digest()
        found = [hmac.compare_digest(given, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(found):
            message = "The API key is wrong or missing: send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {found.index(True)}"
