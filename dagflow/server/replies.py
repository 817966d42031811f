"""Answers as OpenAI's clients read them: whole, or piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dagflow.models.text import TokenTexts
from dagflow.server.errors import as_api_error
from dagflow.serving.answers import Token

_DONE = "data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity
# Tokens and log-probabilities that are written in some milliseconds.
_FEW_ENTRIES = 512
# A body's choices, one's log-probabilities, and their lists.
_DEPTH_OF_TOKENS = 5
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass
class Usage:
    """How many tokens went in and came out.

    Attributes
    ----------
    prompt_tokens : int
        Each prompt counts once, however many answers it gets.
    num_choices : int
        Answers a prompt.
    cached : dict
        By prompt, how many of its tokens its first answer found computed.
    """

    prompt_tokens: int
    num_choices: int = 1
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, token: Token) -> None:
        self.completion_tokens += token.token is not None
        prompt, choice = divmod(token.prompt, self.num_choices)
        if choice == 0:
            self.cached[prompt] = token.num_cached

    def to_json(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass
class _Choice:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Reply(ABC):
    """What is said to one request.

    Parameters
    ----------
    model : str
    tokenizer
    num_choices : int
    usage : Usage
        Counted up as tokens come.
    key : str, optional
        The same for the same answer; a random one by default.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    piece_object: ClassVar[str]

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        num_choices: int,
        usage: Usage,
        key: str | None = None,
    ) -> None:
        self.usage = usage
        self._texts = TokenTexts(tokenizer)
        self._choices = [_Choice() for _ in range(num_choices)]
        self._head = {
            "id": f"{self.prefix}-{key or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, tokens: AsyncIterator[Token]) -> bytes:
        """Return the answer as JSON when all of it is there; of many numbers, written in a thread."""
        num_entries = 0
        async for token in tokens:
            self._add(token)
            num_entries += 1 if token.logprobs is None else 2 + len(token.logprobs.top)
        if num_entries <= _FEW_ENTRIES:
            return _ENCODE(self._finished()).encode()
        return await asyncio.to_thread(
            lambda: _in_parts(self._finished(), _DEPTH_OF_TOKENS).encode()
        )

    def _finished(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "finish_reason": choice.finish_reason,
                "logprobs": self._logprobs(choice.tokens, 0),
                **self._whole_text(choice.text),
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._json(self.whole_object, choices, usage=self.usage.to_json())

    async def pieces(
        self, tokens: AsyncIterator[Token], *, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Yield server-sent events. After an error there is no ``[DONE]``."""
        nothing_yet: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            for index in range(len(self._choices)):
                for opening in self._opening():
                    choice = {"index": index, "finish_reason": None, "logprobs": None, **opening}
                    yield _event(self._json(self.piece_object, [choice], **nothing_yet))
            async for token in tokens:
                offset = len(self._choices[token.prompt].text)
                self._add(token)
                choice = {
                    "index": token.prompt,
                    "finish_reason": token.finish_reason,
                    "logprobs": self._logprobs([token], offset),
                    **self._piece_text(token.text),
                }
                if token.text or token.finish_reason or token.logprobs:
                    yield _event(self._json(self.piece_object, [choice], **nothing_yet))
        except Exception as error:
            # The status has been sent: the error is an event.
            yield _event(as_api_error(error).body)
            return
        if include_usage:
            yield _event(self._json(self.piece_object, [], usage=self.usage.to_json()))
        yield _DONE

    def _add(self, token: Token) -> None:
        choice = self._choices[token.prompt]
        choice.text += token.text
        choice.tokens.append(token)
        choice.finish_reason = token.finish_reason
        self.usage.add(token)

    def _json(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **more}

    @abstractmethod
    def _opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    @abstractmethod
    def _whole_text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _piece_text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """Return log-probabilities of tokens whose text begins at an offset; None if not wanted."""


class CompletionReply(Reply):
    """To POST /v1/completions."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def _opening(self) -> list[dict[str, Any]]:
        return []

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        found: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            if token.token is None or token.logprobs is None:
                return None
            found["tokens"].append(self._texts[token.token])
            found["token_logprobs"].append(_number(token.logprobs.chosen))
            top = {self._texts[t]: _number(value) for t, value in token.logprobs.top}
            found["top_logprobs"].append(top)
            found["text_offset"].append(offset)
            offset += len(token.text)
        return found


class ChatReply(Reply):
    """To POST /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def _opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        found = []
        for token in tokens:
            if token.token is None or token.logprobs is None:
                return None
            top = [self._entry(t, value) for t, value in token.logprobs.top]
            found.append({**self._entry(token.token, token.logprobs.chosen), "top_logprobs": top})
        return {"content": found, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts[token]
        # A token may be a part of a character; then its text isn't its bytes.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _number(logprob), "bytes": data}


def _number(logprob: float) -> float:
    """Return a log-probability as JSON can say it, also one that is no number."""
    return max(_LEAST_LOGPROB, logprob)


def _in_parts(value: Any, depth: int) -> str:
    """Return JSON, written one part after the other down to a depth.

    Python writes all of a value in one call, in which no other thread runs.
    """
    if depth and isinstance(value, dict):
        pairs = (f"{_ENCODE(name)}:{_in_parts(part, depth - 1)}" for name, part in value.items())
        return f"{{{','.join(pairs)}}}"
    if depth and isinstance(value, list):
        return f"[{','.join(_in_parts(part, depth - 1) for part in value)}]"
    return _ENCODE(value)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
