"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
# A character has at most four bytes: the last three may belong to one that isn't complete.
_MOST_UNFINISHED = 3
_CONTEXT = 8


class Detokenizer:
    """Turns tokens into text piece by piece; a character may take several tokens.

    Tokens are decoded with those before them, the prompt's to begin with: what a token says depends on
    its place (SentencePiece's first word of a text has no space before it). The window of tokens that
    are decoded together is short, so a token costs the same wherever it is. What isn't a character
    (bytes that are no UTF-8) is told as U+FFFD, as soon as nothing that follows can complete it; or
    not at all, if the tokenizer is one that leaves it out.

    `tokenizers.decoders.DecodeStream` isn't used: it takes tokenizers of its own library only, holds
    a run of broken bytes back for as long as it lasts, decoding all of it with every token, and fails
    where a token changes the text before it.

    Parameters
    ----------
    tokenizer
        Of transformers, fast or not.
    before : sequence of int
        The tokens that those to come follow on.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window, self._text = self._context(before)
        self._told = len(self._text)
        # What follows the last complete character: tokens, and how much of their text was told.
        self._fresh, self._fresh_told = len(self._window), 0

    def add(self, token: int) -> str:
        """Return the text that is certain now."""
        self._window.append(token)
        before, self._text = self._text, self._decode(self._window)
        if self._text == before and self._is_special(token):
            self._window.pop()
            return ""
        if self._text[: self._told] != before[: self._told]:
            self._begin_again()
        found = self._tell(len(self._text) - self._num_unfinished())
        if self._told == len(self._text):
            self._fresh, self._fresh_told = len(self._window), 0
        if len(self._window) > 2 * _CONTEXT:
            self._shorten()
        return found

    def rest(self) -> str:
        """Return what was held back, at the end."""
        return self._tell(len(self._text))

    def _context(self, before: Sequence[int]) -> tuple[list[int], str]:
        """Return the last tokens of a prompt, and their text, from a character's first byte on."""
        windows = [list(before[-count:]) for count in range(_CONTEXT, _MOST_UNFINISHED, -1)]
        try:
            texts = [self._decode(window) if window else "" for window in windows]
        except (IndexError, TypeError, OverflowError):
            # Prompts of token ids may hold some that the model knows, and its tokenizer doesn't.
            return [], ""
        pairs = list(zip(windows, texts, strict=True))
        return next((p for p in pairs if not p[1].startswith(_UNFINISHED)), pairs[0])

    def _tell(self, end: int) -> str:
        found = self._text[self._told : end]
        self._told = max(self._told, end)
        self._fresh_told += len(found)
        return found

    def _num_unfinished(self) -> int:
        kept = len(self._text.rstrip(_UNFINISHED))
        return min(len(self._text) - kept, _MOST_UNFINISHED)

    def _begin_again(self) -> None:
        """Leave out tokens whose text is another with those behind them; it has been told.

        A run of byte tokens is decoded whole by some tokenizers, and one broken byte breaks all.
        """
        self._window = self._window[self._fresh :]
        self._text = self._decode(self._window)
        self._told = min(self._fresh_told, max(0, len(self._text) - 1))
        self._fresh = 0

    def _shorten(self) -> None:
        """Leave out the window's first tokens, if the text at its end stays the same without them.

        A window that has grown long all the same (its tokens say nothing) is cut in any case.
        """
        window = self._window[-_CONTEXT:]
        text = self._decode(window)
        held = self._text[self._told :]
        told = len(text) - len(held)
        is_same = told > 0 and text[told:] == held
        if is_same or len(self._window) > 4 * _CONTEXT:
            told = max(0, told)
            left_out = len(self._window) - len(window)
            self._window, self._text, self._told = window, text, told
            self._fresh = max(0, self._fresh - left_out)

    def _is_special(self, token: int) -> bool:
        """Tell whether a token is left out of texts, whatever is around it."""
        return not self._decode([token]) and bool(self._tokenizer.decode([token]))

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class TokenTexts:
    """What single tokens say in the middle of a text, spaces before them and all."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] | None = None
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._told(token)
        return self._known[token]

    def _told(self, token: int) -> str:
        if self._before is None:
            self._before = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        text = self._tokenizer.decode(self._before) if self._before else ""
        both: str = self._tokenizer.decode([*self._before, token])
        return both[len(text) :] if both.startswith(text) else self._tokenizer.decode([token])


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
