"""The demo's GPT: what it computes, apart from any cluster."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dagflow.demo.gpt import GPT, mean_loss, sample
from dagflow.graph.capture import capture
from dagflow.plan.partition import partition


def small_gpt(dropout: float = 0.0) -> GPT:
    return GPT(256, width=32, num_layers=3, num_heads=4, context=16, dropout=dropout)


def token_ids(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length))


def test_without_labels_it_returns_logits() -> None:
    assert small_gpt()(token_ids(2, 9)).shape == (2, 9, 256)


def test_loss_is_the_mean_cross_entropy_of_unshifted_labels() -> None:
    model, ids, labels = small_gpt(), token_ids(), token_ids()
    expected = functional.cross_entropy(model(ids).reshape(-1, 256), labels.reshape(-1))
    torch.testing.assert_close(model(ids, labels), expected)


def test_untrained_it_knows_nothing() -> None:
    loss = small_gpt()(token_ids(8), token_ids(8)).item()
    assert loss == pytest.approx(math.log(256), abs=0.05)


def test_logits_depend_on_no_later_token() -> None:
    model, ids = small_gpt(), token_ids(1)
    changed = ids.clone()
    changed[0, 10:] = 0
    torch.testing.assert_close(model(changed)[0, :10], model(ids)[0, :10])


def test_the_order_of_tokens_matters() -> None:
    model, ids = small_gpt(), torch.tensor([[1, 2, 3]])
    assert not torch.allclose(model(ids)[0, -1], model(ids[:, [1, 0, 2]])[0, -1])


def test_width_must_be_shared_out_among_heads() -> None:
    with pytest.raises(ValueError, match="width 30 is no multiple of num_heads 4"):
        GPT(256, width=30, num_heads=4)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = small_gpt().state_dict()
    torch.manual_seed(3)
    second = small_gpt().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_is_captured_and_cut_into_stages(dropout: float) -> None:
    ids = token_ids()
    dag = capture(small_gpt(dropout), {"input_ids": ids, "labels": ids})
    assert len(partition(dag, 3)) == 3


def test_sample_is_the_same_for_the_same_seed() -> None:
    model, prompt = small_gpt(), token_ids(1, 4)[0]
    first = sample(model, prompt, 20, 1.0, seed=1)
    assert torch.equal(first, sample(model, prompt, 20, 1.0, seed=1))
    assert not torch.equal(first, sample(model, prompt, 20, 1.0, seed=2))


def test_sample_continues_the_prompt_beyond_the_context() -> None:
    model, prompt = small_gpt(), token_ids(1, 4)[0]
    tokens = sample(model, prompt, 30)
    assert tokens.shape == (34,)
    assert torch.equal(tokens[:4], prompt)


def test_sample_at_temperature_0_takes_the_likeliest() -> None:
    model, prompt = small_gpt(), token_ids(1, 4)[0]
    assert sample(model, prompt, 1, temperature=0)[-1] == model(prompt[None])[0, -1].argmax()


def test_sample_leaves_the_model_in_its_mode() -> None:
    model = small_gpt(dropout=0.5).train()
    sample(model, token_ids(1, 4)[0], 2)
    assert model.training


def test_mean_loss_covers_the_tokens_to_the_last() -> None:
    model, tokens = small_gpt(), token_ids(1, 33)[0]
    expected = model(tokens[:32].view(2, 16), tokens[1:].view(2, 16)).item()
    assert mean_loss(model, tokens, num_windows=2) == pytest.approx(expected, rel=1e-5)
