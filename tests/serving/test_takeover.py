"""A driver is killed, and another one goes on with what it was doing, token for token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from chaos import warm
from distributed import Client
from drivers import drive
from families import logits_of
from local import wait_until
from zoo import SIZES

import dagflow
from dagflow.errors import LeaseLost, NotFound, SessionInUse, SettingsInvalid, StoreInUse
from dagflow.serving.answers import LENGTH
from dagflow.serving.keeping import keeping
from dagflow_storage import SequenceLog, Store

PROMPT = [5, 17, 3, 42, 8, 23, 5, 17]
# Long enough to be killed in the middle of it.
NUM_NEW = 400
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": NUM_NEW, "ignore_end": True}
SAMPLED = {**GREEDY, "temperature": 1.3, "seed": 11, "logprobs": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(models: Path) -> tuple[Any, dagflow.Model]:
    """A model that goes on for long."""
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": 2048}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model, dagflow.load(model, store=models)


@pytest.fixture(scope="module")
def undisturbed(client: Client, llama: tuple[Any, dagflow.Model]) -> dict[str, list[dagflow.Token]]:
    """All tokens of the answers that others are kept from finishing."""
    with dagflow.Deployment(llama[1], client) as deployment:
        return {
            name: list(deployment.stream([deployment.request(**options)]))
            for name, options in (("greedy", GREEDY), ("sampled", SAMPLED))
        }


class Driver:
    """A driver in a process of its own."""

    def __init__(self, process: BaseProcess, says: Connection, log: Path) -> None:
        self.process = process
        self._says = says
        self._log = log

    def next(self) -> Any:
        try:
            return self._says.recv()
        except EOFError:
            pytest.fail(f"The driver has ended: {self._log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def driver(
    client: Client, model: dagflow.Model, store: Path | str, what: str, /, **options: Any
) -> Iterator[Driver]:
    """Have another process drive; `store` is its deployment's, empty for none."""
    says, told = Pipe(duplex=False)
    log = Path(model.ref.store.url) / f"{what}.log"
    arguments = (told, client.scheduler.address, model.ref, str(store), what, options)
    with says:
        with told:
            process = warm.start(drive, log, *arguments)
        try:
            yield Driver(process, says, log)
        finally:
            process.kill()  # a stopped one, too
            process.join()


def wait_for_tokens(store: Path, name: str, count: int) -> None:
    """Wait until so many tokens of a sequence are in a store."""
    log = SequenceLog(Store(store), name)

    def there() -> bool:
        with suppress(NotFound):
            return len(log.read().tokens) >= count
        return False

    wait_until(there, f"{count} tokens of {name}")


@pytest.mark.parametrize("which", [pytest.param("greedy", marks=pytest.mark.slow), "sampled"])
def test_an_answer_goes_on_after_its_driver_was_killed(
    client: Client,
    llama: tuple[Any, dagflow.Model],
    undisturbed: dict[str, list[dagflow.Token]],
    tmp_path: Path,
    which: str,
) -> None:
    options = {"greedy": GREEDY, "sampled": SAMPLED}[which]
    with driver(client, llama[1], tmp_path, "answer", name="tale", **options) as other:
        wait_for_tokens(tmp_path, "tale", 20)
        other.kill()
    whole = undisturbed[which]
    with dagflow.Deployment(llama[1], client, store=tmp_path) as deployment:
        (found,) = deployment.answers()
        known = len(found.tokens)
        assert 20 <= known < NUM_NEW
        assert (found.name, found.finish_reason) == ("tale", None)
        assert list(found.tokens) == [token.token for token in whole[:known]]
        rest = list(deployment.resume([found]))
        assert rest[0].token == whole[known].token
        assert [token.token for token in rest] == [token.token for token in whole[known:]]
        assert rest[-1].finish_reason == LENGTH
        (finished,) = deployment.answers()
        assert (len(finished.tokens), finished.finish_reason) == (NUM_NEW, LENGTH)
        # Asked for again, it is there from its first token on, and nothing is computed.
        before = deployment.engine.num_fed
        again = list(deployment.stream([deployment.request(name="tale", **options)]))
        assert deployment.engine.num_fed == before
        for one, other_one in zip(again, whole, strict=True):
            assert (one.token, one.finish_reason) == (other_one.token, other_one.finish_reason)
            if other_one.logprobs is not None:
                assert one.logprobs is not None
                assert [t for t, _ in one.logprobs.top] == [t for t, _ in other_one.logprobs.top]
                assert one.logprobs.chosen == pytest.approx(other_one.logprobs.chosen, abs=1e-4)


def test_generate_goes_on_where_it_was_killed(
    client: Client,
    llama: tuple[Any, dagflow.Model],
    undisturbed: dict[str, list[dagflow.Token]],
    tmp_path: Path,
) -> None:
    options = {**GREEDY, "prompts": [PROMPT, PROMPT[:3]], "store": str(tmp_path)}
    del options["prompt"]
    with driver(client, llama[1], "", "generate", **options) as other:
        wait_for_tokens(tmp_path, "prompt-000001", 20)
        other.kill()
    with dagflow.Deployment(llama[1], client) as deployment:
        wanted = dagflow.generate(deployment, **{**options, "store": None})
        before = deployment.engine.num_fed
        found = dagflow.generate(deployment, **options)
        computed = deployment.engine.num_fed - before
        assert [one.tolist() for one in found.tokens] == [one.tolist() for one in wanted.tokens]
        assert found.tokens[0].tolist() == [token.token for token in undisturbed["greedy"]]
        assert found.finish_reasons == ["length"] * 2
        assert dagflow.generate(deployment, **options).texts == found.texts
        assert deployment.engine.num_fed - before == computed
        for other_options, words in (
            ({"temperature": 0.5}, r"temperature: 0\.0 -> 0\.5"),
            ({"prompts": [PROMPT, [9]]}, r"prompts\.1: '3 tokens"),
            ({"prompts": [PROMPT]}, "num_prompts: 2 -> 1"),
            ({"max_new_tokens": 3}, "max_new_tokens"),
        ):
            with pytest.raises(dagflow.StoreHoldsAnotherRun, match=words):
                dagflow.generate(deployment, **{**options, **other_options})


def test_a_second_driver_is_refused_until_the_first_was_killed(
    client: Client, llama: tuple[Any, dagflow.Model], tmp_path: Path
) -> None:
    options = {**GREEDY, "max_new_tokens": 30}
    with driver(client, llama[1], tmp_path, "answer", name="short", **options) as other:
        tokens = [other.next() for _ in range(30)]
        assert other.next() == "done"
        wait_for_tokens(tmp_path, "short", 30)
        with pytest.raises(StoreInUse, match=str(other.process.pid)):
            dagflow.Deployment(llama[1], client, store=tmp_path)
        other.kill()
    with dagflow.Deployment(llama[1], client, store=tmp_path) as deployment:
        (found,) = deployment.answers()
        assert (list(found.tokens), found.finish_reason) == (tokens, "length")
        assert list(deployment.resume([found])) == []


def test_a_session_goes_on_after_its_driver_was_killed(
    client: Client, llama: tuple[Any, dagflow.Model], tmp_path: Path
) -> None:
    # More tokens than are sent at a time.
    tokens, more = [n % 96 for n in range(300)], [9, 4, 60]
    options = {"name": "chapter", "tokens": tokens, "position": 290, "more": more}
    with driver(client, llama[1], tmp_path, "feed", **options) as other:
        assert [other.next() for _ in range(3)] == [291, 292, 293]
        wait_for_tokens(tmp_path, "chapter", 293)
        other.kill()
    kept = [*tokens[:290], *more]
    with dagflow.Deployment(llama[1], client, store=tmp_path) as deployment:
        with dagflow.Session.resume(deployment, "chapter") as session:
            assert session.tokens == kept
            wanted = logits_of(llama[0], [*kept, 7])
            assert session.logits is not None
            torch.testing.assert_close(session.logits, wanted[-2], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(session.decode(7), wanted[-1], atol=1e-3, rtol=1e-3)
            session.rewind(2)
            with pytest.raises(SessionInUse, match="chapter"):
                dagflow.Session.resume(deployment, "chapter")
        with dagflow.Session.resume(deployment, "chapter") as session:
            assert session.tokens == kept[:2]
        with pytest.raises(SettingsInvalid, match="resume"):
            dagflow.Session(deployment, name="chapter")
        assert deployment.answers() == []
        deployment.forget("chapter")
        with pytest.raises(NotFound, match="chapter"):
            dagflow.Session.resume(deployment, "chapter")


def test_a_driver_that_comes_back_too_late_says_so_and_leaves_the_answer_to_the_other(
    client: Client,
    llama: tuple[Any, dagflow.Model],
    undisturbed: dict[str, list[dagflow.Token]],
    tmp_path: Path,
) -> None:
    what = "keep_with_little_patience"
    with driver(client, llama[1], "", what, store=str(tmp_path), **GREEDY) as other:
        wait_for_tokens(tmp_path, "frozen", 20)
        os.kill(other.process.pid, signal.SIGSTOP)
        said: list[str] = []
        with (
            dagflow.Deployment(llama[1], client) as deployment,
            keeping(tmp_path, said.append, patience_seconds=0.8, beat_seconds=0.1) as keeper,
        ):
            assert "silent" in said[0]
            os.kill(other.process.pid, signal.SIGCONT)
            ends = iter(other.next, LeaseLost.__name__)
            assert all(isinstance(token, int) for token in ends)
            request = deployment.request(**GREEDY)
            named = dagflow.serving.kept.Request.from_json(request.to_json(), "frozen")
            found = [token.token for token in deployment.stream([named], keeper=keeper)]
    assert found == [token.token for token in undisturbed["greedy"]]


def test_what_a_closed_deployment_was_at_is_gone_on_with_from_memory(
    client: Client,
    llama: tuple[Any, dagflow.Model],
    undisturbed: dict[str, list[dagflow.Token]],
) -> None:
    """With a store inside this process, and answers side by side."""
    store = "memory://takeover"
    found: dict[str, list[Any]] = {"greedy": [], "sampled": []}
    with dagflow.Deployment(llama[1], client, store=store) as deployment:
        requests = [
            deployment.request(name="greedy", **GREEDY),
            deployment.request(name="sampled", **SAMPLED),
        ]
        stream = deployment.stream(requests)
        for _ in range(20):
            next(stream)
    with pytest.raises(dagflow.DagflowError, match="closed"):
        list(stream)
    with dagflow.Deployment(llama[1], client, store=store) as deployment:
        answers = deployment.answers()
        for answer in answers:
            found[answer.name] += answer.tokens
        assert sum(map(len, found.values())) >= 20
        for token in deployment.resume(answers):
            found[answers[token.prompt].name].append(token.token)
    for name, tokens in found.items():
        assert tokens == [token.token for token in undisturbed[name]]


def test_what_cannot_be_kept_is_refused_with_words(
    client: Client, llama: tuple[Any, dagflow.Model], tmp_path: Path
) -> None:
    short = {**GREEDY, "max_new_tokens": 3}
    with dagflow.Deployment(llama[1], client) as deployment:
        for ask in (lambda: deployment.request(name="a", **short), lambda: deployment.answers()):
            with pytest.raises(SettingsInvalid, match="store="):
                ask()
    with dagflow.Deployment(llama[1], client, store=tmp_path) as deployment:
        with pytest.raises(SettingsInvalid, match="no name"):
            deployment.request(name="../a", **short)
        one = deployment.request(name="a", **short)
        with pytest.raises(SettingsInvalid, match="same name"):
            list(deployment.stream([one, one]))
        stream = deployment.stream([one])
        next(stream)
        with pytest.raises(SessionInUse, match="'a'"):
            list(deployment.stream([one]))
        stream.close()  # left, and kept all the same: it has a name
        assert [answer.name for answer in deployment.answers()] == ["a"]
        other = deployment.request(name="a", **{**short, "temperature": 2.0, "speculate": False})
        with pytest.raises(dagflow.StoreHoldsAnotherRun, match=r"temperature: 0\.0 -> 2\.0"):
            list(deployment.stream([other]))
        assert len(list(deployment.stream([one]))) == 3
        deployment.forget("a")
        assert len(list(deployment.stream([other]))) == 3
