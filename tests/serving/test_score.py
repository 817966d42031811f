"""Scores and embeddings of texts equal what transformers computes for them one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from distributed import Client

import dagflow
from dagflow.errors import BatchInvalid, SettingsInvalid

TEXTS = [[5, 17, 80], list(range(1, 60)), [3, 3], [9, 8, 7, 6, 5, 4, 3]]


def _eager(name: str) -> torch.nn.Module:
    return zoo.build(name).model.eval()


def _expected(model: torch.nn.Module, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_score_equals_transformers_log_probabilities(
    name: str, client: Client, tmp_path: Path
) -> None:
    eager = _eager(name)
    model = dagflow.load(eager, store=tmp_path)
    found = dagflow.score(model, TEXTS, client=client, tokens_in_flight=16)
    expected = [_expected(eager, row) for row in TEXTS]
    for one, other in zip(found.token_log_probabilities, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    sums = torch.stack([row.sum() for row in expected])
    torch.testing.assert_close(found.log_probabilities, sums, atol=1e-3, rtol=0)
    assert found.num_tokens == sum(len(row) - 1 for row in TEXTS)
    assert found.perplexity == pytest.approx(
        torch.cat(expected).mean().neg().exp().item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "pooling"), [("llama", "last"), ("gemma3", "mean"), ("bloom", "mean")]
)
def test_embedding_is_pooled_from_what_the_head_reads(
    name: str, pooling: str, client: Client, tmp_path: Path
) -> None:
    eager = _eager(name)
    read: list[torch.Tensor] = []
    eager.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    with torch.no_grad():
        for row in TEXTS:
            eager(input_ids=torch.tensor([row]))
    expected = torch.stack([h.mean(0) if pooling == "mean" else h[-1] for h in read])
    eager.get_output_embeddings()._forward_pre_hooks.clear()
    found = dagflow.embed(
        dagflow.load(eager, store=tmp_path), TEXTS, pooling=pooling, client=client
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_deployment_stays_open_and_is_refused_where_its_head_is_in_the_way(
    client: Client, tmp_path: Path
) -> None:
    model = dagflow.load(_eager("llama"), store=tmp_path)
    with dagflow.Deployment(model, client) as deployment:
        first = dagflow.score(deployment, TEXTS)
        second = dagflow.score(deployment, TEXTS)
        assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
        with pytest.raises(SettingsInvalid, match="has its head"):
            dagflow.embed(deployment, TEXTS)
    with dagflow.Deployment(model.without_head(), client) as deployment:
        assert dagflow.embed(deployment, TEXTS).shape == (len(TEXTS), zoo.SIZES["hidden_size"])
        with pytest.raises(SettingsInvalid, match="has none"):
            dagflow.score(deployment, TEXTS)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_session_without_head_returns_hidden_states(
    name: str, client: Client, tmp_path: Path
) -> None:
    eager = _eager(name)
    with torch.no_grad():
        expected = eager(torch.tensor(TEXTS[1:2]), output_hidden_states=True).hidden_states[-1][0]
    model = dagflow.load(eager, store=tmp_path)
    with (
        dagflow.Deployment(model.without_head(), client) as deployment,
        dagflow.Session(deployment) as session,
    ):
        found = [session.hidden(TEXTS[1][:20]), session.hidden(TEXTS[1][20:21])]
        with session.fork() as fork:
            found.append(fork.hidden(TEXTS[1][21:]))
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(SettingsInvalid, match="no logits"):
            session.prefill([1])
        with pytest.raises(SettingsInvalid, match="can't answer"):
            dagflow.generate(deployment, [[1]])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no prompt"),
        ([[1, 2], []], "Text 1 has 0 tokens"),
        ([[1]], "follows nothing"),
        ([[1] * 65], "65 tokens, and the model was made for 64"),
        ([[1, 96]], "vocabulary has 96"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(
    texts: list[list[int]], message: str, client: Client, tmp_path: Path
) -> None:
    model = dagflow.load(_eager("llama"), store=tmp_path)
    with pytest.raises(BatchInvalid, match=message):
        dagflow.score(model, texts, client=client)


def test_settings_without_meaning_are_refused(client: Client, tmp_path: Path) -> None:
    model = dagflow.load(_eager("llama"), store=tmp_path)
    with pytest.raises(SettingsInvalid, match="pooling"):
        dagflow.embed(model, TEXTS, pooling="first", client=client)
    with pytest.raises(SettingsInvalid, match="tokens_in_flight"):
        dagflow.score(model, TEXTS, client=client, tokens_in_flight=0)
