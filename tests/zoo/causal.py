"""Every family of causal language models of the installed transformers, as tiny as it goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .case import Case, Subject, lively
from .shrink import VOCABULARY, shrunk

GROUP = "causal"
# Whose lengths are tied to something.
_SHAPES = {"reformer": ((3, 64), (5, 64))}
# Decoders of codes, and models whose loss counts on an image before the text.
_CODES, _IMAGES = ("musicgen", "musicgen_melody"), ("git",)


def cases() -> list[Case]:
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    default = ((3, 12), (5, 17))
    return [
        Case(GROUP, name, partial(make, name), _SHAPES.get(name, default), serves=True)
        for name in names
    ]


def make(name: str) -> Subject:
    """Return a family's model, with batches that have padding where it takes a mask."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = shrunk(CONFIG_MAPPING[name])
    for own in (config, config.get_text_config(decoder=True)):
        if "is_decoder" in vars(own):
            own.is_decoder = True  # without it, BERT and the like look ahead
    if name in _CODES:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return Subject(lively(kind(config.decoder)).train(), partial(_codes, config.decoder))
    model: Any = lively(AutoModelForCausalLM.from_config(config))
    taken = set(inspect.signature(model.forward).parameters)
    batch = partial(tokens, "attention_mask" in taken)
    return Subject(model.train(), _with_images(batch, config) if name in _IMAGES else batch)


def _codes(config: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return sound as codes (B, T, C), one of each of C codebooks at a time."""
    return {"labels": torch.randint(7, VOCABULARY - 21, (rows, length, config.num_codebooks))}


def _with_images(batch: Callable[..., Any], config: Any) -> Callable[..., Any]:
    def with_images(rows: int, length: int) -> dict[str, torch.Tensor]:
        size = config.vision_config.image_size
        return {**batch(rows, length), "pixel_values": torch.randn(rows, 3, size, size)}

    return with_images


def tokens(mask: bool, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return tokens of all the vocabulary but the special ones, the last of some rows padding."""
    ids = torch.randint(7, VOCABULARY - 21, (rows, length))
    labels = ids.clone()
    if not mask:
        return {"input_ids": ids, "labels": labels}
    seen = torch.ones_like(ids)
    seen[0, -3:] = 0
    labels[0, -3:] = -100
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}
