"""`dagflow.Session`: one sequence, fed and read by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from dagflow.errors import BatchInvalid, DagflowError, SettingsInvalid
from dagflow.sessions.deployment import Deployment
from dagflow.sessions.engine import Live
from dagflow_tasks.decoding import ALL, LAST


class Session:
    """One sequence on a deployment, fed and read by hand. A context manager.

    Attributes
    ----------
    tokens : list of int
        What the stages have been given.
    """

    def __init__(self, deployment: Deployment, live: Live | None = None) -> None:
        self._engine = deployment.engine
        self._deployment = deployment
        self._live: Live = live if live is not None else self._engine.call(self._engine.open())

    @property
    def tokens(self) -> list[int]:
        return list(self._live.tokens)

    @property
    def position(self) -> int:
        """How many tokens the stages have been given."""
        return len(self._live.tokens)

    def prefill(self, tokens: Sequence[int] | torch.Tensor, *, every: bool = False) -> torch.Tensor:
        """Give tokens, and return the logits after the last (V,), or after every one (T, V).

        Raises
        ------
        BatchInvalid
            If there are none, or the model was made for fewer.
        CacheFull
            If the workers' caches have no room for them. The session is as it was.
        """
        given = [int(token) for token in tokens]
        if not given:
            raise BatchInvalid("There are no tokens to give.")
        self._check_room(len(given))
        logits: torch.Tensor = self._engine.call(
            self._engine.feed(self._live, given, ALL if every else LAST)
        )
        return logits if every else logits[-1]

    def decode(self, token: int) -> torch.Tensor:
        """Give one token, and return the logits (V,) after it; raises as `prefill` does."""
        return self.prefill([token])

    def fork(self, position: int | None = None) -> Session:
        """Return a session of its own with the first tokens of this one, which are copied.

        Raises
        ------
        CacheFull
        """
        length = self.position if position is None else self._checked(position)
        live = self._engine.call(self._engine.fork(self._live, length))
        return Session(self._deployment, live)

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on."""
        self._checked(position)

        async def rewind() -> None:
            self._engine.rewind(self._live, position)

        self._engine.call(rewind())

    def close(self) -> None:
        """Forget the session, here and on the workers."""
        self._engine.call(self._engine.end(self._live))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(DagflowError):
            self.close()

    def _checked(self, position: int) -> int:
        if not 0 <= position <= self.position:
            raise SettingsInvalid(
                f"The session has {self.position} tokens; there is no position {position}."
            )
        return position

    def _check_room(self, count: int) -> None:
        limit = self._deployment.model.max_tokens
        if limit is not None and self.position + count > limit:
            raise BatchInvalid(
                f"The session has {self.position} tokens and would get {count} more; the model was "
                f"made for {limit}."
            )
