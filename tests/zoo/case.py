"""One model of the zoo: how to make it, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IDIOMS = "idioms"

# What an idiom may be. Refused in words, or right: which of both is up to dagflow. Warned: computed
# otherwise than torch does, as a warning at capture says.
RIGHT, REFUSED, EITHER, WARNED = "right", "refused", "right or refused", "right, refused or warned"


@dataclass(frozen=True)
class Subject:
    """A model in training mode, how to make a batch of a shape, and its loss if it has none."""

    model: nn.Module
    batch: Callable[..., Any]
    loss: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class Case:
    """What the zoo tries.

    Attributes
    ----------
    group, name : str
    make : callable
        Returns the subject; imports what it needs. Called with torch's generator seeded.
    shapes : pair of tuples
        Two shapes of batches, (rows, ...); the model is captured at the first.
    cuts : tuple
        Numbers of stages to compare with one; None is one operator a stage.
    serves : bool
        Whether it is a causal language model of transformers, to be loaded and decoded as well.
    expected : str
        Which verdicts will do: `RIGHT`, `REFUSED`, `EITHER` or `WARNED`.
    """

    group: str
    name: str
    make: Callable[[], Subject]
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((3, 12), (5, 17))
    cuts: tuple[int | None, ...] = (2, 3)
    serves: bool = False
    expected: str = RIGHT


def scalar_of(output: Any) -> torch.Tensor:
    """Return the loss from whatever form a model or loss function has it in."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "loss" in output:
        return scalar_of(output["loss"])
    if isinstance(output, (tuple, list)):
        return scalar_of(output[0])
    return scalar_of(output.loss)


def lively(model: nn.Module) -> nn.Module:
    """Give every weight a part in the result, in place: fresh models hide what they do wrong.

    Attention with weights of 0.02 is nearly uniform, zero biases, sinks and gates do nothing, and
    what a model's own initialisation leaves out is whatever was in memory.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            garbage = ~torch.isfinite(parameter) | (parameter.abs() > 1e3)
            parameter.masked_fill_(garbage, 0.0)
            if parameter.dim() > 1 and parameter.numel() > 1:
                spread = float(parameter.std())
                parameter.mul_(min(0.12 / spread, 6.0) if 0.0 < spread < 0.12 else 1.0)
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return model
