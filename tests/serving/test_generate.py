"""Answers over a real cluster equal transformers', token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from families import SOME, greedy, logits_of, stored

import dagflow
from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.serving.sampling import Sampling, _kept
from dagflow.serving.stage_server import num_tokens_computed

PROMPTS = [[5, 17, 3, 42, 8, 23, 5, 17], [9], [60, 2, 60, 2, 60, 2, 60], list(range(20, 41))]
NUM_NEW = 20


def _tokens(found: Any) -> list[list[int]]:
    return [tokens.tolist() for tokens in found.tokens]


@pytest.mark.parametrize("family", SOME)
def test_greedy_answers_equal_transformers(family: str, client: Client, tmp_path: Path) -> None:
    model, loaded = stored(family, tmp_path)
    wanted = [greedy(model, prompt, NUM_NEW) for prompt in PROMPTS]
    with dagflow.Deployment(loaded, client) as deployment:
        for speculate in (False, True):
            found = dagflow.generate(
                deployment,
                PROMPTS,
                max_new_tokens=NUM_NEW,
                ignore_end=True,
                speculate=speculate,
            )
            assert _tokens(found) == wanted
            assert found.finish_reasons == ["length"] * len(PROMPTS)


def test_right_guesses_save_traversals(deployed: tuple[Any, dagflow.Deployment]) -> None:
    model, deployment = deployed
    prompt = PROMPTS[0] + greedy(model, PROMPTS[0], 30)

    def traversals(speculate: bool) -> int:
        request = deployment.request(
            prompt, max_new_tokens=NUM_NEW, ignore_end=True, speculate=speculate
        )
        before = deployment.engine.num_fed
        assert [t.token for t in deployment.stream([request])] == greedy(model, prompt, NUM_NEW)
        return deployment.engine.num_fed - before

    assert traversals(False) == NUM_NEW
    assert traversals(True) < NUM_NEW


def test_an_end_token_ends_an_answer(deployed: tuple[Any, dagflow.Deployment]) -> None:
    deployment = deployed[1]
    [end] = deployment.model.end_tokens
    options = {"max_new_tokens": 5, "logit_bias": {end: 1e4}}
    stopped = dagflow.generate(deployment, PROMPTS[:1], **options)
    assert (_tokens(stopped), stopped.finish_reasons) == ([[end]], ["stop"])
    ignored = dagflow.generate(deployment, PROMPTS[:1], ignore_end=True, **options)
    assert (_tokens(ignored), ignored.finish_reasons) == ([[end] * 5], ["length"])


def test_sampling_follows_its_seed(deployed: tuple[Any, dagflow.Deployment]) -> None:
    def sampled(seed: int, speculate: bool = True) -> list[list[int]]:
        return _tokens(
            dagflow.generate(
                deployed[1],
                PROMPTS,
                max_new_tokens=NUM_NEW,
                ignore_end=True,
                temperature=1.5,
                seed=seed,
                speculate=speculate,
            )
        )

    once = sampled(1)
    assert sampled(1) == once
    assert sampled(1, speculate=False) == once
    assert sampled(2) != once


@pytest.mark.parametrize("seed", range(5))
def test_sampling_keeps_what_transformers_keeps(seed: int) -> None:
    from transformers.generation import logits_process as hf

    torch.manual_seed(seed)
    logits, seen = 3 * torch.randn(96), [3, 5, 5, 60]
    sampling = Sampling(repetition_penalty=1.3)
    penalized = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits[None])[0]
    assert torch.equal(sampling.adjusted(logits, seen), penalized)
    ids = torch.tensor([seen])
    for own, theirs in (
        ((20, 1.0, 0.0), [hf.TopKLogitsWarper(20)]),
        ((0, 0.7, 0.0), [hf.TopPLogitsWarper(0.7)]),
        ((0, 1.0, 0.1), [hf.MinPLogitsWarper(0.1)]),
        (
            (30, 0.8, 0.05),
            [hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.8), hf.MinPLogitsWarper(0.05)],
        ),
    ):
        wanted = logits[None]
        for step in theirs:
            wanted = step(ids, wanted)
        assert torch.equal(_kept(logits, *own), wanted[0])


@pytest.mark.parametrize("speculate", [False, True])
def test_frequency_and_presence_are_counted_in_the_answer_alone(
    deployed: tuple[Any, dagflow.Deployment], speculate: bool
) -> None:
    model, deployment = deployed
    frequency, presence = 0.7, 1.1
    for prompt in PROMPTS[:2]:
        wanted: list[int] = []
        for _ in range(NUM_NEW):
            logits = logits_of(model, [*prompt, *wanted])[-1]
            counts = torch.bincount(torch.tensor(wanted, dtype=torch.int64), minlength=96)
            logits = logits - counts * frequency - (counts > 0) * presence
            wanted.append(int(logits.argmax()))
        found = dagflow.generate(
            deployment,
            [prompt],
            max_new_tokens=NUM_NEW,
            ignore_end=True,
            speculate=speculate,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        assert _tokens(found) == [wanted]
        assert wanted != greedy(model, prompt, NUM_NEW)


@pytest.mark.parametrize("speculate", [False, True])
def test_logits_on_request_equal_transformers_scores(
    deployed: tuple[Any, dagflow.Deployment], speculate: bool
) -> None:
    model, deployment = deployed
    options = {"max_new_tokens": NUM_NEW, "ignore_end": True, "speculate": speculate}
    found = dagflow.generate(deployment, PROMPTS, return_logits=True, **options)
    assert dagflow.generate(deployment, PROMPTS, **options).logits is None
    for prompt, logits in zip(PROMPTS, found.logits, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        ).scores
        torch.testing.assert_close(logits, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_streaming_yields_what_generate_returns(deployed: tuple[Any, dagflow.Deployment]) -> None:
    deployment = deployed[1]
    options = {"max_new_tokens": 7, "ignore_end": True}
    found: list[list[int]] = [[] for _ in PROMPTS]
    for token in dagflow.generate(deployment, PROMPTS, stream=True, **options):
        found[token.prompt].append(token.token)
    assert found == _tokens(dagflow.generate(deployment, PROMPTS, **options))


def test_a_stream_that_is_left_leaves_no_session(deployed: tuple[Any, dagflow.Deployment]) -> None:
    model, deployment = deployed
    stream = dagflow.generate(deployment, PROMPTS[:1], stream=True, ignore_end=True)
    next(stream)
    stream.close()
    # The deployment goes on: a write that was cancelled has closed no connection.
    found = dagflow.generate(deployment, PROMPTS[:1], max_new_tokens=4, ignore_end=True)
    assert _tokens(found) == [greedy(model, PROMPTS[0], 4)]
    counts = deployment.engine.call(_counts(deployment))
    assert sorted(stage for found in counts.values() for stage in found) == [0, 1]


async def _counts(deployment: dagflow.Deployment) -> Any:
    engine = deployment.engine
    return await engine._client.run(num_tokens_computed, engine.name, asynchronous=True)


def test_a_session_is_fed_forked_and_rewound_by_hand(
    deployed: tuple[Any, dagflow.Deployment],
) -> None:
    model, deployment = deployed

    def same(found: torch.Tensor, tokens: list[int]) -> None:
        wanted = logits_of(model, tokens)[-1]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    with dagflow.Session(deployment) as session:
        every = session.prefill(PROMPTS[3], every=True)
        torch.testing.assert_close(every, logits_of(model, PROMPTS[3]), atol=1e-4, rtol=1e-4)
        same(session.decode(7), [*PROMPTS[3], 7])
        with session.fork(4) as fork:
            assert fork.tokens == PROMPTS[3][:4]
            same(fork.decode(50), [*PROMPTS[3][:4], 50])
        session.rewind(10)
        same(session.prefill([1, 2]), [*PROMPTS[3][:10], 1, 2])
        session.rewind(0)
        same(session.decode(9), [9])
        with pytest.raises(SettingsInvalid, match="without_head"):
            session.hidden([1])
        with pytest.raises(SettingsInvalid, match="no position 2"):
            session.rewind(2)
        with pytest.raises(BatchInvalid, match="no tokens"):
            session.prefill([])


def test_a_closed_session_says_so(deployed: tuple[Any, dagflow.Deployment]) -> None:
    session = dagflow.Session(deployed[1])
    session.prefill([1, 2])
    session.close()
    session.close()
    for use in (lambda: session.decode(3), lambda: session.fork(), lambda: session.rewind(0)):
        with pytest.raises(SettingsInvalid, match="closed"):
            use()


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, BatchInvalid, "empty"),
        ([1] * 64, {}, BatchInvalid, "64 tokens"),
        ([5, 96], {}, BatchInvalid, "token 96"),
        ([5, -1], {}, BatchInvalid, "token -1"),
        ([5], {"temprature": 1.0}, SettingsInvalid, "temprature"),
        ([5], {"top_p": 0.0}, SettingsInvalid, "top_p"),
        ([5], {"presence_penalty": float("nan")}, SettingsInvalid, "presence_penalty"),
        ([5], {"max_new_tokens": 0}, SettingsInvalid, "max_new_tokens"),
        ([5], {"stop": "end"}, SettingsInvalid, "no tokenizer"),
        ([5], {"logit_bias": {96: 1.0}}, SettingsInvalid, "token 96"),
        ([5], {"max_new_tokens": "5"}, SettingsInvalid, "counts from 1; found '5'"),
        ([5], {"temperature": "hot"}, SettingsInvalid, "temperature is a number"),
        ([5], {"stop": 3}, SettingsInvalid, "a list of texts; found 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    deployed: tuple[Any, dagflow.Deployment],
    prompt: list[int],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        dagflow.generate(deployed[1], [prompt], **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dagflow.generate("a/folder", "text"), "dagflow.load('path/to/folder') brings"),  # type: ignore[arg-type]
        (lambda: dagflow.load(torch.nn.Linear), "found the class Linear"),  # type: ignore[arg-type]
        (lambda: dagflow.load("a/folder", store=""), "store= is a folder"),
    ],
)
def test_what_is_no_model_or_store_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        call()
    assert words in str(caught.value)


def test_a_number_is_no_prompt(deployed: tuple[Any, dagflow.Deployment]) -> None:
    with pytest.raises(BatchInvalid, match="text or token ids"):
        dagflow.generate(deployed[1], 3)


def test_an_answer_ends_where_the_model_does(deployed: tuple[Any, dagflow.Deployment]) -> None:
    found = dagflow.generate(deployed[1], [[1] * 60], ignore_end=True)
    assert (len(found.tokens[0]), found.finish_reasons) == (4, ["length"])
