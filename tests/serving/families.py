"""Small causal language models of every family that is served, with windows that matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from zoo import SIZES, build
from zoo.recurrent import RECURRENT

import dagflow


def _mistral() -> Any:
    config = hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    return hf.MistralForCausalLM(config)


def _gemma3() -> Any:
    config = hf.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8)
    return hf.Gemma3ForCausalLM(config)


# Attention that is more than causal, or that a model computes by itself: configuration, model, options.
_TWO = {**SIZES, "num_hidden_layers": 2}
_GROUPED = {**_TWO, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ATTENDING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_GROUPED, **_EXPERTS, "sliding_window": 8}),
    "granite_swa": ("GraniteSWAConfig", "GraniteSWAForCausalLM", {**_GROUPED, "sliding_window": 8}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**_GROUPED, "attention_chunk_size": 8, "intermediate_size_mlp": 64, "moe_layers": []},
    ),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_GPT, "rotary_dim": 4}),
    "gpt1": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", _GPT),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            **{
                n: v
                for n, v in _TWO.items()
                if n not in ("num_hidden_layers", "num_attention_heads")
            },
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    ),
    "falcon_alibi": ("FalconConfig", "FalconForCausalLM", {**_TWO, "alibi": True}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_TWO, "new_decoder_architecture": True}),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", _GROUPED),
    "xglm": (
        "XGLMConfig",
        "XGLMForCausalLM",
        {
            "vocab_size": 96,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "bart": ("BartConfig", "BartForCausalLM", _BART),
    "marian": ("MarianConfig", "MarianForCausalLM", {**_BART, "pad_token_id": 0}),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForCausalLM", _BART),
}


def attending_model(family: str) -> Any:
    """Return a small model of `ATTENDING`, with weights that make it say something."""
    config, cls, options = ATTENDING[family]
    torch.manual_seed(0)
    model: Any = getattr(hf, cls)(getattr(hf, config)(**options))
    model.generation_config.forced_eos_token_id = None  # BART ends every answer with one
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "mixtral", "gpt2", "opt", "bloom")
# Every day those that have something which no other has.
DAILY = ("llama", "gemma3", "mixtral", "gpt2", "bloom")
SOME = [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
_OWN: dict[str, Callable[[], Any]] = {"mistral": _mistral, "gemma3": _gemma3, **RECURRENT}


def language_model(family: str, seed: int = 0) -> Any:
    """Return a model of a family in evaluation mode, with weights that make it say something."""
    torch.manual_seed(seed)
    model: Any = _OWN[family]() if family in _OWN else build(family, seed, num_layers=4).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def stored(family: str, store: Path) -> tuple[Any, dagflow.Model]:
    """Return a model, and the same in a store."""
    model = language_model(family)
    return model, dagflow.load(model, store=store)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return what transformers goes on with, past end tokens."""
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def beam_search(
    model: Any, prompt: list[int], max_new_tokens: int, num_beams: int = 4, **options: Any
) -> list[tuple[list[int], float]]:
    """Return transformers' answers, without what fills them up, and their scores."""
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        tokens: list[int] = row[len(prompt) :].tolist()
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append((tokens[:length], float(score)))
    return answers


@torch.no_grad()
def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the uncut model's logits (T, V)."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
