"""An answer in the making: tokens chosen, guessed, verified, and turned into text."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dagflow.models.model import Model
from dagflow.models.text import Detokenizer, StopStrings
from dagflow.serving.draft import DraftSession
from dagflow.serving.engine import Engine
from dagflow.serving.live import Live
from dagflow.serving.sampling import Sampling
from dagflow.serving.speculation import Guesser
from dagflow_tasks.decode.decoder_stage import ALL, LAST

STOP, LENGTH = "stop", "length"

# A longer pass would hold up its own first tokens.
_MOST_GUESSES = 16
_MOST_UNDER_WAY = 256


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

    def to_numbers(self) -> list[float]:
        """Return the chosen one's, and then each of the most likely tokens and its own."""
        return [self.chosen, *(number for pair in self.top for number in pair)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Logprobs:
        """Return what `to_numbers` was made from."""
        tokens = map(int, numbers[1::2])
        return cls(numbers[0], tuple(zip(tokens, numbers[2::2], strict=True)))


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
    """What is wanted of one prompt.

    Attributes
    ----------
    logprobs : int or None
        How many of the most likely tokens to tell with each.
    logits : bool
        Whether to tell what each token was chosen from.
    name : str or None
        Under which the answer is kept, where something is kept; None for not at all.
    owner : str
        Whose it is: it goes on only from what was computed for requests of the same owner.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    speculate: bool = True
    logprobs: int | None = None
    logits: bool = False
    name: str | None = None
    owner: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what is kept: neither its name nor how it is sped up, nor what can't be kept.

        Nor whose it is: that bears on what is computed, and on no token.
        """
        found = asdict(self)
        del found["name"], found["speculate"], found["logits"], found["owner"]
        bias = found["sampling"]["logit_bias"]
        found["sampling"]["logit_bias"] = {str(token): value for token, value in bias.items()}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any], name: str) -> Request:
        """Return a request that was kept."""
        sampling = dict(found["sampling"])
        bias = {int(token): value for token, value in sampling.pop("logit_bias").items()}
        return cls(
            tuple(found["prompt"]),
            found["max_new_tokens"],
            Sampling(logit_bias=bias, **sampling),
            tuple(found["stop"]),
            tuple(found["ends"]),
            logprobs=found["logprobs"],
            name=name,
        )


@dataclass(frozen=True)
class Chosen:
    """A token, and what is to be told with it."""

    token: int
    logprobs: Logprobs | None = None
    logits: torch.Tensor | None = None


class Telling:
    """Says tokens as they are chosen: their text, and whether one is the last.

    Parameters
    ----------
    number : int
        Which prompt's answer.
    num_cached : int
        As for `Token`.
    """

    def __init__(self, model: Model, request: Request, number: int, num_cached: int = 0) -> None:
        self._request = request
        self._number = number
        self._num_cached = num_cached
        self._count = 0
        has_text = bool(request.stop) or model.has_tokenizer
        self._detokenizer = Detokenizer(model.tokenizer, request.prompt) if has_text else None
        self._stops = StopStrings(request.stop)

    @property
    def room(self) -> int:
        """How many tokens there may still be."""
        return self._request.max_new_tokens - self._count

    def say(self, chosen: Chosen) -> Token:
        """Return the next token as the answer's reader gets it."""
        text, ended = self._told(chosen.token)
        return Token(
            self._number,
            chosen.token,
            text,
            ended,
            chosen.logprobs,
            self._num_cached,
            chosen.logits,
        )

    def _told(self, token: int) -> tuple[str, str | None]:
        """Return the text that is certain with a token, and why the answer ends, if it does."""
        self._count += 1
        if token in self._request.ends:
            return self._rest()[0], STOP
        text, is_stopped = self._text(token)
        if self.room == 0 and not is_stopped:
            rest, is_stopped = self._rest()
            text += rest
        return text, STOP if is_stopped else LENGTH if self.room == 0 else None

    def _text(self, token: int) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        return self._stops.add(self._detokenizer.add(token))

    def _rest(self) -> tuple[str, bool]:
        """Return what was held back, and whether a stop string ended it."""
        if self._detokenizer is None:
            return "", False
        text, is_stopped = self._stops.add(self._detokenizer.rest())
        return (text, True) if is_stopped else (text + self._stops.rest(), False)


@dataclass
class _Pass:
    """Tokens on their way, and the logits that will come back: of the last of a prompt, of all others."""

    logits: list[asyncio.Future[torch.Tensor]]

    @property
    def is_back(self) -> bool:
        return all(future.done() for future in self.logits)


class Answer:
    """One answer in the making.

    The next token goes through the stages with guesses behind it, and while it does, further passes of
    guesses follow, as if all before were right. The first wrong one ends them: the session rewinds, and
    goes on from the token that should have been there.

    Parameters
    ----------
    made : sequence of Chosen
        Its first tokens, if another driver has chosen them already.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        request: Request,
        number: int,
        live: Live,
        draft: DraftSession | None = None,
        made: Sequence[Chosen] = (),
    ) -> None:
        self._engine = engine
        self._request = request
        self._live = live
        self._made = made
        self._known = [*request.prompt, *(one.token for one in made)]
        self._num_given = len(self._known)
        self._draft = draft if request.speculate else None
        self._under_way: deque[_Pass] = deque()
        # The last token needn't be sent: nobody asks what follows it.
        self._most_sent = len(request.prompt) + request.max_new_tokens - 1
        self._guesser = (
            Guesser(self._known, request.ends, engine.pace, self._draft)
            if request.speculate
            else None
        )
        self._telling = Telling(model, request, number, min(live.num_shared, len(request.prompt)))

    async def tokens(self) -> AsyncIterator[Token]:
        """Yield all tokens from the first one on; those that were made are computed by nobody."""
        if self._draft is not None:
            self._draft.read(self._known)
        chosen = self._made or await self._next_tokens()
        while True:
            for one in chosen:
                said = self._telling.say(one)
                yield said
                if said.finish_reason is not None:
                    return
            chosen = await self._next_tokens()

    async def _next_tokens(self) -> list[Chosen]:
        """Return the tokens that one pass gives: one, and guesses that were right."""
        await self._send()
        done = self._under_way.popleft()
        logits = torch.cat([await future for future in done.logits])
        found: list[Chosen] = []
        for row in logits:
            at = len(self._known)
            token = self._request.sampling.choose(row, self._known, len(self._request.prompt))
            found.append(self._chosen(row, token))
            self._known.append(token)
            if self._guesser is not None and not self._guesser.confirm(token):
                self._engine.rewind(self._live, at)
                self._under_way.clear()
                break
        return found

    def _chosen(self, logits: torch.Tensor, token: int) -> Chosen:
        count = self._request.logprobs
        logprobs = None if count is None else Logprobs.of(logits, token, count)
        return Chosen(token, logprobs, logits.clone() if self._request.logits else None)

    async def _send(self) -> None:
        """Send the token that is known, if it hasn't been, and as many guesses as pay."""
        guesser, live = self._guesser, self._live
        if not self._under_way:
            tokens = self._known[len(live.tokens) :]
            # A prompt goes alone: nobody wants to know what follows each of its tokens.
            if guesser is not None and len(live.tokens) >= self._num_given:
                tokens += await guesser.behind(
                    self._room(len(tokens)), self._engine.num_waiting + 1
                )
            await self._send_pass(tokens)
        if guesser is None:
            return
        first = self._under_way[0]
        most = self._engine.pace.most_passes(_MOST_GUESSES)
        while len(self._under_way) < most and not first.is_back:
            guesses = await guesser.ahead(
                len(self._under_way),
                self._room(0),
                self._engine.num_waiting,
                lambda: not first.is_back,
            )
            if not guesses:
                return
            await self._send_pass(guesses)

    def _room(self, num_tokens: int) -> int:
        """Return how many guesses may be sent behind so many tokens."""
        sent = len(self._live.tokens) + num_tokens
        most_under_way = _MOST_UNDER_WAY - (sent - len(self._known))
        return max(0, min(_MOST_GUESSES, self._most_sent - sent, most_under_way))

    async def _send_pass(self, tokens: Sequence[int]) -> None:
        want = LAST if len(self._live.tokens) < self._num_given else ALL
        logits = await self._engine.send(self._live, tokens, want)
        self._under_way.append(_Pass(logits))
