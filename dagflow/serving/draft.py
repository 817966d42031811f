"""A small model in the driver's process that guesses what the large one will say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dagflow.errors import SettingsInvalid
from dagflow.models.loading import load
from dagflow.models.model import Model, read_stage
from dagflow.plan.partition import partition
from dagflow.serving.guess import DRAFT, Guess, Kind
from dagflow_tasks.decode.decoder_stage import LAST, TOKENS, Part
from dagflow_tasks.device import current_device

_CHUNK_TOKENS = 256
_MEMORY = 16


class Draft:
    """A small model that proposes tokens, computed in a thread of its own.

    Parameters
    ----------
    source : Model, str, Path or torch module
        A model of `dagflow.load`, or what it takes: that is brought into the large model's store.
    model : Model
        The large one.

    Attributes
    ----------
    model : Model
    seconds : float
        What one token takes, on average.

    Raises
    ------
    SettingsInvalid
        If the two don't have the same vocabulary.
    """

    def __init__(self, source: Model | str | Path | torch.nn.Module, model: Model) -> None:
        if not isinstance(source, Model):
            source = load(source, store=model.ref.store.url)
        _check_vocabularies(source, model)
        self.model = source
        self.seconds = 0.0
        self._num_tokens = _vocabulary_size(model) or None
        program = partition(source.dag, 1)[0]
        self._stage = read_stage(source.ref, program, current_device())
        self._thread = ThreadPoolExecutor(1, "dagflow-draft")

    def begin(self, name: str) -> DraftSession:
        return DraftSession(self, name)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def run(self, part: Part, tokens: Sequence[int]) -> tuple[int, float] | None:
        """Return the likeliest token after a part's tokens, and how likely it is.

        None if its session was rewound further than windows and states go back.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._run, part, tokens)

    def forget(self, name: str) -> None:
        """Drop a session's cache, once the thread has time for it."""
        with suppress(RuntimeError):  # closed
            self._thread.submit(self._stage.close, name)

    def _run(self, part: Part, tokens: Sequence[int]) -> tuple[int, float] | None:
        begin = time.perf_counter()
        if not self._stage.accepts(part):
            return None
        _, found = self._stage.run([part], {TOKENS: torch.tensor(tokens)})
        shares = torch.softmax(found["logits"][-1, : self._num_tokens], -1)
        chance, token = shares.max(-1)
        if part.count == 1:
            seconds = time.perf_counter() - begin
            self.seconds += (seconds - self.seconds) / (_MEMORY if self.seconds else 1)
        return int(token), float(chance)


class DraftSession:
    """One text as the draft model knows it."""

    def __init__(self, draft: Draft, name: str) -> None:
        self._draft = draft
        self._name = name
        self._num_fed = 0
        self._epoch = 0
        self._reading: asyncio.Task[Guess | None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it has read the prompt."""
        return self._reading is not None and self._reading.done()

    @property
    def seconds(self) -> float:
        return self._draft.seconds

    def read(self, prompt: Sequence[int]) -> None:
        """Begin to read the prompt."""
        self._reading = asyncio.ensure_future(self.guess(list(prompt)))

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on."""
        if position < self._num_fed:
            self._num_fed = position
            self._epoch += 1

    async def guess(self, tokens: Sequence[int]) -> Guess | None:
        """Return what may follow a text; None beyond the model's length.

        Up to where it was rewound to, the text must be the one of the last time.
        """
        limit = self._draft.model.max_tokens
        if limit is not None and len(tokens) > limit:
            return None
        self.rewind(len(tokens) - 1)  # what follows a token is heard when it is fed
        while True:
            start, end = self._num_fed, min(len(tokens), self._num_fed + _CHUNK_TOKENS)
            part = Part(self._name, self._epoch, start, end - start, start, LAST)
            self._num_fed = end
            found = await self._draft.run(part, tokens[start:end])
            if found is None:
                self.rewind(0)  # read once more
                continue
            token, chance = found
            if end == len(tokens):
                return Guess(token, Kind(DRAFT, int(8 * chance)), chance)

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._draft.forget(self._name)


def _check_vocabularies(draft: Model, model: Model) -> None:
    """Tokens must mean the same to both; sizes may differ if tokenizers say that they do."""
    if draft.has_tokenizer and model.has_tokenizer:
        own, wanted = draft.tokenizer.get_vocab(), model.tokenizer.get_vocab()
        if own != wanted:
            raise SettingsInvalid(
                f"The draft model {draft.ref.name!r} has another vocabulary than {model.ref.name!r}: "
                f"{_difference(own, wanted)} A draft must come from the same family as the model."
            )
        return
    if _vocabulary_size(draft) != _vocabulary_size(model):
        raise SettingsInvalid(
            f"The draft model {draft.ref.name!r} has a vocabulary of {_vocabulary_size(draft)} tokens, "
            f"and {model.ref.name!r} one of {_vocabulary_size(model)}: a draft must have the same."
        )


def _vocabulary_size(model: Model) -> int:
    return int(model.config.get("vocab_size") or 0)


def _difference(own: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    def at(vocabulary: Mapping[str, int], text: str) -> Any:
        return vocabulary.get(text, "absent")

    text = min(t for t in own.keys() | wanted.keys() if at(own, t) != at(wanted, t))
    return f"{text!r} is {at(own, text)} in the draft, and {at(wanted, text)} in the model."
