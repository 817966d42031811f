"""A server is killed in the middle of an answer; another one goes on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner
from local import wait_until
from served import KEYS, started
from test_openai_client import GOES_ON

from dagflow.cli import main
from dagflow.errors import NotFound
from dagflow_storage import SequenceLog, Store, list_sequences

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "A machine",
    "max_tokens": 600,
    "logit_bias": GOES_ON,
    "temperature": 1.2,
}
URL = "/v1/completions"


@contextmanager
def server(arguments: list[str | Path], answers: Path, log: Path) -> Iterator[httpx.Client]:
    """Start a server, and kill it at the end."""
    arguments = [*arguments, "--answers", answers]
    for key in KEYS:
        arguments += ["--api-key", key]
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    with (
        started(arguments, log) as (url, _),
        httpx.Client(base_url=url, headers=headers, timeout=180) as client,
    ):
        yield client


def with_key(key: str, api_key: str = KEYS[0]) -> dict[str, str]:
    return {"Idempotency-Key": key, "Authorization": f"Bearer {api_key}"}


def pieces(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line not in ("", "data: [DONE]"):
            yield json.loads(line.removeprefix("data: "))


def reason_and_text(found: list[dict[str, Any]]) -> tuple[str | None, str]:
    choices = [piece["choices"][0] for piece in found]
    return choices[-1]["finish_reason"], "".join(choice["text"] for choice in choices)


def num_kept(answers: Path) -> int:
    """How many tokens of the only answer are in the store."""
    with suppress(NotFound):
        for name in list_sequences(Store(answers)):
            return len(SequenceLog(Store(answers), name).read().tokens)
    return 0


def test_a_request_that_is_sent_again_gets_the_answer_that_was_begun(
    of_the_swarm: list[str | Path], tmp_path: Path
) -> None:
    answers, stream = tmp_path / "answers", {**BODY, "stream": True}
    with (
        server(of_the_swarm, answers, tmp_path / "first.log") as client,
        client.stream("POST", URL, json=stream, headers=with_key("tale")) as response,
    ):
        assert response.status_code == 200
        said = pieces(response)
        begun = list(islice(said, 5))
        wait_until(lambda: num_kept(answers) > 20, "tokens in the store")
    kept = num_kept(answers)
    assert 20 < kept < BODY["max_tokens"]

    with server(of_the_swarm, answers, tmp_path / "second.log") as client:
        with client.stream("POST", URL, json=stream, headers=with_key("tale")) as response:
            again = list(pieces(response))
        reason, text = reason_and_text(again)
        assert reason == "length"
        assert text.startswith(reason_and_text(begun)[1])
        assert {piece["id"] for piece in again} == {begun[0]["id"]}
        whole = client.post(URL, json=BODY, headers=with_key("tale")).json()
        assert whole["choices"][0]["text"] == text
        assert whole["usage"]["completion_tokens"] == BODY["max_tokens"]

        reused = client.post(URL, json={**BODY, "max_tokens": 3}, headers=with_key("tale"))
        assert reused.status_code == 422
        assert reused.json()["error"]["code"] == "idempotency_key_reused"
        assert (
            "max_new_tokens" not in reused.text
        )  # whoever asks learns nothing of the other request
        short = {**BODY, "max_tokens": 3}
        assert client.post(URL, json=short, headers=with_key("tale", KEYS[1])).status_code == 200
        assert client.post(URL, json=BODY, headers=with_key("")).status_code == 400
        # Who has no key leaves nothing.
        before = list_sequences(Store(answers))
        assert client.post(URL, json=short).status_code == 200
        assert list_sequences(Store(answers)) == before


def refuse_another_server(arguments: list[str | Path], answers: Path) -> None:
    command = ["serve", *map(str, arguments), "--answers", str(answers)]
    command += ["--store", str(answers.parent / "models")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "in use by process" in refused.output


def test_a_client_that_was_cut_off_gets_the_rest(
    of_the_swarm: list[str | Path], tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    body = {**BODY, "max_tokens": 150, "n": 2, "seed": 5}
    with server(of_the_swarm, answers, tmp_path / "serve.log") as client:
        stream, headers = {**body, "stream": True}, with_key("cut off")
        with client.stream("POST", URL, json=stream, headers=headers) as response:
            said = pieces(response)
            next(said)
            # Who asks again too soon is told to wait.
            busy = client.post(URL, json=body, headers=headers)
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "in_progress")
            assert busy.headers["Retry-After"] == "1"
        wanted = client.post(URL, json=body).json()
        refuse_another_server(of_the_swarm, answers)
        found = client.post(URL, json=body, headers=headers)
    assert found.json()["choices"] == wanted["choices"]
