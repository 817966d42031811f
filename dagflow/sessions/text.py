"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns tokens into text piece by piece; a character may take several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Decoded together with what follows: a tokenizer may join words differently at the start.
        self._context, self._told = 0, 0

    def add(self, token: int) -> str:
        """Return the text that is certain now."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._told])
        after = self._decode(self._tokens[self._context :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._told = self._told, len(self._tokens)
        return after[len(before) :]

    def rest(self) -> str:
        """Return what was held back, at the end."""
        before = self._decode(self._tokens[self._context : self._told])
        after = self._decode(self._tokens[self._context :])
        self._context = self._told = len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopStrings:
    """Lets text through until one of some strings appears; holds back what may be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that may be told, and whether a stop string ended it."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            found, self._held = self._held[: min(places)], ""
            return found, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        found, self._held = self._held[:split], self._held[split:]
        return found, False

    def rest(self) -> str:
        """Return what was held back, at the end."""
        found, self._held = self._held, ""
        return found


def _overlap(text: str, stop: str) -> int:
    """Return how much of a stop string's beginning a text ends with.

    >>> _overlap("to be cont", "continued")
    4
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
