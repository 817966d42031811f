"""Lets a trace know whole numbers that a model keeps in tensors: strides, kernel sizes, images' sides.

Code that reads them (``int(self.stride)``) decides by a tensor's value, which a trace otherwise refuses.
A buffer that forward writes is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

# torch itself remembers what is in tensors of one number that forward makes of Python's numbers.
_MOST_NUMBERS = 64


@contextmanager
def known_constants() -> Iterator[None]:
    """Let traces know what is in small tensors that forward makes: ``torch.tensor([height, width])``."""
    with (
        patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_NUMBERS),
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_NUMBERS),
    ):
        yield


def whole_numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's buffers that hold one whole number each."""
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.numel() == 1 and not buffer.is_meta and _is_whole(buffer.dtype)
    }


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def make_known(
    model: torch.nn.Module, numbers: Mapping[str, torch.Tensor]
) -> Callable[[], list[str]]:
    """Let the trace that this is in know what buffers hold, as it knows ``torch.tensor(3)``.

    Returns
    -------
    callable
        Names those of them that have been written since.
    """
    mode = get_proxy_mode()
    buffers = {name: model.get_buffer(name) for name in numbers}
    versions = {name: buffer._version for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        slot = None if mode is None else get_proxy_slot(buffer, mode.tracer, None)
        if slot is not None:
            slot.constant = numbers[name]
    return lambda: [name for name, buffer in buffers.items() if buffer._version != versions[name]]
