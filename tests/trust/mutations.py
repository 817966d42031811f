"""Hostile variants of what a parser reads: documents with a value or two changed, and broken bytes."""

from __future__ import annotations

import json
import marshal
import random
from typing import Any

_DEEP: list[Any] = []
for _ in range(80):
    _DEEP = [_DEEP]
_INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    64,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63,
    2**64,
    10**30,
]
VALUES: list[Any] = [
    None,
    True,
    False,
    *_INTEGERS,
    *(-number for number in _INTEGERS),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 300,
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "\ud800",
    "0",
    "-1",
    "float32",
    "bfloat16",
    "float8_e5m2",
    "bool",
    "object",
    "O",
    "|S0",
    "V8",
    "<f4",
    ">f8",
    "f4,f4",
    "<M8[s]",
    [],
    {},
    [[]],
    [-1, -4],
    [-2, -2],
    [0],
    [2**40, 2**40],
    [1] * 70,
    {"a": {}},
    {"name": "numcodecs.pickle", "configuration": {}},
    _DEEP,
]
_TEXTS = [
    b"",
    b"null",
    b"NaN",
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b'{"a":' + b"9" * 5000 + b"}",
    b"[" + b"[]," * 50_000 + b"[]]",
    b'"' * 9999,
    b"\xff\xfe[\x00]\x00",
    b"\x80\x04\x95",
]
_Place = tuple[Any, Any]


def copied(value: Any) -> Any:
    return marshal.loads(marshal.dumps(value))


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a copy of a document with one to three of its values changed."""
    root = [copied(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(root)
        container, key = rng.choice(places)
        _change(container, key, places, rng)
    return root[0]


def document(value: Any, rng: random.Random) -> bytes:
    """Return a mutated document's text, which now and then is none."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(_TEXTS)
    if kind < 0.04:
        return rng.randbytes(rng.randrange(200))
    text = json.dumps(mutated(value, rng) if kind < 0.9 else value).encode()
    return broken(text, rng) if kind > 0.8 else text


def broken(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some changed, cut off, put in or taken out."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = rng.choice((0, 1, 2, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            number = rng.choice(_INTEGERS[:14]) * rng.choice((1, -1))
            found[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            del found[at : at + rng.randrange(1, 9)]
        else:
            found[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


def _places(root: list[Any]) -> list[_Place]:
    """Every value of a document, as where it is."""
    found: list[_Place] = []
    waiting: list[Any] = [root]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def _change(container: Any, key: Any, places: list[_Place], rng: random.Random) -> None:
    value = container[key]
    kind = rng.randrange(10)
    if isinstance(value, (bytes, bytearray)) and kind < 8:
        container[key] = broken(bytes(value), rng)
    elif kind < 4:
        container[key] = copied(rng.choice(VALUES))
    elif kind == 4:
        other, other_key = rng.choice(places)
        if other_key in other if isinstance(other, dict) else other_key < len(other):
            container[key] = copied(other[other_key])
    elif kind == 5 and isinstance(container, dict):
        del container[key]
        if rng.random() < 0.5:
            container[str(key) + "x"] = value
    elif kind == 5:
        container.insert(key, copied(value))
    elif kind == 6 and isinstance(container, list):
        container.append(copied(value))
    elif isinstance(value, int):
        container[key] = rng.choice((value + 1, value - 1, -value, 2 * value, value + 2**32))
    elif isinstance(value, str) and value:
        container[key] = broken(value.encode(errors="replace"), rng).decode(errors="replace")
    else:
        container[key] = [value]
