"""A model of the same configuration that is small enough to try things on."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dagflow.models.weight_files import empty_weights

# In what configurations call how far a token sees.
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "local_attention_window",
    "attention_window_size",
)
_SMALL_WINDOW = 8
_OF_A_KIND = 2
# Where nothing says which kinds there are (a first layer without experts, every second with a window).
_LAYERS = 4


def windows(config: Any) -> list[int]:
    """Return how far tokens see in those layers in which they don't see everything."""
    found = [getattr(config, name, None) for name in _WINDOWS]
    return [window for window in found if isinstance(window, int) and window > 0]


def shrunk(model: Any, room_bytes: int) -> Any | None:
    """Return a model with two layers of each kind, windows of 8 tokens, and random weights.

    None if even that takes more memory than there is room.
    """
    config = copy.deepcopy(model.config)
    _shrink(config.get_text_config(decoder=True))
    with empty_weights():
        outline = type(model)(copy.deepcopy(config))
    if 4 * sum(parameter.numel() for parameter in outline.parameters()) > room_bytes:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = type(model)._from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in small.parameters():
                # Larger than a fresh model's, and none is zero: attention and biases make a difference.
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
                parameter.add_(0.05 * torch.randn_like(parameter))
    return small.eval()


def _shrink(config: Any) -> None:
    count = config.num_hidden_layers
    by_layer = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    chosen = _two_of_each(list(zip(*map(_hashable, by_layer.values()), strict=True)), count)
    config.num_hidden_layers = len(chosen)
    for name, value in by_layer.items():
        setattr(config, name, [value[layer] for layer in chosen])
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window > _SMALL_WINDOW:
            setattr(config, name, _SMALL_WINDOW)


def _hashable(values: Any) -> list[str]:
    return [str(value) for value in values]


def _two_of_each(kinds: list[tuple[str, ...]], count: int) -> list[int]:
    """Return the numbers of the layers to keep.

    >>> _two_of_each([("a",), ("a",), ("a",), ("b",)], 4)
    [0, 1, 3]
    """
    if not kinds:
        return list(range(min(_LAYERS, count)))
    return [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < _OF_A_KIND]
