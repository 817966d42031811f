"""An answer in the making: tokens chosen, guessed, verified, and turned into text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch

from dagflow.sessions.engine import Engine, Live
from dagflow.sessions.models import Model
from dagflow.sessions.sampling import Sampling
from dagflow.sessions.speculation import NgramGuesses
from dagflow.sessions.text import Detokenizer, StopStrings
from dagflow_tasks.decoding import ALL, LAST

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Logprobs:
    """How likely the model found a token, before penalties, temperature and cuts.

    Attributes
    ----------
    chosen : float
        The token's log-probability.
    top : tuple of (int, float)
        The most likely tokens and theirs, in this order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, count: int) -> Logprobs:
        """Return those of a token and of the `count` most likely ones, given the logits (V,)."""
        shares = torch.log_softmax(logits.float(), -1)
        top = torch.topk(shares, min(count, shares.numel()))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return cls(float(shares[token]), tuple(pairs))


@dataclass(frozen=True)
class Token:
    """One token of an answer, as it comes.

    Attributes
    ----------
    prompt : int
        Which prompt's answer.
    token : int or None
        None if the answer ended with none, or only text was held back.
    text : str
        The text that is certain now; empty without a tokenizer.
    finish_reason : str or None
        With the last one: "stop" (an end token or a stop string) or "length".
    logprobs : Logprobs or None
        If the request wants them.
    num_cached : int
        The first tokens of the prompt that hadn't to be computed for this answer.
    logits : Tensor (V,) or None
        What the token was chosen from, before penalties, temperature and cuts; if the request wants
        them.
    """

    prompt: int
    token: int | None
    text: str = ""
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    num_cached: int = 0
    logits: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Request:
    """What is wanted of one prompt; `logprobs` counts the most likely tokens told with each."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    speculate: bool = True
    logprobs: int | None = None
    logits: bool = False


@dataclass(frozen=True)
class _Chosen:
    """A token, and what is to be told with it."""

    token: int
    logprobs: Logprobs | None
    logits: torch.Tensor | None


class Answer:
    """One answer in the making."""

    def __init__(
        self, engine: Engine, model: Model, request: Request, number: int, live: Live
    ) -> None:
        self._engine = engine
        self._request = request
        self._number = number
        self._live = live
        self._num_cached = live.num_shared
        self._known = list(request.prompt)
        self._guesses = NgramGuesses() if request.speculate else None
        has_text = bool(request.stop) or model.has_tokenizer
        self._detokenizer = Detokenizer(model.tokenizer) if has_text else None
        self._stops = StopStrings(request.stop)

    async def tokens(self) -> AsyncIterator[Token]:
        request, new, cached = self._request, 0, self._num_cached
        while True:
            for chosen in await self._next_tokens(request.max_new_tokens - new):
                new += 1
                text, reason = self._told(chosen.token, new)
                yield Token(
                    self._number,
                    chosen.token,
                    text,
                    reason,
                    chosen.logprobs,
                    cached,
                    chosen.logits,
                )
                if reason is not None:
                    return

    def _told(self, token: int, number: int) -> tuple[str, str | None]:
        """Return the text that is certain with an answer's token, and why it ends, if it does."""
        if token in self._request.ends:
            return self._rest(), STOP
        text, stopped = self._text(token)
        if stopped:
            return text, STOP
        if number == self._request.max_new_tokens:
            return text + self._rest(), LENGTH
        return text, None

    async def _next_tokens(self, room: int) -> list[_Chosen]:
        """Return the tokens that one traversal of the stages gives: one, and guesses that were right."""
        live, known = self._live, self._known
        guesses = self._guesses.guess(known)[: room - 1] if self._guesses is not None else []
        begin = len(live.tokens)
        # What the stages haven't seen yet: the prompt, or the latest token.
        feed = [*known[begin:], *guesses]
        logits = await self._engine.feed(live, feed, ALL if guesses else LAST)
        logits = logits[len(logits) - len(guesses) - 1 :]
        found: list[_Chosen] = []
        for row, guess in zip(logits, [*guesses, None], strict=True):
            token = self._request.sampling.choose(row, known, len(self._request.prompt))
            known.append(token)
            found.append(self._chosen(row, token))
            if token != guess:
                break
        right = len(found) - 1
        if self._guesses is not None and guesses:
            self._guesses.were_right(right, len(guesses))
        if right < len(guesses):
            self._engine.rewind(live, len(known) - 1)
        return found

    def _chosen(self, logits: torch.Tensor, token: int) -> _Chosen:
        count = self._request.logprobs
        logprobs = None if count is None else Logprobs.of(logits, token, count)
        return _Chosen(token, logprobs, logits.clone() if self._request.logits else None)

    def _text(self, token: int) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        return self._stops.add(self._detokenizer.add(token))

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text, stopped = self._stops.add(self._detokenizer.rest())
        return text if stopped else text + self._stops.rest()
