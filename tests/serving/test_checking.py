"""A capture that computes something else than its model is found before anything is stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import dagflow
from dagflow.errors import CaptureFailed, ResultsDiffer
from dagflow.graph import decoder
from dagflow.graph.dag import OperatorDag
from dagflow.graph.decoder import capture_decoder
from dagflow.models import loading
from dagflow.models.checking import _eager_logits, _prompt, check_capture
from dagflow.models.shrinking import shrunk
from dagflow.models.source import of_module
from dagflow_storage import Store

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _model(kind: Any, config: Any) -> Any:
    """Return a fresh model, with the small weights that it is built with."""
    torch.manual_seed(0)
    return kind(config).eval()


def _mistral(window: int | None) -> Any:
    return _model(hf.MistralForCausalLM, hf.MistralConfig(**_SIZES, sliding_window=window))


def _llama4(chunk: int) -> Any:
    config = hf.Llama4TextConfig(
        **_SIZES,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=chunk,
        intermediate_size_mlp=64,
        pad_token_id=0,
    )
    return _model(hf.Llama4ForCausalLM, config)


def _gpt_oss(sinks: float | None) -> Any:
    config = hf.GptOssConfig(
        **_SIZES,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )
    model = _model(hf.GptOssForCausalLM, config)
    if sinks is not None:
        torch.nn.init.constant_(model.model.layers[0].self_attn.sinks, sinks)
    return model


class _WithoutPositions(hf.LlamaForCausalLM):
    """Counts positions from its cache, whatever it is told, as decoders of BART do."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, **options)


class _WithShift(hf.LlamaForCausalLM):
    """Adds the embedding of the token before to each token's: a state beside attention."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **options: Any) -> Any:
        found = self.model.embed_tokens(input_ids)
        before = getattr(past_key_values, "last", torch.zeros_like(found[:, :1]))
        if past_key_values is not None:
            past_key_values.last = found[:, -1:]
        shifted = found + torch.cat([before, found[:, :-1]], 1)
        return super().forward(inputs_embeds=shifted, past_key_values=past_key_values, **options)


def _llama(kind: Any = hf.LlamaForCausalLM, **options: Any) -> Any:
    return _model(kind, hf.LlamaConfig(**{**_SIZES, **options}))


def _weights(model: Any) -> Callable[[str], torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}.__getitem__


def _check(model: Any, as_captured: Any) -> dict[str, Any]:
    """Compare a model with the capture of one from which something is missing."""
    dag: OperatorDag = capture_decoder(as_captured)
    return check_capture(of_module(model), dag, _weights(as_captured), torch.float32)


@pytest.mark.parametrize(
    ("model", "as_captured", "first"),
    [
        (lambda: _mistral(8), lambda: _mistral(None), 8),
        pytest.param(lambda: _llama4(8), lambda: _llama4(64), 8, marks=pytest.mark.slow),
        (lambda: _gpt_oss(None), lambda: _gpt_oss(-1e9), 0),
    ],
    ids=["window", "chunks", "sinks"],
)
def test_attention_without_what_is_its_own_is_found_in_a_fresh_model(
    model: Callable[[], Any], as_captured: Callable[[], Any], first: int
) -> None:
    eager = model()
    with pytest.raises(ResultsDiffer, match=rf"prefill of .* position {first} on") as caught:
        _check(eager, as_captured())
    assert type(eager).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (_WithoutPositions, "int8"),
        (_WithShift, "fp32"),
        pytest.param(_WithShift, "bf16", marks=pytest.mark.slow),
    ],
)
def test_what_is_right_in_a_prefill_and_wrong_token_by_token_is_found(
    kind: Any, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "check_capture", check_capture)
    monkeypatch.setattr(loading, "capture_decoder", capture_decoder)
    # Capturing mends the one and refuses the other by itself.
    monkeypatch.setattr(decoder, "take_positions", lambda dag: dag)
    monkeypatch.setattr(decoder, "check_tokenwise", lambda dag: None)
    with pytest.raises(ResultsDiffer, match="token by token after 24, logits differ"):
        dagflow.load(_llama(kind), store=tmp_path, weights=weights)
    assert not list(tmp_path.glob("models/*"))


def test_the_comparison_can_be_left_out_and_says_what_it_was(tmp_path: Path) -> None:
    model = _llama()
    assert dagflow.load(model, store=tmp_path, check=False).description["check"] is None
    loaded = dagflow.load(model, store=tmp_path)
    found = dagflow.Model.open(Store(str(tmp_path)), loaded.ref.name).description["check"]
    assert found["against"] == "its own weights"
    assert 0 < found["seconds"] < 60
    assert found["largest_difference"] < 1e-5


@pytest.mark.slow
def test_a_model_that_memory_does_not_hold_is_compared_on_a_few_layers_of_its_kind() -> None:
    kinds = ["full_attention", *["sliding_attention"] * 3] * 2
    sizes = {**_SIZES, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    config = hf.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4096, layer_types=kinds)
    model = _model(hf.Gemma3ForCausalLM, config)
    room = 4 * sum(parameter.numel() for parameter in model.parameters()) - 1
    small = shrunk(model, room)
    assert small.config.layer_types == [
        "full_attention",
        *["sliding_attention"] * 2,
        "full_attention",
    ]
    assert small.config.sliding_window == 8
    state = torch.get_rng_state()
    found = check_capture(of_module(model), None, None, torch.float32, room)  # type: ignore[arg-type]
    assert found["against"] == "random weights in 4 layers"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.num_hidden_layers == 8


def test_a_model_that_memory_does_not_hold_in_any_form_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_capture", partial(check_capture, room_bytes=1000))
    with pytest.warns(UserWarning, match="memory doesn't hold"):
        loaded = dagflow.load(_llama(), store=tmp_path)
    assert loaded.description["check"]["against"] is None


def test_a_window_within_reach_is_reached_beyond() -> None:
    tokens, num_prefill = _prompt(_llama4(40))
    assert (len(tokens), num_prefill) == (50, 48)
    assert _prompt(_llama(max_position_embeddings=10))[1] == 8
    assert _prompt(_mistral(4096))[1] == 24


class _Failing(hf.LlamaForCausalLM):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("only on a GPU")


def test_a_model_that_fails_by_itself_is_named() -> None:
    with pytest.raises(CaptureFailed, match=r"_Failing can't be compared.*only on a GPU"):
        _eager_logits(_llama(_Failing), torch.arange(28), 24)


class _Scaled(hf.LlamaForCausalLM):
    """Makes a number where its weights are, as Falcon and Gemma 3n do."""

    def forward(self, *given: Any, **options: Any) -> Any:
        found = super().forward(*given, **options)
        found.logits = found.logits * torch.tensor(0.5, device=self.lm_head.weight.device)
        return found


def test_tensors_that_are_made_where_the_weights_are_have_values(tmp_path: Path) -> None:
    loaded = dagflow.load(_llama(_Scaled), store=tmp_path)
    assert loaded.description["check"]["largest_difference"] < 1e-5
