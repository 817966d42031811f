"""Lets a trace know whole numbers that a model keeps in tensors: strides, kernel sizes, images' sides.

Code that reads them (``int(self.stride)``) decides by a tensor's value, which a trace otherwise refuses.
A buffer that forward writes is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch._subclasses import fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

# torch itself remembers what is in tensors of one number that forward makes of Python's numbers.
_MOST_NUMBERS = 64


@contextmanager
def known_constants() -> Iterator[None]:
    """Let traces know what is in small tensors that forward makes: ``torch.tensor([height, width])``.

    torch forgets the numbers of a tensor that unknown ones are written into, and not those of tensors
    that share its memory: this does.
    """
    traced_call = proxy_tensor.proxy_call

    def call(mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:
        if not func._schema.is_mutable:
            return traced_call(mode, func, pre_dispatch, args, kwargs)
        before = _slots(mode.tracer, (args, kwargs))
        known = [slot.constant for slot in before if slot.constant is not None]
        result = traced_call(mode, func, pre_dispatch, args, kwargs)
        after = _slots(mode.tracer, (args, kwargs))
        if known and any(slot.constant is None for slot in (*before, *after)):
            _forget(mode.tracer, known)
        return result

    with (
        patch.object(proxy_tensor, "proxy_call", call),
        patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_NUMBERS),
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _MOST_NUMBERS),
    ):
        yield


def _slots(tracer: Any, tree: Any) -> list[Any]:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    found = [get_proxy_slot(tensor, tracer, None) for tensor in tensors]
    return [slot for slot in found if slot is not None]


def _forget(tracer: Any, constants: Sequence[torch.Tensor]) -> None:
    """Forget the numbers of all tensors that share memory with some."""
    places = {constant.untyped_storage().data_ptr() for constant in constants}
    for slot in tracer.tensor_tracker.values():
        if slot.constant is not None and slot.constant.untyped_storage().data_ptr() in places:
            slot.constant = None


def is_known_number(tensor: Any) -> bool:
    """Tell whether a trace knows what is in a tensor of one number."""
    is_traced = isinstance(tensor, fake_tensor.FakeTensor)
    return is_traced and not tensor.dim() and tensor.constant is not None


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
