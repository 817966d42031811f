"""What strangers, web pages and clients with a key can do to a server, and can't."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from hashlib import sha256
from typing import Any

import httpx
import psutil
import pytest
import torch
from click.testing import CliRunner
from door import KEYS, SHORT, Door, Impatient, answer, head, opened
from hostile_requests import attack_all
from local import wait_until

from dagflow.cli import main
from dagflow.errors import DagflowError, SettingsInvalid
from dagflow.server import protocol
from dagflow.server.app import make_app
from dagflow.server.bodies import ChatBody, CompletionBody, parse
from dagflow.server.errors import ApiError
from dagflow.server.gate import known_hosts
from dagflow.server.keys import Keys
from dagflow.server.replies import CompletionReply, Usage
from dagflow.server.serve import listen
from dagflow.server.service import ServerSettings, Service
from dagflow.serving.answers import Logprobs, Token

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with opened(tmp_path_factory.mktemp("door")) as found:
        yield found


def code_of(response: httpx.Response) -> Any:
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error["code"]


# Keys


def test_another_keys_prompt_can_not_be_told_from_what_nobody_asked(door: Door) -> None:
    secret = {**SHORT, "prompt": "The password of the third volunteer is 38 characters long"}

    def cached(key: str) -> int:
        usage = door.ask(key=key, body=secret).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    hits = door.service.deployment.caches.num_hits
    assert [cached(KEYS[0]), cached(KEYS[1])] == [0, 0]
    assert door.service.deployment.caches.num_hits == hits
    assert cached(KEYS[0]) == cached(KEYS[1]) > 16


def test_whoever_asks_from_python_is_one_of_several_owners(door: Door) -> None:
    deployment = door.service.deployment
    options = {"max_new_tokens": 1, "speculate": False}

    def cached(owner: str) -> int:
        request = deployment.request("What somebody says is theirs alone.", owner=owner, **options)
        return next(iter(deployment.stream([request]))).num_cached

    assert [cached("a"), cached("b"), cached("a") > 0, cached("")] == [0, 0, True, 0]


def test_keys_are_shown_nowhere(door: Door) -> None:
    settings = ServerSettings(("a secret",))
    assert "secret" not in repr(settings)
    assert "secret" not in repr(vars(Keys(settings.api_keys)))
    assert KEYS[0] not in repr(door.service)
    for key in (f"{KEYS[0]}x", KEYS[0][:-1], "", "ключ", "x" * 10_000):
        with door.connect() as client:
            client.sendall(head(length=2, Authorization=f"Bearer {key}", key=None) + b"{}")
            status, found = answer(client)
        assert (status, found["error"]["code"]) == (401, "invalid_api_key")
        assert not key or key not in found["error"]["message"]


@pytest.mark.parametrize("keys", [("",), ("a", " ")])
def test_an_empty_key_is_no_key(keys: tuple[str, ...]) -> None:
    with pytest.raises(SettingsInvalid, match="is empty"):
        Keys(keys)


# Before a body is read


def test_bodies_that_nobody_may_send_are_kept_by_nobody(door: Door) -> None:
    process, length = psutil.Process(), 9 * MEGABYTE
    before = process.memory_info().rss
    with ExitStack() as stack:
        clients = [stack.enter_context(door.connect()) for _ in range(80)]
        for client in clients:
            client.sendall(head(key="wrong", length=length) + b" " * (MEGABYTE // 4))
        assert {answer(client)[0] for client in clients} == {401}
        assert door.service.bodies.taken_bytes == 0
        assert process.memory_info().rss - before < 100 * MEGABYTE
        assert door.is_well()


def test_unfinished_bodies_share_a_budget_and_hold_up_no_short_ones(door: Door) -> None:
    budget = door.service.bodies
    with ExitStack() as stack:
        clients = [stack.enter_context(door.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(head(length=9 * MEGABYTE) + b'{"model":')
        wait_until(lambda: budget.taken_bytes > 60 * MEGABYTE, "the budget is taken")
        refused = door.ask(body={**SHORT, "prompt": "A" * 8 * MEGABYTE})
        assert (refused.status_code, code_of(refused)) == (429, "too_many_bytes")
        assert int(refused.headers["Retry-After"]) >= 1
        assert door.ask().status_code == 200
        statuses = sorted(answer(client)[0] for client in clients)
    # Those that were let in have run out of time.
    assert statuses == [408] * statuses.count(408) + [429] * statuses.count(429)
    assert statuses.count(408) == 7
    assert budget.taken_bytes == 0


def test_a_body_that_comes_byte_by_byte_is_given_up(door: Door) -> None:
    begin = time.monotonic()
    with door.connect() as client:
        client.sendall(head(length=1000))
        client.settimeout(0.1)
        status = None
        while status is None:
            assert time.monotonic() - begin < 30
            client.send(b" ")
            try:
                status = client.recv(12)
            except TimeoutError:
                continue
    assert status == b"HTTP/1.1 408"


def test_a_chunked_body_is_no_longer_than_another(door: Door) -> None:
    chunked = head().replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with door.connect() as client:
        client.sendall(chunked)
        for _ in range(11):
            client.sendall(b"%x\r\n" % MEGABYTE + b" " * MEGABYTE + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        status, found = answer(client)
    assert (status, found["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "json"])
def test_what_does_not_say_that_it_is_json_is_not_read(door: Door, kind: str) -> None:
    response = door.ask(content_type=kind)
    assert (response.status_code, code_of(response)) == (415, "unsupported_media_type")
    assert door.ask(content_type="Application/JSON; charset=utf-8").status_code == 200


# Names and origins


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "[::1",
        "localhost:x",
        "a b",
        "user@localhost",
    ],
)
def test_a_server_on_loopback_goes_by_no_other_name(door: Door, host: str) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models", "/nothing"):
        response = door.get(path, host=host.format(port=door.port))
        assert (response.status_code, code_of(response)) == (421, "unknown_host")
    assert "--allow-host" in response.text


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]", "[::1]:9"]
)
def test_a_server_on_loopback_goes_by_its_names(door: Door, host: str) -> None:
    assert door.get("/health", host=host.format(port=door.port)).status_code == 200


def test_names_are_allowed_by_option() -> None:
    with listen("localhost", 0) as here, listen("0.0.0.0", 0) as there:
        assert known_hosts("0.0.0.0", there, ()) is None
        assert known_hosts("localhost", here, ("*",)) is None
        assert "a.example" in (known_hosts("localhost", here, ("A.example",)) or ())
        found = known_hosts("0.0.0.0", there, ("a.example",))
        assert found is not None
        assert {"a.example", "localhost"} <= found


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:1",
        "null",
        "http://localhost.evil.example",
        "file://",
        "localhost",
    ],
)
def test_a_page_of_another_origin_gets_nothing(door: Door, origin: str) -> None:
    for response in (door.ask(origin=origin, host="localhost"), door.get("/health", origin=origin)):
        assert (response.status_code, code_of(response)) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_page_may_ask(door: Door) -> None:
    for host in (f"localhost:{door.port}", f"127.0.0.1:{door.port}"):
        assert door.ask(origin=f"http://{host}", host=host).status_code == 200
    assert door.ask(origin="http://localhost", host="localhost:80").status_code == 200


def test_pages_of_friends_may_ask_and_no_others(door: Door) -> None:
    friend = "https://friend.example"
    settings = ServerSettings(allow_origins=(friend,))
    app = make_app(Service(door.service.deployment, "tiny", settings))

    async def ask(method: str, origin: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            return await client.request(method, "/v1/models", headers=headers)

    for method in ("GET", "OPTIONS"):
        found = asyncio.run(ask(method, friend))
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == friend
        assert asyncio.run(ask(method, "https://evil.example")).status_code == 403


def test_the_page_runs_its_own_script_and_is_in_no_frame(door: Door) -> None:
    response = door.get("/")
    rules = dict(
        rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
    )
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    for element in ("script", "style"):
        (inside,) = re.findall(rf"<{element}>(.*)</{element}>", response.text, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert rules[f"{element}-src"] == f"'sha256-{digest}'"
    assert response.headers["referrer-policy"] == "no-referrer"
    for path in ("/", "/health", "/v1/models"):
        assert door.get(path).headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["example.org", "https://", "https://a.example/page", "* "])
def test_what_is_no_origin_is_said_so(origin: str) -> None:
    found = CliRunner().invoke(main, ["serve", "--model", "tiny", "--allow-origin", origin])
    assert found.exit_code == 2
    assert "no origin, such as https://example.org" in found.output


# What is in a body


def tiny_parts() -> bytes:
    part = b'{"type":"text","text":""},'
    return (
        b'{"model":"tiny","messages":[{"role":"user","content":['
        + part * (10 * MEGABYTE // len(part) - 10)
        + part[:-1]
        + b"]}]}"
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, tiny_parts()),
        (ChatBody, b'{"model":"tiny","messages":[' + b'{"role":"user","content":""},' * 300_000),
        (CompletionBody, b'{"model":"tiny","prompt":[' + b"[1]," * 2_500_000),
        (CompletionBody, b'{"model":"tiny","stop":[' + b'"",' * 3_000_000),
        (CompletionBody, b'{"model":"tiny","prompt":"a","logit_bias":{' + b'"1":1,' * 1_500_000),
        (CompletionBody, b'{"model":"tiny","metadata":{' + b'"a":{},' * 1_000_000),
        (CompletionBody, b'{"model":"tiny","prompt":[' + b"1," * 5_000_000),
    ],
    ids=["parts", "messages", "prompts", "stops", "biases", "metadata", "tokens"],
)
def test_a_body_of_many_parts_costs_nothing(kind: Any, body: bytes) -> None:
    begin = time.thread_time()
    with pytest.raises(ApiError, match="holds more than") as caught:
        parse(kind, body)
    assert caught.value.status == 400
    assert caught.value.param == kind.long_option
    assert time.thread_time() - begin < 0.3


def test_a_long_prompt_of_tokens_and_strings_full_of_brackets_are_taken(door: Door) -> None:
    tokens = [7] * 4000
    found = door.ask(body={**SHORT, "prompt": tokens, "max_tokens": 1}).json()
    assert found["usage"]["prompt_tokens"] == 4000
    text = '{["\\' * 30_000
    assert parse(CompletionBody, json.dumps({**SHORT, "prompt": text}).encode()).prompt == text


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_deeply_nested_json_is_refused(door: Door, opening: bytes) -> None:
    for depth in (100, 1000, 100_000):
        for body in (opening * depth, b'{"model":"tiny","prompt":' + opening * depth):
            assert door.ask(body=body).status_code == 400


HUGE = int("9" * 4000)
OPTIONS: list[dict[str, Any]] = [
    *({"temperature": value} for value in (1e-40, 5e-324, 1e-400, -0.0, HUGE, True, "1", [1])),
    *({"top_p": value} for value in (5e-324, 1e-300, 0, -1, 2, HUGE, True)),
    *({"min_p": value} for value in (5e-324, 1, HUGE)),
    *({"repetition_penalty": value} for value in (1e-300, 5e-324, 1e-6, 10, HUGE)),
    *({"frequency_penalty": value} for value in (5e-324, HUGE)),
    *({name: HUGE} for name in ("seed", "n", "top_k", "logprobs")),
    {"max_tokens": HUGE, "logit_bias": {"0": 100}},  # and it ends at once
    *({name: True} for name in ("seed", "n", "max_tokens", "top_k", "logprobs", "prompt")),
    *({name: -1} for name in ("seed", "n", "max_tokens", "top_k", "logprobs", "prompt")),
    *({"logit_bias": {key: 1}} for key in ("9" * 5000, "-1", "1e3", "", " 1", "٣", "0" * 5000)),
    {"logit_bias": {"1": 1e400}},
    {"logit_bias": {str(token): -100 for token in range(300)}, "temperature": 1},
    *({"prompt": prompt} for prompt in ("", [], [""], [[]], [HUGE], [-1], [1.5], "\x00", {}, None)),
    *({"stop": stop} for stop in ("", [], [""], ["a"] * 17, 1, [1], "a" * 1001)),
    {"model": "x" * 10_000},
    {"x" * 10_000: 1},
    {"stream_options": {"x" * 10_000: 1}},
    {"stream": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options)[:40])
def test_every_option_is_answered_or_refused(door: Door, options: dict[str, Any]) -> None:
    response = door.ask(body={**SHORT, **options})
    assert response.status_code in (200, 400, 404), response.text
    assert len(response.content) < 5000


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-", "0x1"]
)
@pytest.mark.parametrize("option", ["temperature", "top_p", "seed", "n", '1"}, "logit_bias": {"1'])
def test_what_is_no_number_of_json_is_refused(door: Door, option: str, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "a", "{option}": {number}}}'.encode()
    assert door.ask(body=body).status_code == 400


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "half \ud800"},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [1.5]},
        {"prompt": ["1"]},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": [10**5000]},
        {"prompt": [[1]]},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": math.nan},
        {"temperature": math.nan},
        {"temperature": 10**5000},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {10**5000: 1}},
        {"logit_bias": {300: 1}},
        {"seed": 10**5000},
        {"logprobs": -1},
        {"logprobs": True},
        {"stop": 5},
        {"temperature": 1e-40, "top_p": 5e-324},
        {"max_new_tokens": 10**5000},
        {"logprobs": 10**30},
    ],
    ids=lambda options: next(iter(options)),
)
def test_from_python_every_option_is_answered_or_refused(
    door: Door, options: dict[str, Any]
) -> None:
    deployment = door.service.deployment
    refused = ""
    try:
        request = deployment.request(**{"prompt": [1] * 4090, "max_new_tokens": 2, **options})
        assert list(deployment.stream([request]))[-1].finish_reason
    except DagflowError as error:
        refused = str(error)
    assert len(refused) < 500


def test_many_log_probabilities_are_told_and_too_many_refused(door: Door) -> None:
    body = {**SHORT, "prompt": [5, 6], "logprobs": 5, "max_tokens": 100, "temperature": 1, "n": 2}
    found = door.ask(body=body).json()
    pieces = [
        json.loads(line.removeprefix("data: "))
        for line in door.ask(body={**body, "stream": True, "seed": 1}).text.split("\n\n")[:-2]
    ]
    assert [len(choice["logprobs"]["top_logprobs"]) for choice in found["choices"]] == [100, 100]
    again = door.ask(body={**body, "seed": 1}).json()  # the same, written in parts
    for index in (0, 1):
        streamed = [c["logprobs"] for p in pieces for c in p["choices"] if c["index"] == index]
        whole = again["choices"][index]["logprobs"]
        assert [t for one in streamed for t in one["tokens"]] == whole["tokens"]
        assert [t for one in streamed for t in one["top_logprobs"]] == whole["top_logprobs"]
    refused = door.ask(body={**body, "n": 16, "max_tokens": 4000})
    assert (refused.status_code, code_of(refused)) == (400, "invalid_value")
    assert refused.json()["error"]["param"] == "logprobs"


def test_a_logit_that_is_no_number_is_told_as_the_least() -> None:
    logits = torch.tensor([math.nan, math.inf, -math.inf, 0.0])

    async def tokens() -> AsyncIterator[Token]:
        yield Token(0, 3, "a", "length", Logprobs.of(logits, 3, 2))

    reply = CompletionReply("tiny", _Nobody(), 1, Usage(1))
    found = json.loads(asyncio.run(reply.whole(tokens())))
    assert found["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


class _Nobody:
    """A tokenizer of no words."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": []}

    def decode(self, tokens: list[int]) -> str:
        return f"<{tokens}>"


# Connections


def test_whoever_waits_for_nothing_makes_room_for_others(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "most_connections", lambda: 20)
    body = json.dumps({**SHORT, "stream": True, "max_tokens": 2000, "temperature": 1.2}).encode()
    with ExitStack() as stack:
        streaming = stack.enter_context(door.connect())
        streaming.sendall(head(length=len(body)) + body)
        assert streaming.recv(12) == b"HTTP/1.1 200"
        idle = [stack.enter_context(door.connect()) for _ in range(60)]
        # Who claims a body and has no key waits for nothing, either.
        for client in idle[::3]:
            client.sendall(head(key=None, length=1000))
        assert door.is_well()
        assert door.ask().status_code == 200
        idle[0].settimeout(10)
        assert is_closed(idle[0])
        assert streaming.recv(1)  # whose request was admitted


def is_closed(client: socket.socket) -> bool:
    """Wait until a connection is closed, whatever was said before."""
    try:
        while client.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "]
)
def test_a_head_that_does_not_come_is_given_up(door: Door, sent: bytes) -> None:
    with door.connect() as client:
        client.sendall(sent)
        assert client.recv(12) == (b"HTTP/1.1 408" if sent else b"")
        assert is_closed(client)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 421),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000, 431),
        (b"GET /" + b"x" * 100_000, 431),
        (head(length="9" * 5000), 400),
        (head(length=-1), 400),
        (head().replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: [\r\n\r\n", 421),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /health/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /%ff%00%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (
            b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIz\r\n\r\n",
            404,
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else value,
)
def test_what_is_no_request_is_refused_in_the_same_form(
    door: Door, sent: bytes, status: int
) -> None:
    with door.connect() as client:
        client.sendall(sent)
        found, body = answer(client)
    assert found == status
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert body["error"]["type"] == "invalid_request_error"


def test_hostile_requests_are_answered_and_streams_go_on(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run of `hostile_requests`, which has the long one."""
    # Its clients have connected and sent nothing when this process waits for a core.
    monkeypatch.setattr(Impatient, "head_seconds", 30.0)
    found = asyncio.run(attack_all(door.port, 150, seed=1))
    assert not found.wrong
    assert found.num_requests == 150
    assert found.num_streams
    wait_until(lambda: not door.service.bodies.taken_bytes, "the bodies are given up")
    assert door.ask().status_code == 200


def test_there_are_descriptors_left_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, wanted in ((1024, 768), (256, 128), (10**6, 4096)):
        monkeypatch.setattr(protocol.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert protocol.most_connections() == wanted
