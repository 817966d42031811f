"""Beam search over a real cluster returns transformers' answers and scores, token for token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from families import beam_search, language_model

import dagflow
from dagflow.errors import SettingsInvalid

PROMPTS = [[5, 17, 3, 42, 8, 23, 5, 17], [9], [60, 2, 60, 2, 60, 2, 60], list(range(20, 41))]
NUM_NEW = 16


def _ended_early(model: Any) -> Any:
    """Make two tokens the model's end tokens with which some of its answers end early."""
    model.generation_config.eos_token_id = None
    first, last = (beam_search(model, PROMPTS[n], NUM_NEW)[0][0] for n in (0, -1))
    for end in reversed(first):
        model.generation_config.eos_token_id = [end, last[NUM_NEW // 3]]
        if len(beam_search(model, PROMPTS[0], NUM_NEW, length_penalty=0.0)[0][0]) < NUM_NEW:
            return model
    raise AssertionError("no answer ends early")


def _assert_same(
    deployment: dagflow.Deployment, model: Any, prompts: list[list[int]], **options: Any
) -> list[str]:
    given = {"max_new_tokens": NUM_NEW, "num_beams": 4, **options}
    found = dagflow.generate(deployment, prompts, **given)
    answers = [answer for prompt in prompts for answer in beam_search(model, prompt, **given)]
    assert [tokens.tolist() for tokens in found.tokens] == [tokens for tokens, _ in answers]
    wanted = torch.tensor([score for _, score in answers])
    torch.testing.assert_close(found.scores, wanted, atol=1e-3, rtol=1e-4)
    reasons: list[str] = found.finish_reasons
    return reasons


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "gemma3",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "qwen3", "bloom")),
    ],
)
def test_answers_equal_transformers(family: str, client: Client, tmp_path: Path) -> None:
    model = _ended_early(language_model(family))
    loaded = dagflow.load(model, store=tmp_path)
    assert loaded.end_tokens == tuple(model.generation_config.eos_token_id)
    with dagflow.Deployment(loaded, client) as deployment:
        reasons = _assert_same(deployment, model, PROMPTS)
        reasons += _assert_same(
            deployment, model, PROMPTS, num_return_sequences=3, length_penalty=0.0
        )
    assert set(reasons) == {"stop", "length"}


# Each penalty and each way to stop at least once; the other pairs are slow.
PENALTIES, WAYS = (-1.0, 0.0, 0.6, 2.0), (False, True, "never")
FEW = {(-1.0, False), (-1.0, "never"), (0.0, True), (0.6, "never"), (2.0, False), (2.0, True)}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in FEW else pytest.mark.slow)
    for pair in itertools.product(PENALTIES, WAYS)
]


@pytest.mark.parametrize(("length_penalty", "early_stopping"), PAIRS)
def test_penalties_of_length_and_ways_to_stop(
    length_penalty: float, early_stopping: Any, client: Client, ended: dagflow.Deployment
) -> None:
    deployment, model = ended
    _assert_same(
        deployment,
        model,
        PROMPTS[:2],
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=2,
    )


@pytest.fixture(scope="module")
def ended(
    client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dagflow.Deployment, Any]]:
    """A model that ends its answers early."""
    model = _ended_early(language_model("llama"))
    loaded = dagflow.load(model, store=tmp_path_factory.mktemp("models"))
    with dagflow.Deployment(loaded, client) as deployment:
        yield deployment, model


def test_many_beams_one_token_and_penalties(ended: tuple[dagflow.Deployment, Any]) -> None:
    deployment, model = ended
    _assert_same(deployment, model, PROMPTS[:1], num_beams=12, num_return_sequences=12)
    _assert_same(deployment, model, PROMPTS[:2], max_new_tokens=1, num_beams=2)
    _assert_same(deployment, model, PROMPTS[:2], repetition_penalty=1.3)


def test_a_step_is_one_traversal_however_many_beams(
    deployed: tuple[Any, dagflow.Deployment],
) -> None:
    engine = deployed[1].engine
    before = engine.num_fed
    dagflow.generate(deployed[1], PROMPTS[:1], num_beams=8, max_new_tokens=10, ignore_end=True)
    assert engine.num_fed - before == 10
    assert not engine._live  # no session is left


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_k": 5}, "top_k"),
        ({"seed": 3}, "seed"),
        ({"num_beams": 0}, "num_beams is 1 to"),
        ({"num_beams": 50}, "take fewer beams"),
        ({"num_return_sequences": 5}, "num_return_sequences is 1 to num_beams"),
        ({"num_beams": 1, "num_return_sequences": 2}, "need as many beams"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"stream": True}, "stream"),
        ({"return_logits": True}, "return_logits"),
    ],
)
def test_what_makes_no_sense_with_beams_is_refused(
    deployed: tuple[Any, dagflow.Deployment], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsInvalid, match=words):
        dagflow.generate(deployed[1], PROMPTS[:1], **{"num_beams": 4, **options})


def test_options_of_beams_without_beams_are_warned_of(
    deployed: tuple[Any, dagflow.Deployment],
) -> None:
    with pytest.warns(UserWarning, match="change nothing without num_beams"):
        dagflow.generate(deployed[1], PROMPTS[:1], max_new_tokens=1, length_penalty=2.0)
