"""Requests as an attacker writes them: valid ones in which something is changed, and what is none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

MODEL = "tiny"
KEYS = ("first key", "second")
_PATHS = ("/v1/completions", "/v1/chat/completions")
_HUGE = int("9" * 4000)
# What options are given in place of what they take.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, _HUGE, -_HUGE),
    *(1e-40, 5e-324, -0.0, 1e300, 0.5, 2.0, 1e-300),
    *("", "a", "\x00", "火" * 50, "9" * 5000, "a" * 20_000, "'; DROP TABLE", "{{ 7 * 7 }}"),
    *([], [[]], [[[]]], [1], [1, "a"], [-1], [_HUGE], [True], [{}], [""] * 20, [1] * 5000),
    *({}, {"a": 1}, {"": {}}, {"-1": 1}, {"9" * 5000: 1}, {"1": -100}, {"type": "text"}),
)
_OPTIONS = (
    *("model", "prompt", "messages", "n", "stop", "stream", "stream_options", "max_tokens", "seed"),
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "user"),
    *("metadata", "tools", "response_format", "best_of", "echo", "suffix", "unknown", "__class__"),
)
_TEXTS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"1e-999",
    b"0x1",
    b"01",
    b"\\ud800",
    b"\xff",
)
_HOSTS = ("evil.example", "localhost.evil.example", "[", "localhost:99999999", "", "a b", "\xff")
_ORIGINS = ("http://evil.example", "null", "http://localhost:1", "file://", "\xff", "x" * 500)
_KINDS = ("text/plain", "", "multipart/form-data; boundary=x", "application/json; charset=utf-16")
_AUTHORIZATIONS = (
    "",
    "Bearer",
    "Bearer wrong",
    "Basic Zmlyc3Qga2V5",
    "Bearer " + "x" * 5000,
    "\xff",
)
_METHODS = (
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "BREW",
    "x" * 99,
)
_OTHER_PATHS = (
    *("/", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/models/../../etc/passwd"),
    *(
        "/v1/models/%2e%2e%2f",
        "/%ff%00",
        "//",
        "/v1/",
        "*",
        "http://evil/",
        "/docs",
        "/openapi.json",
    ),
    *("/" + "a" * 9000, "/v1/completions/", "/static/../page.html", "/v1/models?" + "a=1&" * 500),
)


@dataclass(frozen=True)
class Attack:
    """What is sent on one connection.

    Attributes
    ----------
    kind : str
    pieces : tuple of bytes
        With a pause after each but the last.
    is_whole : bool
        Whether an answer must come: what was sent is a request, or so wrong that it can't become one.
    """

    kind: str
    pieces: tuple[bytes, ...]
    is_whole: bool = True


def attack(chance: random.Random) -> Attack:
    """Return an attack of some kind; most are requests with a right key and a wrong body."""
    kinds = tuple(_KINDS_OF_ATTACKS)
    weights = tuple(_KINDS_OF_ATTACKS[kind] for kind in kinds)
    return chance.choices(kinds, weights)[0](chance)


def valid_body(chance: random.Random, path: str) -> dict[str, Any]:
    """Return a body that is answered, soon."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": chance.randint(1, 3)}
    if path == _PATHS[0]:
        body["prompt"] = "A machine leaves."[: chance.randint(1, 17)]
    else:
        content: Any = chance.choice(["Which machine?", [{"type": "text", "text": "Which?"}]])
        body["messages"] = [{"role": "user", "content": content}]
    return body


def request(
    chance: random.Random, path: str, body: bytes, method: str = "POST", **changed: str | None
) -> bytes:
    """Return a request with a right key; headers may be changed, or None for left out."""
    headers = {
        "Host": "localhost",
        "Authorization": f"Bearer {chance.choice(KEYS)}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("latin-1") + body


def _wrong_options(chance: random.Random) -> Attack:
    path = chance.choice(_PATHS)
    body = valid_body(chance, path)
    for _ in range(chance.randint(1, 3)):
        place: Any = body
        while chance.random() < 0.4:  # deeper
            inside = [v for v in _items(place) if isinstance(v, dict | list) and v]
            if not inside:
                break
            place = chance.choice(inside)
        value = deepcopy(chance.choice(_VALUES))
        if isinstance(place, list):
            place[chance.randrange(len(place))] = value
        else:
            place[chance.choice([*_OPTIONS, *place])] = value
    if body.get("max_tokens") != 0 and chance.random() < 0.9:
        body["logit_bias"] = body.get("logit_bias") or {"0": 100}  # the answer ends at once
    return Attack("options", (request(chance, path, json.dumps(body).encode()),))


def _items(place: Any) -> list[Any]:
    return list(place.values()) if isinstance(place, dict) else list(place)


def _wrong_bytes(chance: random.Random) -> Attack:
    path = chance.choice(_PATHS)
    body = bytearray(json.dumps({**valid_body(chance, path), "temperature": 0.7}).encode())
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(body))
        end = begin + chance.choice((0, 1, 1, 5))
        junk = (chance.randbytes(chance.randint(0, 3)), *_TEXTS, b"[" * 300, b'{"a":' * 300)
        body[begin:end] = chance.choice(junk)
    return Attack("bytes", (request(chance, path, bytes(body)),))


def _valid(chance: random.Random) -> Attack:
    path = chance.choice(_PATHS)
    body = {**valid_body(chance, path), "stream": chance.random() < 0.3}
    return Attack("valid", (request(chance, path, json.dumps(body).encode()),))


def _wrong_headers(chance: random.Random) -> Attack:
    path = chance.choice(_PATHS)
    body = json.dumps(valid_body(chance, path)).encode()
    name, values = chance.choice(
        (
            ("Host", _HOSTS),
            ("Origin", _ORIGINS),
            ("Content-Type", _KINDS),
            ("Authorization", _AUTHORIZATIONS),
            ("Content-Length", ("9" * 5000, "-1", "1e3", "99999999", "0", "5, 6")),
            ("Idempotency-Key", ("", "x" * 300, "\xff", "a")),
            ("Transfer-Encoding", ("chunked", "gzip", "chunked, chunked", "\x0b")),
            ("Expect", ("100-continue", "x")),
            ("Upgrade", ("websocket", "h2c")),
            ("X" * 300, ("x" * 20_000, "\x00", "a\rb")),
        )
    )
    changed: dict[str, str | None] = {name: chance.choice(values)}
    if name == "Upgrade":
        changed["Connection"] = "Upgrade"
    if name == "Transfer-Encoding":
        changed["Content-Length"] = None
    sent = request(chance, path, body, **changed)
    # What says that more follows is waited for.
    waits = name in ("Content-Length", "Transfer-Encoding", "Expect")
    return Attack("headers", (sent,), is_whole=not waits)


def _elsewhere(chance: random.Random) -> Attack:
    method, path = chance.choice(_METHODS), chance.choice(_OTHER_PATHS)
    return Attack("elsewhere", (request(chance, path, b"", method),))


def _no_http(chance: random.Random) -> Attack:
    lines = (
        chance.randbytes(chance.randint(1, 300)) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 5000,
        b"POST /v1/completions HTTP/1.1\r\n" + b"x" * 100_000,
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\r\n" * 200 + b"\x00\r\n\r\n",
    )
    return Attack("no http", (chance.choice(lines),))


def _bad_chunks(chance: random.Random) -> Attack:
    chunk = chance.choice(
        (b"zz\r\n", b"-1\r\n", b"f" * 30 + b"\r\n", b"5;" + b"x" * 50_000, b"\x00\r\n")
    )
    head = request(chance, _PATHS[0], b"", Content_Length=None, Transfer_Encoding="chunked")
    return Attack("chunks", (head, b'5\r\n{"mod\r\n', chunk))


def _cut_off(chance: random.Random) -> Attack:
    """A client that leaves in the middle."""
    sent = _valid(chance).pieces[0]
    return Attack("cut off", (sent[: chance.randrange(1, len(sent))],), is_whole=False)


def _pieces(chance: random.Random) -> Attack:
    sent = _wrong_options(chance).pieces[0]
    cut = sorted(chance.randrange(len(sent)) for _ in range(3))
    pieces = [sent[a:b] for a, b in zip([0, *cut], [*cut, len(sent)], strict=True)]
    return Attack("pieces", tuple(pieces))


def _many_parts(chance: random.Random) -> Attack:
    """A megabyte, seldom ten, of what takes long to look at."""
    size = chance.choice((1,) * 9 + (10,)) * 1_000_000
    path = chance.choice(_PATHS)
    opening, part = chance.choice(
        (
            (b'{"model":"tiny","prompt":[', b"1,"),
            (b'{"model":"tiny","prompt":[', b"[],"),
            (b'{"model":"tiny","prompt":"', b'\\"'),
            (b'{"model":"tiny","prompt":"', b"a machine. "),
            (b'{"model":"tiny","messages":[', b'{"role":"user","content":""},'),
            (
                b'{"model":"tiny","messages":[{"role":"user","content":[',
                b'{"type":"text","text":""},',
            ),
            (b'{"model":"tiny","logit_bias":{', b'"1":1,'),
            (b"", b"["),
        )
    )
    return Attack("parts", (request(chance, path, opening + part * (size // len(part))),))


# How often, in proportion.
_KINDS_OF_ATTACKS: dict[Callable[[random.Random], Attack], float] = {
    _wrong_options: 35,
    _wrong_bytes: 20,
    _wrong_headers: 15,
    _elsewhere: 10,
    _no_http: 6,
    _bad_chunks: 3,
    _cut_off: 4,
    _pieces: 2,
    _valid: 5,
    _many_parts: 0.3,
}
