"""Models with recurrent layers decode as transformers does, whatever becomes of their sessions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from families import beam_search, greedy, language_model, logits_of, stored
from test_decoder_stage import _captured, _feed, _part, _stages
from zoo.recurrent import RECURRENT

import dagflow
from dagflow.errors import CaptureFailed
from dagflow.graph.decoder import capture_decoder
from dagflow.models.model import read_stage
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow.plan.serving_memory import serving_needs
from dagflow_tasks.decode.decoder_stage import ALL, LAST, NOTHING, Part, join, split_logits
from dagflow_tasks.kernels.states import REACH_TOKENS

QUICK = ("mamba", "qwen3_5", "rwkv")
SOME = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
    for family in RECURRENT
]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26] * 7
FAMILY = "qwen3_5"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def _wanted(tokens: list[int], family: str = FAMILY) -> torch.Tensor:
    return logits_of(_captured(family)[0], tokens)


@pytest.mark.parametrize("family", SOME)
def test_tokens_in_pieces_equal_the_whole_sequence(family: str) -> None:
    wanted = _wanted(TOKENS, family)
    for num_stages, cuts in [(1, [50, 1, 20, 13]), (2, [1] * len(TOKENS)), (2, [len(TOKENS)])]:
        stages, found, start = _stages(family, num_stages), [], 0
        for count in cuts:
            found.append(_feed(stages, _part(start, count), TOKENS[start : start + count]))
            start += count
        torch.testing.assert_close(torch.cat(found), wanted, **CLOSE)


@pytest.mark.parametrize("family", SOME)
def test_tokens_are_those_that_transformers_generates(family: str) -> None:
    stages, found = _stages(family, 2), []
    logits = _feed(stages, _part(0, 12), TOKENS[:12])
    while len(found) < 20:
        found.append(int(logits[-1].argmax()))
        logits = _feed(stages, _part(12 + len(found) - 1, 1), found[-1:])
    assert found == greedy(_captured(family)[0], TOKENS[:12], 20)


def test_sessions_share_a_pass() -> None:
    stages = _stages(FAMILY, 2)
    _feed(stages, _part(0, 40, NOTHING), TOKENS[:40])
    parts, values = join(
        [
            ([_part(40, 2)], {"in.tokens": torch.tensor(TOKENS[40:42])}),
            ([_part(0, 30, LAST, "b")], {"in.tokens": torch.tensor(TOKENS[:30])}),
        ]
    )
    for stage in stages:
        parts, values = stage.run(parts, values)
    found = {part.session: logits for part, logits in split_logits(parts, values["logits"])}
    wanted = _wanted(TOKENS)
    torch.testing.assert_close(found["a"], wanted[40:42], **CLOSE)
    torch.testing.assert_close(found["b"], wanted[29:30], **CLOSE)


@pytest.mark.parametrize("family", ["mamba", FAMILY])
def test_a_session_is_rewound_by_its_latest_tokens(family: str) -> None:
    stages, tokens = _stages(family, 2), TOKENS[:80]
    _feed(stages, _part(0, 80), tokens)
    for epoch, back in enumerate((REACH_TOKENS, 3, 1, 2), 1):
        start, new = len(tokens) - back, [50 + epoch] * (back + 1)
        tokens = [*tokens[:start], *new]
        found = _feed(stages, _part(start, len(new), epoch=epoch), new)
        torch.testing.assert_close(found, _wanted(tokens, family)[start:], **CLOSE)


def test_a_session_rewound_too_far_must_come_again_from_its_first_token() -> None:
    stages = _stages("mamba", 2)
    _feed(stages, _part(0, 80), TOKENS[:80])
    for stage in stages:
        assert not stage.accepts(_part(10, 70, epoch=1))
        # What follows on tokens of the new epoch mustn't be taken to follow on those of the old one.
        assert not stage.accepts(_part(80, 1, epoch=1))
        assert stage.resend("a", 0, ALL) is None
    tokens = [*TOKENS[:10], 50, 51, 52]
    found = _feed(stages, Part("a", 1, 0, 13, 10, ALL), tokens)
    torch.testing.assert_close(found, _wanted(tokens, "mamba")[10:], **CLOSE)


def test_tokens_that_come_again_change_nothing() -> None:
    stages = _stages(FAMILY, 2)
    _feed(stages, _part(0, 70), TOKENS[:70])
    assert not stages[0].accepts(_part(20, 5))
    again = _feed(stages, _part(0, 60), TOKENS[:60])
    torch.testing.assert_close(again, _wanted(TOKENS[:60]), **CLOSE)
    found = _feed(stages, _part(70, 4), TOKENS[70:74])
    torch.testing.assert_close(found, _wanted(TOKENS[:74])[70:], **CLOSE)


def test_forks_and_what_another_has_are_taken_over() -> None:
    stages = _stages(FAMILY, 2)
    _feed(stages, _part(0, 70), TOKENS[:70])
    assert all(stage.fork("a", "b", 60) for stage in stages)
    assert not stages[0].fork("a", "c", 10)
    found = _feed(stages, _part(60, 1, session="b"), [40])
    torch.testing.assert_close(found, _wanted([*TOKENS[:60], 40])[60:], **CLOSE)
    part = Part("b", 1, 70, 1, 70, ALL, "a", 0, 60)
    found = _feed(stages, part, [41])
    torch.testing.assert_close(found, _wanted([*TOKENS[:70], 41])[70:], **CLOSE)
    sent = stages[0].resend("b", 70, ALL)
    assert sent is not None
    _, outputs = _stages(FAMILY, 2)[1].run([sent[0]], sent[1])
    torch.testing.assert_close(outputs["logits"], found, **CLOSE)


@pytest.mark.parametrize("family", QUICK)
def test_what_sessions_take_is_known_from_the_program(family: str) -> None:
    stages = _stages(family, 2)
    for start in range(len(TOKENS) - 3):
        _feed(stages, _part(start, 1), TOKENS[start : start + 1])
    _feed(stages, _part(0, 70, session="b"), TOKENS[:70])
    dag = _captured(family)[1]
    tokens = 96 + 96
    for stage, program in zip(stages, cut_at_layers(dag, 2).programs, strict=True):
        needs = serving_needs(dag, program)
        most = tokens * needs.token_bytes + 2 * needs.session_bytes
        assert 0.5 * most <= stage.num_cache_bytes <= most
        stage.close("a")
        stage.close("b")
        assert stage.num_cache_bytes == 0


def test_a_mixer_that_is_given_more_than_is_known_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as code

    mixer = code.Qwen3_5GatedDeltaNet
    forward = mixer.forward

    def packed(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs["cu_seq_lens_q"] = torch.tensor([0, 5])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(mixer, "forward", packed)
    with pytest.raises(CaptureFailed, match="torch_chunk_gated_delta_rule with cu_seqlens"):
        capture_decoder(_captured(FAMILY)[0])


@pytest.fixture(scope="module")
def deployed(
    client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, dagflow.Deployment]]:
    model, loaded = stored(FAMILY, tmp_path_factory.mktemp("models"))
    with dagflow.Deployment(loaded, client, num_stages=2) as deployment:
        yield model, deployment


def test_answers_and_guesses_equal_transformers(deployed: tuple[Any, dagflow.Deployment]) -> None:
    model, deployment = deployed
    prompts = [TOKENS[:40], TOKENS[:7], [5, 6, 5, 6, 5, 6, 5], TOKENS[:40], [*TOKENS[:30], 9, 9]]
    found = dagflow.generate(deployment, prompts, max_new_tokens=40, ignore_end=True)
    assert [t.tolist() for t in found.tokens] == [greedy(model, p, 40) for p in prompts]


def test_beams_equal_transformers(deployed: tuple[Any, dagflow.Deployment]) -> None:
    model, deployment = deployed
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 3}
    found = dagflow.generate(deployment, [TOKENS[:20]], ignore_end=True, **options)
    wanted = beam_search(model, TOKENS[:20], eos_token_id=None, **options)
    assert [tokens.tolist() for tokens in found.tokens] == [tokens for tokens, _ in wanted]


def test_a_session_goes_back_to_any_token(deployed: tuple[Any, dagflow.Deployment]) -> None:
    model, deployment = deployed
    with dagflow.Session(deployment) as session:
        session.prefill(TOKENS)
        for position in (len(TOKENS) - 3, 5, 1):
            session.rewind(position)
            tokens = [*TOKENS[:position], 7, 8]
            found = session.prefill([7, 8], every=True)
            torch.testing.assert_close(found, logits_of(model, tokens)[position:], **CLOSE)
            session.prefill(TOKENS[: len(TOKENS) - session.position])
            session.rewind(position)
            session.prefill(TOKENS[position:])
        with session.fork(4) as early, session.fork(len(TOKENS) - 1) as late:
            for fork in (early, late):
                tokens = [*fork.tokens, 9]
                found = fork.decode(9)
                torch.testing.assert_close(found, logits_of(model, tokens)[-1], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("was_run", [False, True])
def test_rwkv_is_served_with_the_weights_that_it_has(was_run: bool, tmp_path: Path) -> None:
    model = language_model("rwkv")
    if was_run:  # transformers divides some of them then
        logits_of(model, TOKENS[:5])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = dagflow.load(model, store=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    stage = read_stage(loaded.ref, cut_at_layers(loaded.dag, 1).programs[0], torch.device("cpu"))
    found = _feed([stage], _part(0, 40), TOKENS[:40])
    torch.testing.assert_close(found, logits_of(model, TOKENS[:40]), **CLOSE)
