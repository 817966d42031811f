"""Why a stream ended is always said, and a truncated answer never says that it stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from families import language_model, stored
from local import local_client
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import dagflow
from dagflow.errors import SettingsInvalid, TaskFailed, WorkersLost
from dagflow.serving.answers import LENGTH, STOP, Chosen, Request, Telling

PROMPT = [5, 17, 3]
LONG: dict[str, Any] = {"max_new_tokens": 60, "ignore_end": True, "speculate": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dagflow.Model:
    return stored("llama", tmp_path_factory.mktemp("models"))[1]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Client]:
    """A cluster of one thread in this process, for tests that end it."""
    with local_client(1, processes=False) as client:
        yield client


def heard_after(deployment: dagflow.Deployment, then: Callable[[], None]) -> list[str | None]:
    """Return the reasons that a stream's tokens have; something happens after the first."""
    stream = deployment.stream([deployment.request(PROMPT, **LONG)])
    reasons = [next(stream).finish_reason]
    then()
    reasons += [token.finish_reason for token in stream]
    return reasons


def test_a_deployment_that_is_closed_ends_its_streams_with_an_error(
    client: Client, model: dagflow.Model
) -> None:
    deployment = dagflow.Deployment(model, client)
    live = deployment.engine.call(deployment.engine.open())
    with pytest.raises(TaskFailed, match="closed"):
        heard_after(deployment, deployment.close)
    with pytest.raises(TaskFailed, match="closed"):  # an answer between two tokens
        client.sync(deployment.engine.feed, live, [1])
    for use in (
        lambda: list(deployment.stream([deployment.request(PROMPT)])),
        lambda: dagflow.Session(deployment),
    ):
        with pytest.raises(SettingsInvalid, match="closed"):
            use()


def test_closing_from_another_thread_wakes_whoever_waits_for_tokens(
    client: Client, model: dagflow.Model
) -> None:
    deployment = dagflow.Deployment(model, client.scheduler.address)  # its own client ends with it
    thread = threading.Thread(target=deployment.close)
    thread.start()
    # It may come between two answers: then the next isn't begun any more.
    with pytest.raises((TaskFailed, SettingsInvalid), match="closed"):
        while True:
            list(deployment.stream([deployment.request(PROMPT, **LONG)]))
    thread.join()


def test_a_client_that_is_closed_ends_streams_with_an_error(
    client: Client, model: dagflow.Model
) -> None:
    with (
        Client(client.scheduler.address, set_as_default=False) as second,
        dagflow.Deployment(model, second) as deployment,
    ):
        with pytest.raises(TaskFailed, match="closed"):
            heard_after(deployment, second.close)
        with pytest.raises(SettingsInvalid, match="client was closed"):
            list(deployment.stream([deployment.request(PROMPT)]))


def test_workers_that_are_all_gone_end_streams_with_an_error(
    own: Client, model: dagflow.Model
) -> None:
    settings = dagflow.ClusterSettings(wait_seconds=0.5)

    def close_worker() -> None:
        own.cluster.sync(own.cluster.workers[0].close, nanny=False)

    with (
        dagflow.Deployment(model, own, cluster=settings) as deployment,
        pytest.raises(WorkersLost, match="0 of 1 workers"),
    ):
        heard_after(deployment, close_worker)


def test_a_stage_that_fails_ends_streams_with_an_error(
    client: Client, model: dagflow.Model
) -> None:
    with dagflow.Deployment(model, client) as deployment:
        request = Request((5, 1_000_000), 10)  # past the checks: no such token
        with pytest.raises(TaskFailed):
            list(deployment.stream([request]))
        reasons = heard_after(deployment, lambda: None)
    assert reasons == [None] * 59 + [LENGTH]


def test_a_stop_string_that_the_last_token_completes_has_stopped(tmp_path: Path) -> None:
    """Text that may be half a character is held back; the last token brings it."""
    words = Tokenizer(WordLevel({"so": 0, "far\ufffd": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    language_model("llama").save_pretrained(tmp_path)
    model = dagflow.load(tmp_path, store="memory://stopped")
    for stop, ended, text in (
        ((), LENGTH, " so far\ufffd"),
        (("far",), STOP, " so "),
        (("far\ufffd!",), LENGTH, " so far\ufffd"),
    ):
        telling = Telling(model, Request((1,), 2, stop=stop), 0)
        tokens = [telling.say(Chosen(0)), telling.say(Chosen(1))]
        assert [token.finish_reason for token in tokens] == [None, ended]
        assert "".join(token.text for token in tokens) == text
