"""What the server does for clients that are many, wrong, or gone."""

from __future__ import annotations

import json
import signal
import socket
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest
from cluster.processes import kill_group
from served import KEYS, Served, as_people_start_it, ended_without_a_word, started
from test_openai_client import GOES_ON, complete

MODEL_TOKENS = 4096
# Random text takes ten times as long as what can be guessed.
LONG = {"stream": True, "max_tokens": MODEL_TOKENS, "temperature": 1.2}


def error_of(response: httpx.Response) -> dict[str, str | None]:
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


def test_the_queue_has_an_end_and_a_client_that_leaves_frees_its_place(served: Served) -> None:
    before = served.metrics
    stream = complete(served, **LONG)
    next(iter(stream))  # it is being answered: the one place is taken
    body = {"model": "tiny", "prompt": "Stages", "max_tokens": 3, "logit_bias": GOES_ON}
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(served.http.post, "/v1/completions", json=body) for _ in "ab"]
        # One of them waits. So the first answer is the other's.
        (first,), (second,) = wait(both, return_when=FIRST_COMPLETED)
        refused = first.result()
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        stream.close()
        assert second.result().status_code == 200
    after = served.metrics
    cancelled = 'dagflow_requests_total{ended="cancelled"}'
    assert after[cancelled] == before[cancelled] + 1
    tokens = "dagflow_completion_tokens_total"
    assert after[tokens] - before[tokens] < MODEL_TOKENS // 2
    assert after["dagflow_requests_running"] == after["dagflow_requests_waiting"] == 0


def test_a_client_that_never_reads_holds_nobody_up(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "A", "stream": True, "max_tokens": 500})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(f"{head}Authorization: Bearer {KEYS[0]}\r\n\r\n{body}".encode())
        assert deaf.recv(12) == b"HTTP/1.1 200"
        assert complete(served).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "tiny", "prompt": "\\ud800"}', b"\xff", b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_a_bad_request(served: Served, body: bytes) -> None:
    response = served.http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


def test_a_body_that_is_too_long_is_refused(served: Served) -> None:
    response = served.http.post("/v1/completions", content=b" " * (10 * 2**20 + 1))
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_every_refusal_has_the_same_form(served: Served) -> None:
    assert served.http.get("/v1/nothing").status_code == 404
    assert error_of(served.http.get("/v1/nothing"))["type"] == "invalid_request_error"
    wrong = served.http.get("/v1/completions")
    assert wrong.status_code == 405
    error_of(wrong)
    with httpx.Client(base_url=served.url) as stranger:
        for response in (stranger.get("/v1/models"), stranger.post("/v1/chat/completions")):
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"


def test_health_metrics_and_the_page_need_no_key(served: Served) -> None:
    with httpx.Client(base_url=served.url) as stranger:
        health = stranger.get("/health")
        metrics = stranger.get("/metrics")
        page = stranger.get("/")
    wanted = {
        "status": "ok",
        "model": "tiny",
        "running": 0,
        "waiting": 0,
        "workers": 2,
        "missing": [],
    }
    assert health.json() == wanted
    assert "# TYPE dagflow_requests_total counter" in metrics.text
    assert page.headers["content-type"].startswith("text/html")
    assert "v1/chat/completions" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_metrics_count_tokens(served: Served) -> None:
    before = served.metrics
    usage = complete(served).usage
    after = served.metrics
    for kind, count in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
        name = f"dagflow_{kind}_tokens_total"
        assert after[name] - before[name] == count


def test_prompts_that_begin_alike_are_computed_once(served: Served) -> None:
    prompt = "A machine that leaves is replaced, and a machine that stays is not."
    before = served.metrics
    usages = [complete(served, prompt=prompt + end).usage for end in ("", " So", " So")]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [0, usages[0].prompt_tokens, usages[2].prompt_tokens - 1]
    two = complete(served, prompt=prompt, n=2, temperature=1).usage
    assert two.prompt_tokens_details.cached_tokens == usages[0].prompt_tokens - 1
    after = served.metrics
    hits = "dagflow_prefix_hits_total"
    assert after[hits] - before[hits] == 4
    assert after["dagflow_prefix_hit_tokens_total"] > before["dagflow_prefix_hit_tokens_total"]
    assert 0 < after["dagflow_cache_kept_tokens"] < after["dagflow_cache_capacity_tokens"]
    assert after["dagflow_cache_used_tokens"] == after["dagflow_cache_waiting_answers"] == 0


def test_caches_with_too_little_memory_shorten_what_may_be_asked(
    of_the_swarm: list[str | Path], tmp_path: Path
) -> None:
    small = [*of_the_swarm, "--stages", "1", "--cache-memory", "100kB", "--no-prefix-reuse"]
    log = tmp_path / "serve.log"
    with (
        started(small, log) as (url, process),
        ended_without_a_word(process, log),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        room = http.get("/v1/models/tiny").json()["max_model_len"]
        assert 0 < room < MODEL_TOKENS
        assert f"dagflow_cache_capacity_tokens {room}.0\n" in http.get("/metrics").text

        def ask(**options: object) -> httpx.Response:
            body = {"model": "tiny", "logit_bias": GOES_ON, **options}
            kind = "chat/completions" if "messages" in body else "completions"
            return http.post(f"/v1/{kind}", json=body)

        for options in ({"prompt": "A", "max_tokens": room}, {"prompt": [1] * room}):
            refused = ask(**options)
            assert refused.status_code == 400
            assert error_of(refused)["code"] == "context_length_exceeded"
            assert error_of(refused)["param"] == "prompt"
            assert str(room) in str(error_of(refused)["message"])
        # Who doesn't say how much gets what fits.
        found = ask(messages=[{"role": "user", "content": "A"}])
        assert found.json()["usage"]["total_tokens"] == room
        process.send_signal(signal.SIGTERM)


def test_a_server_that_people_start_brings_its_workers_and_ends_without_a_word(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["--model", model_folder, "--port", "0", "--workers", "2"]
    log = tmp_path / "serve.log"
    with (
        as_people_start_it(arguments, log) as (url, process),
        ended_without_a_word(process, log),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        assert http.get("/health").json()["workers"] == 2
        body = {"model": "tiny", "prompt": "A", "max_tokens": 4, "logit_bias": GOES_ON}
        answer = http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 4
        kill_group(process, signal.SIGINT)  # as a terminal does


def test_a_server_that_is_ended_tells_its_clients(
    of_the_swarm: list[str | Path], tmp_path: Path
) -> None:
    log = tmp_path / "serve.log"
    with started(of_the_swarm, log) as (url, process), ended_without_a_word(process, log):
        body = {"model": "tiny", "prompt": "A", "logit_bias": GOES_ON, **LONG}
        whole = {**body, "stream": False}
        with (
            ThreadPoolExecutor(1) as pool,
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
        ):
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            assert "error" not in json.loads(next(lines))
            waiting = pool.submit(httpx.post, f"{url}/v1/completions", json=whole, timeout=60)
            while httpx.get(f"{url}/health").json()["running"] < 2:
                assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            *said, last = [json.loads(line) for line in lines]
            refused = waiting.result()
        assert {piece["choices"][0]["finish_reason"] for piece in said} <= {None}
        assert last["error"]["code"] == "unavailable"
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
