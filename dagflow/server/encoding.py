"""From text to tokens, no further than the model could read."""

from __future__ import annotations

from typing import Any

from dagflow.models.tokenizing import encode_text

_FIRST_CHARACTERS = 2**16
# Tokens at the end of a part may be others than those of the whole.
_UNCERTAIN = 64


def encode(tokenizer: Any, text: str, limit: int | None, **options: Any) -> list[int]:
    """Return a text's tokens; of a text with more than `limit`, only more than that.

    A text of 10 MB would take a minute and gigabytes, to be refused.
    """
    size = max(_FIRST_CHARACTERS, 4 * limit) if limit is not None else len(text)
    while True:
        tokens = encode_text(tokenizer, text[:size], **options)
        if size >= len(text) or (limit is not None and len(tokens) > limit + _UNCERTAIN):
            return tokens
        size *= 4
