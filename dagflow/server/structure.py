"""How much JSON a body holds, known before it is parsed.

A parser takes all of a text in one call, in which no other thread runs: a body of 10 MB of small parts
would stop every stream for seconds. What is counted here is counted piece by piece.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dagflow.server.errors import ApiError

_PIECE_BYTES = 2**16
_OBJECT = re.compile(rb"[ \t\r\n]*\{")


@dataclass(frozen=True)
class Limits:
    """How much of it there may be.

    Attributes
    ----------
    num_containers : int
        Lists and objects. Validating one takes some ten microseconds.
    num_strings : int
        Names of options among them.
    num_values : int
        In lists and objects; a prompt may be a list of as many tokens as the model reads.
    """

    num_containers: int = 4096
    num_strings: int = 2**15
    num_values: int = 2**16


def check_structure(text: bytes | bytearray, limits: Limits, option: str) -> None:
    """Refuse JSON that holds more than it may; for one that is none, a parser finds that soon.

    Parameters
    ----------
    option : str
        The one that may be long, to be named.

    Raises
    ------
    ApiError
        400.
    """
    if not _OBJECT.match(text):
        raise ApiError(400, "The body is no JSON object.", "invalid_json")
    num_containers = num_quotes = num_values = 0
    begin, is_inside = 0, 0
    while begin < len(text):
        piece, begin = _piece(text, begin)
        # Escaped backslashes first: one that is left before a quote makes it a part of the string.
        plain = piece.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in piece else piece
        num_quotes += plain.count(b'"')
        if num_quotes > 2 * limits.num_strings:
            raise _too_much(limits.num_strings, "strings", option)
        parts = plain.split(b'"')
        outside = b"".join(parts[is_inside::2])
        is_inside = (is_inside + len(parts) - 1) % 2
        num_containers += outside.count(b"[") + outside.count(b"{")
        if num_containers > limits.num_containers:
            raise _too_much(limits.num_containers, "lists and objects", option)
        num_values += outside.count(b",")
        if num_values > limits.num_values:
            raise _too_much(limits.num_values, "values", option)


def _piece(text: bytes | bytearray, begin: int) -> tuple[bytes, int]:
    """Return a piece that doesn't end between a backslash and what it escapes, and where it ends."""
    end = min(begin + _PIECE_BYTES, len(text))
    piece = bytes(text[begin:end])
    num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
    if num_backslashes % 2 and end < len(text):
        return piece[:-1], end - 1
    return piece, end


def _too_much(most: int, of_what: str, option: str) -> ApiError:
    message = f"The body holds more than {most} {of_what}: shorten {option}, or send it in parts."
    return ApiError(400, message, "invalid_value", option)
