"""Leaves masks that mask nothing out of a trace, as transformers leaves them out of a forward.

While it is traced transformers makes a mask even where no batch brings one: attention then takes another
kernel than it takes eagerly, and models whose layers shorten their sequences fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.fx.experimental.symbolic_shapes import statically_known_true


@contextmanager
def without_needless_masks() -> Iterator[None]:
    """While a model is traced: no mask where the batch has none and attention looks everywhere."""
    masking = sys.modules.get("transformers.masking_utils")
    with ExitStack() as stack:
        for name, ours in (
            ("_ignore_causal_mask_sdpa", _ignored_causal),
            ("_ignore_bidirectional_mask_sdpa", _ignored),
        ):
            original = getattr(masking, name, None)
            if original is not None:
                stack.enter_context(patch.object(masking, name, ours(original)))
        yield


def _ignored(original: Callable[..., bool]) -> Callable[..., bool]:
    def ignore(
        padding_mask: Any, kv_length: Any, local_attention_size: Any = None, **more: Any
    ) -> bool:
        if padding_mask is None and local_attention_size is None:
            return True
        return original(padding_mask, kv_length, local_attention_size, **more)

    return ignore


def _ignored_causal(original: Callable[..., bool]) -> Callable[..., bool]:
    def ignore(padding_mask: Any, q_length: Any, kv_length: Any, *args: Any, **more: Any) -> bool:
        # The offsets of queries and keys, and a layer's window.
        others = (*args, *more.values())
        plain = all(value is None or (type(value) is int and value == 0) for value in others)
        if padding_mask is None and plain and statically_known_true(q_length == kv_length):
            return True
        return original(padding_mask, q_length, kv_length, *args, **more)

    return ignore
