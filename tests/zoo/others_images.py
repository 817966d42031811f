"""Models of images and text, asked about both: the images' places among the tokens are given.

How many tokens an image takes the model says itself, where it is given none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .others_inputs import LENGTHS, Tensors, image_sizes
from .shrink import VOCABULARY

# Those that need nothing but pixels and tokens (no grids, no sizes of what images were).
FAMILIES = (
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "florence2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "llava",
    "ovis2",
    "qianfan_ocr",
    "smolvlm",
)
_MISMATCH = re.compile(r"tokens: (\d+), features:? (\d+)")


def with_images(model: torch.nn.Module, config: Any) -> Callable[[int, int], Tensors]:
    """Return what makes batches of text and images on which a model runs.

    Raises
    ------
    Exception
        What the model says of the last batch that was tried.
    """
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", 0)
    taken = set(inspect.signature(model.forward).parameters)
    reason: Exception = ValueError("it takes no images")
    for shape in _shapes(config):
        counts, tried = [0], 0
        while tried < len(counts):
            make = partial(_batch, taken, shape, token, counts[tried])
            tried += 1
            try:
                with torch.no_grad():
                    model(**make(3, 0))
                return make
            except Exception as error:
                reason = error
                found = _MISMATCH.search(str(error))
                if found and tried == 1:  # it counts tokens, or numbers
                    most = int(found[2]) // 3
                    counts += [most, most // 32]
    raise reason


def _shapes(config: Any) -> Iterator[tuple[int, ...]]:
    channels, size = image_sizes(config)
    yield channels, size, size
    yield 1, channels, size, size


def _batch(
    taken: set[str], shape: tuple[int, ...], token: int, count: int, rows: int, longer: int
) -> Tensors:
    ids = torch.randint(7, VOCABULARY - 21, (rows, LENGTHS[longer]))
    ids = torch.cat([torch.full((rows, count), token), ids], 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < count, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {n: t for n, t in found.items() if n in taken} | {
        "pixel_values": torch.randn(rows, *shape)
    }
