"""Passes of guesses that are sent ahead, from the text or from a draft model, change no answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from distributed import Client
from families import greedy, language_model, logits_of
from local import local_client, wait_until
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from zoo import SIZES

import dagflow
from dagflow.errors import SettingsInvalid
from dagflow.serving.draft import Draft
from dagflow.serving.pace import Pace
from dagflow.serving.stage_server import num_tokens_computed

PROMPT = [5, 17, 3, 42, 8, 23, 5, 17, 3]
NUM_NEW = 24


class FarAway(Pace):
    """The pace of stages that are so far away that whatever may be right is sent."""

    traversal_seconds = 1.0
    guess_seconds = 0.001
    pass_seconds = 0.001

    def most_passes(self, num_tokens: int) -> int:
        return 6


class Watched:
    """A deployment far away, and what was under way at once."""

    def __init__(self, deployment: dagflow.Deployment) -> None:
        self.deployment = deployment
        self.most_under_way = 0
        self.num_rewinds = 0
        engine = deployment.engine
        engine.pace = FarAway()
        send, rewind = engine.send, engine.rewind

        async def watched_send(live: Any, tokens: Sequence[int], want: str = "last") -> Any:
            futures = await send(live, tokens, want)
            self.most_under_way = max(self.most_under_way, len(live.wanted))
            return futures

        def watched_rewind(live: Any, position: int) -> None:
            self.num_rewinds += 1
            rewind(live, position)

        engine.send, engine.rewind = watched_send, watched_rewind  # type: ignore[method-assign]

    def answer(self, **options: Any) -> list[int]:
        found = dagflow.generate(
            self.deployment, [PROMPT], max_new_tokens=NUM_NEW, ignore_end=True, **options
        )
        tokens: list[int] = found.tokens[0].tolist()
        return tokens


def test_a_draft_that_is_rewound_further_than_its_windows_keep_reads_its_text_again(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 512}
    config = hf.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)
    model: Any = hf.MistralForCausalLM(config).eval()
    text = [(5 * n * n + n) % 90 + 3 for n in range(200)]

    async def guesses() -> list[int]:
        found = []
        session = draft.begin("text")
        for length in (200, 199, 60):
            guess = await session.guess(text[:length])
            assert guess is not None
            found.append(guess.token)
        return found

    loaded = dagflow.load(model, store=tmp_path)
    draft = Draft(loaded, loaded)
    try:
        logits = logits_of(model, text)
        assert asyncio.run(guesses()) == [int(logits[n - 1].argmax()) for n in (200, 199, 60)]
    finally:
        draft.close()


# A wrong draft has passes taken back, which is where families differ.
DRAFTED = [
    pytest.param(family, seed, marks=[] if seed or family == "llama" else pytest.mark.slow)
    for family in ("llama", "gemma3", "mixtral", "gpt2", "bloom")
    for seed in (0, 1)
]


@pytest.mark.parametrize(("family", "draft_seed"), DRAFTED)
def test_answers_are_the_same_with_passes_ahead_and_a_draft(
    family: str, draft_seed: int, client: Client, tmp_path: Path
) -> None:
    model, draft = language_model(family), language_model(family, draft_seed)
    loaded = dagflow.load(model, store=tmp_path)
    sampled = {"temperature": 1.5, "seed": 3}
    with dagflow.Deployment(loaded, client, draft=draft) as deployment:
        watched = Watched(deployment)
        wanted = watched.answer(**sampled, speculate=False)
        assert watched.most_under_way == 1
        before = deployment.engine.num_fed
        assert watched.answer() == greedy(model, PROMPT, NUM_NEW)
        passes = deployment.engine.num_fed - before
        assert watched.most_under_way > 1
        assert (passes < NUM_NEW) if draft_seed == 0 else (watched.num_rewinds > 0)
        assert watched.answer(**sampled) == wanted


def test_a_text_that_repeats_is_sent_ahead_without_a_draft(client: Client, tmp_path: Path) -> None:
    model = language_model("llama")
    with dagflow.Deployment(dagflow.load(model, store=tmp_path), client) as deployment:
        watched = Watched(deployment)
        prompt = PROMPT + greedy(model, PROMPT, 20) + PROMPT
        found = dagflow.generate(deployment, [prompt], max_new_tokens=NUM_NEW, ignore_end=True)
        assert found.tokens[0].tolist() == greedy(model, prompt, NUM_NEW)
        assert watched.most_under_way > 1


def test_stages_leave_out_what_was_rewound_while_it_waited(client: Client, tmp_path: Path) -> None:
    loaded = dagflow.load(language_model("llama"), store=tmp_path)
    with dagflow.Deployment(loaded, client, num_stages=1) as deployment:
        engine = deployment.engine

        async def answer() -> torch.Tensor:
            live = await engine.open()
            first = await engine.send(live, PROMPT)
            for _ in range(8):
                await engine.send(live, [1, 2, 3, 4])
            engine.rewind(live, len(PROMPT))
            await first[0] if not first[0].cancelled() else None
            return await engine.feed(live, [7])

        with dagflow.Session(deployment) as session:
            wanted = session.prefill([*PROMPT, 7])
        before = _computed(client, deployment)
        found = engine.call(answer())
        torch.testing.assert_close(found[-1], wanted, atol=1e-4, rtol=1e-4)
        assert _computed(client, deployment) - before < len(PROMPT) + 8 * 4


def _computed(client: Client, deployment: dagflow.Deployment) -> int:
    counts = client.run(num_tokens_computed, deployment.engine.name)
    return sum(count for stages in counts.values() for count in stages.values())


@pytest.fixture
def volunteers() -> Iterator[Client]:
    with local_client(3) as client:
        client.wait_for_workers(3, timeout=60)
        yield client


@pytest.mark.parametrize("draft_seed", [0, 1], ids=["right draft", "wrong draft"])
def test_killed_workers_change_no_answer_with_passes_ahead(
    draft_seed: int, volunteers: Client, tmp_path: Path
) -> None:
    model, draft = language_model("llama"), language_model("llama", draft_seed)
    loaded = dagflow.load(model, store=tmp_path)
    with dagflow.Deployment(loaded, volunteers, num_stages=2, draft=draft) as deployment:
        engine = deployment.engine
        for stage in (1, 0):
            wait_until(lambda: len(engine.placement.spares()) >= 1, "a spare")
            watched = Watched(deployment)
            pids = volunteers.run(os.getpid)
            address = engine.placement.addresses[stage]
            request = deployment.request(PROMPT, max_new_tokens=NUM_NEW, ignore_end=True)
            found = []
            for token in deployment.stream([request]):
                found.append(token.token)
                if len(found) == 3:
                    os.kill(pids[address], signal.SIGKILL)
            assert found == greedy(model, PROMPT, NUM_NEW)
            wait_until(lambda: engine.placement.addresses[stage] not in ("", address), "another")  # noqa: B023
            assert watched.most_under_way > 1


def test_a_draft_of_another_vocabulary_is_refused(client: Client, tmp_path: Path) -> None:
    def saved(name: str, words: Sequence[str]) -> Path:
        folder = tmp_path / name
        language_model("llama").save_pretrained(folder)
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, words[0]))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return folder

    words = [f"w{i}" for i in range(96)]
    model = dagflow.load(saved("large", words), store=tmp_path / "store")
    other = saved("small", [*words[:7], "other", *words[8:]])
    with pytest.raises(SettingsInvalid, match=r"'other' is 7 in the draft, and absent"):
        dagflow.generate(model, "w1", client=client, draft=other)
    without = dagflow.load(language_model("gpt2"), store=tmp_path / "store")
    small = dict(without.description)
    small["config"] = {**without.config, "vocab_size": 50}
    with pytest.raises(SettingsInvalid, match=r"50 tokens.*96"):
        dagflow.generate(model, "w1", client=client, draft=dagflow.Model(without.ref, small))


def test_an_open_deployment_takes_no_other_draft(client: Client, tmp_path: Path) -> None:
    loaded = dagflow.load(language_model("llama"), store=tmp_path)
    with (
        dagflow.Deployment(loaded, client) as deployment,
        pytest.raises(SettingsInvalid, match="when it is opened"),
    ):
        dagflow.generate(deployment, [PROMPT], draft=loaded)
