"""JSON from others: how large, how deep and of how many values is known before it is parsed.

Python's own parser takes a text's word for everything: nesting as deep as its stack, numbers as long
as the text, and a hundred bytes of memory for each two bytes of ``[[],[],[]``.
"""

import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# An unsigned integer of 128 bits has 39, the longest float that Python writes 17.
_MOST_DIGITS = 40
_LONG_NUMBER = re.compile(rb"(?<!\d)\d{%d}" % (_MOST_DIGITS + 1))
_LARGE_EXPONENT = re.compile(rb"[eE]\+?\d{3}")
# An escaped pair of surrogates is a character, a single one is none and can't be encoded.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# In signed bytes: an opening bracket goes one deeper, a closing one comes back.
_STEPS = bytes.maketrans(b"[{]}", bytes([1, 1, 255, 255]))
_BUT_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


class JsonRefused(ValueError):
    """A text isn't JSON, or more of it than is taken. Who parses it raises an error of the tree."""


@dataclass(frozen=True)
class JsonLimits:
    """How much JSON is taken.

    Attributes
    ----------
    num_bytes
        Of the text.
    depth
        Arrays and objects inside each other.
    num_values
        Numbers, strings, arrays, objects and so on, keys aside. Each takes up to about 100 bytes of
        memory, whatever it takes in the text.
    """

    num_bytes: int = 256 * 2**20
    depth: int = 64
    num_values: int = 10_000_000


DOCUMENT_LIMITS = JsonLimits()
"""Of what lies in a run's store: a manifest of a million tensors is below."""


def parse_json(
    data: bytes | str, limits: JsonLimits = DOCUMENT_LIMITS, *, finite: bool = True
) -> Any:
    """What a text in UTF-8 says.

    Costs about what `json.loads` does on top of it, and no more memory than the values it may hold.

    Parameters
    ----------
    finite
        False also takes NaN and infinities, as `json.dumps` writes them.

    Raises
    ------
    JsonRefused
        If it is no JSON, exceeds a limit, names a key of an object twice, or has a number of more
        than 40 digits in a row, or text that isn't Unicode (half of a surrogate pair).
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        outside = _outside_of_strings(data, limits)
        value = json.loads(
            data.decode(),
            object_pairs_hook=_distinct,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite if finite and _LARGE_EXPONENT.search(outside) else None,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except JsonRefused:
        raise
    except ValueError as error:
        raise JsonRefused(f"it is no JSON: {error}") from error
    return value


def load_json(path: Path, limits: JsonLimits = DOCUMENT_LIMITS, *, finite: bool = True) -> Any:
    """What a file says, whose size is looked at before it is read.

    Raises
    ------
    JsonRefused
        As for `parse_json`.
    OSError
        If it can't be read, or is no file.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "this is no file", str(path))
    if size > limits.num_bytes:
        raise JsonRefused(f"it has {size} bytes, more than {limits.num_bytes} aren't read")
    return parse_json(path.read_bytes(), limits, finite=finite)


def _outside_of_strings(data: bytes, limits: JsonLimits) -> bytes:
    """Check a text's limits; return it without its strings."""
    if len(data) > limits.num_bytes:
        raise JsonRefused(f"it has {len(data)} bytes, more than {limits.num_bytes} aren't read")
    # Escaped backslashes first: what is left before a quote escapes it.
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in data else data
    # Two quotes a string, and a key to each value; it also bounds the list below.
    if plain.count(b'"') > 4 * (limits.num_values + 1):
        raise JsonRefused(f"it holds more than {limits.num_values} values")
    outside = b"".join(plain.split(b'"')[::2])
    num_open = outside.count(b"[") + outside.count(b"{")
    if num_open + outside.count(b",") > limits.num_values:
        raise JsonRefused(f"it holds more than {limits.num_values} values")
    if num_open > limits.depth:
        steps = np.frombuffer(outside.translate(_STEPS, _BUT_BRACKETS), np.int8)
        if int(steps.cumsum(dtype=np.int32).max()) > limits.depth:
            raise JsonRefused(f"it is nested more than {limits.depth} deep")
    if _LONG_NUMBER.search(outside):
        raise JsonRefused(f"it has a number of more than {_MOST_DIGITS} digits")
    return outside


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonRefused(f"it names {name[:100]!r} twice in one object")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> Any:
    raise JsonRefused(f"it holds {name}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise JsonRefused(f"it holds {text}, which no float can be")
    return number
