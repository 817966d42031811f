"""Stages of a decoder, in this process: what they compute, send on, and send again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import SOME, language_model, logits_of

from dagflow.graph.decoder import capture_decoder
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow_tasks.decode.decoder_stage import (
    ALL,
    LAST,
    NOTHING,
    DecoderStage,
    Part,
    join,
    select,
    split_logits,
)
from dagflow_tasks.errors import TaskFailed
from dagflow_tasks.tensors import TensorDict

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
CPU = torch.device("cpu")


@cache
def _captured(family: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    model = language_model(family)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= dict(model.state_dict(keep_vars=True))
    return model, capture_decoder(model), {n: t.detach().clone() for n, t in tensors.items()}


def _stages(family: str, count: int) -> list[DecoderStage]:
    _, dag, weights = _captured(family)
    return [DecoderStage(program, CPU, weights) for program in cut_at_layers(dag, count)]


def _part(start: int, count: int, want: str = ALL, session: str = "a", epoch: int = 0) -> Part:
    return Part(session, epoch, start, count, start, want)


def _feed(stages: list[DecoderStage], part: Part, tokens: list[int]) -> torch.Tensor:
    """Send one session's tokens through stages, and return the logits."""
    values = TensorDict({"in.tokens": torch.tensor(tokens)})
    parts = [part]
    for stage in stages:
        parts, values = stage.run(parts, values)
    return values["logits"]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_stages_together_equal_the_uncut_model(family: str, num_stages: int) -> None:
    stages = _stages(family, num_stages)
    assert len(stages) == num_stages
    found = [_feed(stages, _part(0, 7), TOKENS[:7]), _feed(stages, _part(7, 5), TOKENS[7:])]
    wanted = logits_of(_captured(family)[0], TOKENS)
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_token_by_token_equals_the_whole_sequence(family: str) -> None:
    stages = _stages(family, 2)
    found = [_feed(stages, _part(i, 1), [token]) for i, token in enumerate(TOKENS)]
    wanted = logits_of(_captured(family)[0], TOKENS)
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_replaced_stage_goes_on_from_what_was_sent_before(lost: int) -> None:
    stages = _stages("llama", 3)
    _feed(stages, _part(0, 8), TOKENS[:8])
    computed = [stage.num_tokens for stage in stages]
    stages[lost] = _stages("llama", 3)[lost]
    if lost == 0:
        given = TensorDict({"in.tokens": torch.tensor(TOKENS[:8])})
        part = Part("a", 0, 0, 8, 8, NOTHING)
    else:
        sent = stages[lost - 1].resend("a", 8, NOTHING)
        assert sent is not None
        part, given = sent
    done, outputs = stages[lost].run([part], given)
    if lost < 2:
        assert select(done, outputs, everything=False)[0] == []
    found = _feed(stages, _part(8, 4), TOKENS[8:])
    wanted = logits_of(_captured("llama")[0], TOKENS)[8:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    others = [s.num_tokens - before for s, before in zip(stages, computed, strict=True)]
    assert [n for i, n in enumerate(others) if i != lost] == [4, 4]


@pytest.mark.parametrize(
    ("deliver", "want", "rows"), [(0, ALL, 8), (5, ALL, 3), (5, LAST, 1), (8, ALL, 0), (8, LAST, 0)]
)
def test_only_what_is_to_be_delivered_is_answered(deliver: int, want: str, rows: int) -> None:
    [stage] = _stages("llama", 1)
    found = _feed([stage], Part("a", 0, 0, 8, deliver, want), TOKENS[:8])
    wanted = logits_of(_captured("llama")[0], TOKENS[:8])[8 - rows :]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_pass_of_several_sessions_gives_each_its_own_logits() -> None:
    stages = _stages("llama", 2)
    _feed(stages, _part(0, 4, NOTHING), TOKENS[:4])
    passes = [
        ([_part(4, 2, ALL)], {"in.tokens": torch.tensor(TOKENS[4:6])}),
        ([_part(0, 3, NOTHING, "b")], {"in.tokens": torch.tensor(TOKENS[:3])}),
        ([_part(0, 5, LAST, "c")], {"in.tokens": torch.tensor(TOKENS[:5])}),
    ]
    parts, values = join(passes)
    for stage in stages:
        parts, values = stage.run(parts, values)
    found = {part.session: logits for part, logits in split_logits(parts, values["logits"])}
    wanted = logits_of(_captured("llama")[0], TOKENS)
    torch.testing.assert_close(found["a"], wanted[4:6], atol=1e-4, rtol=1e-4)
    assert len(found["b"]) == 0
    torch.testing.assert_close(found["c"], wanted[4:5], atol=1e-4, rtol=1e-4)


def test_select_leaves_out_what_was_delivered() -> None:
    parts = [Part("a", 0, 0, 4, 3, LAST), Part("b", 0, 0, 2, 2, LAST), Part("c", 0, 5, 1, 0, LAST)]
    values = {"x": torch.arange(7)}
    kept, found = select(parts, values, everything=False)
    assert [(p.session, p.start, p.count) for p in kept] == [("a", 3, 1), ("c", 5, 1)]
    assert found["x"].tolist() == [3, 6]
    assert select(parts, values, everything=True)[0] == parts


def test_a_new_epoch_cuts_off_what_was_rewound() -> None:
    stages = _stages("llama", 2)
    _feed(stages, _part(0, 10), TOKENS[:10])
    found = _feed(stages, _part(6, 2, epoch=1), [50, 51])
    wanted = logits_of(_captured("llama")[0], [*TOKENS[:6], 50, 51])[6:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    sent = stages[0].resend("a", 0, ALL)
    assert sent is not None
    assert (sent[0].epoch, sent[0].end) == (1, 8)


def test_gaps_and_what_is_over_are_not_taken() -> None:
    [stage] = _stages("llama", 1)
    _feed([stage], _part(0, 4, epoch=1), TOKENS[:4])
    assert stage.accepts(_part(4, 1, epoch=1))
    assert not stage.accepts(_part(5, 1, epoch=1))
    assert not stage.accepts(_part(1, 1, session="new"))
    assert stage.is_over(_part(4, 1, epoch=0))
    with pytest.raises(TaskFailed, match="from 6 on"):
        _feed([stage], _part(6, 1, epoch=1), [1])
    stage.close("a")
    assert stage.is_over(_part(0, 1, epoch=1))
    assert stage.num_cache_bytes == 0


def test_forks_go_on_by_themselves_and_can_be_sent_again() -> None:
    stages = _stages("llama", 2)
    _feed(stages, _part(0, 8), TOKENS[:8])
    assert all(stage.fork("a", "b", 5) for stage in stages)
    assert not stages[0].fork("a", "c", 9)
    found = _feed(stages, _part(5, 1, session="b"), [40])
    wanted = logits_of(_captured("llama")[0], [*TOKENS[:5], 40])[5:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    sent = stages[0].resend("b", 0, LAST)
    assert sent is not None
    fresh = _stages("llama", 2)[1]
    _, outputs = fresh.run([sent[0]], sent[1])
    torch.testing.assert_close(outputs["logits"], wanted, atol=1e-4, rtol=1e-4)


def test_a_fork_that_comes_after_its_own_end_leaves_nothing() -> None:
    """The driver tells each stage of the end; the fork goes from stage to stage, and may be later."""
    [stage] = _stages("llama", 1)
    _feed([stage], _part(0, 8), TOKENS[:8])
    stage.close("b")
    assert stage.fork("a", "b", 5)
    assert list(stage.sessions) == ["a"]


def test_a_session_takes_over_what_another_has_and_it_has_not() -> None:
    stages = _stages("llama", 2)
    model = _captured("llama")[0]
    _feed(stages, _part(0, 8), TOKENS[:8])
    # A new one takes all, with its first token ...
    new = Part("b", 1, 8, 1, 8, ALL, "a", 0, 0)
    found = _feed(stages, new, [40])
    torch.testing.assert_close(found, logits_of(model, [*TOKENS[:8], 40])[8:], atol=1e-4, rtol=1e-4)
    _feed(stages, _part(8, 1), [50])
    # ... and later what differs; the same part once more takes nothing.
    again = Part("b", 2, 9, 1, 9, ALL, "a", 0, 8)
    wanted = logits_of(model, [*TOKENS[:8], 50, 60])[9:]
    torch.testing.assert_close(_feed(stages, again, [60]), wanted, atol=1e-4, rtol=1e-4)
    _feed(stages, _part(8, 1, epoch=1), [70])
    torch.testing.assert_close(_feed(stages, again, [60]), wanted, atol=1e-4, rtol=1e-4)
    sent = stages[0].resend("b", 0, LAST)
    assert sent is not None
    _, outputs = _stages("llama", 2)[1].run([sent[0]], sent[1])
    torch.testing.assert_close(outputs["logits"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "part",
    [
        Part("b", 1, 9, 1, 9, ALL, "a", 0, 0),  # the origin is shorter
        Part("b", 1, 8, 1, 8, ALL, "a", 1, 0),  # it has been rewound since
        Part("b", 1, 8, 1, 8, ALL, "a", 0, 3),  # the new one lacks what both have
        Part("b", 1, 8, 1, 8, ALL, "c", 0, 0),  # there is none
        Part("a", 2, 8, 1, 8, ALL, "b", 0, 4),  # an epoch was missed
    ],
)
def test_what_cannot_be_taken_over_is_a_gap(part: Part) -> None:
    [stage] = _stages("llama", 1)
    _feed([stage], _part(0, 8), TOKENS[:8])
    assert not stage.accepts(part)
