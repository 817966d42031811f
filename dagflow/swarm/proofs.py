"""Who may tell a worker what: a deployment's driver, and the workers that have its other stages.

A connection says whose it is, and proves that it knows a secret: the worker sends a number that it has
never sent before, and gets back a keyed hash (HMAC, RFC 2104) of that, of what was said, and of the
worker's address. So a proof is worth nothing on another connection, or to another worker.

The secrets come to a worker with the driver's first words to it, which go through dask's scheduler. That
of the driver is another for each worker: none can pass for the driver elsewhere. That of the stages is
one for all workers of a deployment.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dagflow.swarm.links import CommClosedError, Link, Message

DRIVER, STAGE = "driver", "stage"
_KINDS = {
    DRIVER: {"ping", "lost", "shut", "pass", "close", "fork", "route", "resend"},
    # Where a session goes on is the driver's to say.
    STAGE: {"pass", "fork"},
}
_SECRET_BYTES = 32
_PROOF_SECONDS = 5.0


@dataclass(frozen=True)
class Credentials:
    """How a worker tells those that belong to a deployment.

    Attributes
    ----------
    driver : bytes
        Only the driver and this worker know it.
    stage : bytes
        The driver and all workers know it.
    """

    driver: bytes = field(repr=False)
    stage: bytes = field(repr=False)

    def of(self, role: str) -> bytes:
        return self.driver if role == DRIVER else self.stage


class Issuer:
    """A driver's: makes what its workers are given, the same one for the same worker again."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(_SECRET_BYTES)

    def credentials(self, address: str) -> Credentials:
        """Return what the worker at an address is given."""
        return Credentials(_hash(self._secret, DRIVER, address), _hash(self._secret, STAGE))


def may_send(role: str, message: Message, deployment: str) -> bool:
    """Tell whether a message is one that such a peer of a deployment has to send.

    >>> [may_send(role, {"kind": "route"}, "a") for role in (DRIVER, STAGE)]
    [True, False]
    >>> may_send(DRIVER, {"kind": "pass", "deployment": "b"}, "a")
    False
    """
    return message.get("kind") in _KINDS[role] and message.get("deployment", deployment) == (
        deployment
    )


async def is_proven(
    link: Link, address: str, deployment: str, role: str, known: Credentials | None
) -> bool:
    """Ask whoever has connected to the worker at an address for a proof, and check it."""
    nonce = secrets.token_hex(_SECRET_BYTES)
    await link.send({"kind": "challenge", "nonce": nonce})
    answer = (await link.receive()).get("proof")
    if known is None or role not in _KINDS or not isinstance(answer, bytes):
        return False
    wanted = _hash(known.of(role), role, deployment, address, nonce)
    return hmac.compare_digest(answer, wanted)


async def introduced(
    address: str, arguments: Mapping[str, Any], deployment: str, role: str, known: Credentials
) -> Link:
    """Connect to the worker at an address, and prove to be who says so.

    Raises
    ------
    OSError
        If it can't be reached, or doesn't ask for a proof.
    """
    link = await Link.open(address, arguments, {"deployment": deployment, "role": role})
    try:
        async with asyncio.timeout(_PROOF_SECONDS):
            nonce = (await link.receive()).get("nonce")
            if not isinstance(nonce, str):
                raise CommClosedError(f"The worker {address} runs another dagflow.")
            proof = _hash(known.of(role), role, deployment, address, nonce)
            await link.send({"kind": "proof", "proof": proof})
    except BaseException:
        link.close()
        raise
    return link


def _hash(secret: bytes, *parts: str) -> bytes:
    """Return a keyed hash of texts, none of which can pass for two."""
    data = b"".join(len(part).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.digest(secret, data, "sha256")
