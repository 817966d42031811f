"""`dagflow.Session`: one sequence, fed and read by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from dagflow.errors import BatchInvalid, DagflowError, DamagedData, SettingsInvalid
from dagflow.serving.deployment import Deployment
from dagflow.serving.keeping import SESSION, Record
from dagflow.serving.live import Live
from dagflow_tasks.decode.decoder_stage import ALL, LAST


class Session:
    """One sequence on a deployment, fed and read by hand. A context manager.

    Parameters
    ----------
    deployment : Deployment
    name : str, optional
        Keeps the session's tokens in the deployment's store, from where `resume` goes on with them.

    Attributes
    ----------
    tokens : list of int
        What the stages have been given.
    logits : Tensor or None
        After the last token (V,). None if nobody has asked for them: there is no token yet, or it
        became the last one by a rewind or in a fork.

    Raises
    ------
    SettingsInvalid
        If a session of that name is kept already, or the deployment has no store.
    """

    def __init__(
        self, deployment: Deployment, live: Live | None = None, *, name: str | None = None
    ) -> None:
        self._engine = deployment.engine
        self._deployment = deployment
        self._record = None if name is None else _new_record(deployment, name)
        self.logits: torch.Tensor | None = None
        self._live: Live = live if live is not None else self._engine.call(self._engine.open())

    @classmethod
    def resume(cls, deployment: Deployment, name: str) -> Session:
        """Go on with a kept session: the stages are given its tokens again.

        Tokens of the last fraction of a second may be lacking if its driver has died: look at
        `position`. `logits` are those after the last one.

        Raises
        ------
        NotFound
            If no session of that name is kept.
        DamagedData
            If a part of it is damaged, and not only its end.
        SettingsInvalid
            If it was another model's, or an answer is kept under that name.
        SessionInUse, LeaseLost, StoreUnreachable
        """
        record = deployment.keeper.take_up(name)
        session = cls(deployment)
        try:
            tokens = _tokens_of(record, deployment)
            if tokens:
                given = session.prefill if deployment.model.has_head else session.hidden
                given(tokens)
        except BaseException:
            session.close()
            record.close()
            raise
        session._record = record
        return session

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
        SettingsInvalid
            If the deployment's model has no head.
        """
        if not self._deployment.model.has_head:
            raise SettingsInvalid(
                "A model without its head returns hidden states, no logits: call hidden, or deploy "
                "the model itself."
            )
        logits = self._feed(tokens, ALL if every else LAST)
        self.logits = logits[-1]
        return logits if every else self.logits

    def hidden(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Give tokens, and return their hidden states (T, D) after the last norm.

        That is what the head reads, and transformers returns as ``hidden_states[-1]``.

        Raises
        ------
        SettingsInvalid
            If the deployment's model has its head: deploy ``model.without_head()``.
        """
        if self._deployment.model.has_head:
            raise SettingsInvalid(
                "A model with its head returns logits: deploy model.without_head() for hidden states."
            )
        return self._feed(tokens, ALL)

    def _feed(self, tokens: Sequence[int] | torch.Tensor, want: str) -> torch.Tensor:
        given = [int(token) for token in tokens]
        if not given:
            raise BatchInvalid("There are no tokens to give.")
        self._check_room(len(given))
        begin = self.position
        if self._record is not None:
            self._record.check()
        found: torch.Tensor = self._engine.call(self._engine.feed(self._live, given, want))
        if self._record is not None:
            self._record.add(begin, given)
        return found

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
        self.logits = None
        if self._record is not None:
            self._record.add(position, [])

    def close(self) -> None:
        """Forget the session, here and on the workers; one with a name stays in the store."""
        if self._record is not None:
            self._record.close()
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


def _new_record(deployment: Deployment, name: str) -> Record:
    keeper = deployment.keeper
    record = keeper.take_up(name, {"kind": SESSION, "model": deployment.model.ref.name})
    if record.found is not None:
        record.close()
        raise SettingsInvalid(
            f"{keeper.store} keeps something of the name {name!r} already: go on with it "
            f"(Session.resume(deployment, {name!r})), or forget it (deployment.forget({name!r}))."
        )
    return record


def _tokens_of(record: Record, deployment: Deployment) -> list[int]:
    """Return what a kept session was given."""
    found = record.found
    assert found is not None
    kind, model = found.head.get("kind"), found.head.get("model")
    if (kind, model) != (SESSION, deployment.model.ref.name):
        raise SettingsInvalid(
            f"{record.name!r} is kept as {kind} of the model {model}; to be resumed here it must be a "
            f"session of {deployment.model.ref.name}."
        )
    if found.is_damaged:
        raise DamagedData(
            f"The session {record.name!r} is damaged after its token {len(found.tokens)}, and more "
            f"followed. Delete it: deployment.forget({record.name!r})."
        )
    return list(found.tokens)
