"""Every other family of transformers: encoders, seq2seq, vision, audio, and models of several of these.

The head is the first of `_HEADS` that a family has, so that it brings its own loss; without one a
scalar is made of the base model's output. Models of images and text are asked about text, and some
about images as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from . import others_images
from .case import Case, Subject, lively
from .others_inputs import Batch, batches
from .shrink import shrunk

GROUP = "others"
# Heads whose loss is a graph: matching boxes by scipy isn't, and heads that generate have none.
_HEADS = (
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
    "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING",
)
_OF_CAUSAL_FAMILIES = ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


def cases() -> list[Case]:
    shapes = (3, 0), (5, 1)
    return [
        *(
            Case(GROUP, name, partial(make, name, head), shapes)
            for name, head in families().items()
        ),
        *(
            Case(GROUP, f"{name} with images", partial(make_with_images, name), shapes)
            for name in others_images.FAMILIES
        ),
    ]


def families() -> dict[str, str]:
    """Return the head of each family; "" for the base model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found: dict[str, str] = {}
    for name in CONFIG_MAPPING:
        heads = _OF_CAUSAL_FAMILIES if name in causal else _HEADS
        mine = [h for h in heads if name in getattr(auto, f"MODEL_FOR_{h}_MAPPING_NAMES")]
        if mine:
            found[name] = mine[0]
        elif name in auto.MODEL_MAPPING_NAMES and name not in causal:
            found[name] = ""
    return found


def make(name: str, head: str) -> Subject:
    """Return a family's model with batches on which it runs."""
    model, config = _built(name, head)
    return _with_batches(model, config, head)


def make_with_images(name: str) -> Subject:
    """Return a model of images and text with batches of both."""
    model, config = _built(name, "IMAGE_TEXT_TO_TEXT")
    return Subject(model, others_images.with_images(model, config))


def _built(name: str, head: str) -> tuple[nn.Module, Any]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    config = shrunk(CONFIG_MAPPING[name])
    if head == "MASKED_LM" and getattr(config, "is_decoder", False):
        config.is_decoder = False
    mapping = getattr(auto, f"MODEL_FOR_{head}_MAPPING" if head else "MODEL_MAPPING")
    model_class = mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    return lively(model_class(config)).train(), config


def _with_batches(model: nn.Module, config: Any, head: str) -> Subject:
    """Try the batches that might fit, with labels first; the first that runs is taken."""
    reasons = []
    taken = set(inspect.signature(model.forward).parameters)
    for batch in batches(model, config, head, taken):
        for subject in _subjects(model, batch):
            try:
                with torch.no_grad():
                    loss = subject.model(**subject.batch(3, 0))
                    value = loss if isinstance(loss, torch.Tensor) else loss.loss
                    if value is not None and value.dim() == 0:
                        return subject
            except Exception as error:
                reasons.append(error)
    raise reasons[0] if reasons else ValueError("it takes nothing that the zoo has")


def _subjects(model: nn.Module, batch: Batch) -> Iterator[Subject]:
    if batch.labels is not None:
        yield Subject(model, batch.labelled)
    yield Subject(ScalarOutput(model), batch.plain)


class ScalarOutput(nn.Module):
    """A model whose output becomes a scalar: each of its numbers has another part in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        tensors = list(_floats(self.model(**inputs)))[:4]
        if not tensors:
            raise ValueError("its output has no tensor of floats")
        return torch.stack([_scalar(tensor) for tensor in tensors]).mean()


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.float().reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    weights = torch.cos(torch.arange(flat.shape[1], dtype=torch.float32, device=flat.device))
    # By the logarithm, so that a few steps don't end in infinity.
    return (flat * weights).mean(1).square().log1p().mean()


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of floats that depend on parameters."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and (output.requires_grad or not torch.is_grad_enabled()):
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floats(value)
