"""How a tensor lies in memory, as a few numbers that travel beside its values.

Kernels add up in the order of memory, and take another path, with another rounding, for other
strides: channels last, a slice of something wider, a dimension that was only expanded. So a value
that has crossed a boundary, or comes back from the store, lies as it lay where it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from dagflow_storage import ALIGNMENT_BYTES
from dagflow_storage.place import fields
from dagflow_tasks.limits import RECEIVING

Layout = Mapping[str, Any]
"""JSON: `shape`, `strides` and `offset` (elements behind an aligned address), and `conj` and `neg`,
the two flags by which torch puts off negating (imaginary parts of) numbers."""


def layout_of(tensor: torch.Tensor) -> Layout | None:
    """Return how a tensor lies; None for what is contiguous and aligned, as most tensors are."""
    conj, neg = tensor.is_conj(), tensor.is_neg()
    shape, strides = tuple(tensor.shape), tensor.stride()
    offset = tensor.data_ptr() % ALIGNMENT_BYTES // tensor.element_size()
    if not tensor.numel() or not (conj or neg or offset or strides != contiguous_strides(shape)):
        return None
    return {
        "shape": list(shape),
        "strides": list(strides),
        "offset": offset,
        "conj": conj,
        "neg": neg,
    }


def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, Layout | None]:
    """Return a tensor's elements in contiguous memory, and what `unpack` needs besides.

    Elements that an expanded tensor repeats are there once. Copies only what has gaps between its
    elements; whatever order the dimensions of the rest have, its memory is returned as it is.
    """
    tensor = tensor.detach()
    layout = layout_of(tensor)
    if layout is None:
        return tensor.contiguous(), None
    if layout["conj"]:
        tensor = tensor.conj()
    if layout["neg"]:
        tensor = torch._neg_view(tensor)
    once = _once(tensor)
    in_order = once.permute(_order(once.stride()))
    return (in_order if in_order.is_contiguous() else once.contiguous()), layout


def checked_layout(layout: Any, shape: Sequence[int], dtype: torch.dtype) -> Layout | None:
    """Return a layout from elsewhere if `unpack` can follow it for packed elements of such a shape.

    Raises
    ------
    ValueError
        If it isn't one, is another tensor's, or would take more memory than is given to it.
    """
    if layout is None:
        return None
    given = fields.members(layout, "a layout")
    if set(given) != {"shape", "strides", "offset", "conj", "neg"}:
        raise ValueError(f"a layout has {fields.shown(sorted(given))}")
    sizes = fields.shape(given["shape"], "a layout's shape", dtype.itemsize)
    strides = tuple(
        fields.integer(s, "a stride") for s in fields.items(given["strides"], "strides")
    )
    offset = fields.integer(given["offset"], "a layout's offset", most=ALIGNMENT_BYTES)
    if len(strides) != len(sizes):
        raise ValueError(f"a layout has {len(sizes)} sizes and {len(strides)} strides")
    once = _once_shape(sizes, strides)
    if prod(once) != prod(shape) or not prod(sizes):
        raise ValueError(f"a layout of {list(sizes)} is said of a tensor of {list(shape)}")
    if fields.flag(given["conj"], "conj") and not dtype.is_complex:
        raise ValueError(f"a layout has {dtype} conjugated")
    if fields.flag(given["neg"], "neg") and not (dtype.is_complex or dtype.is_floating_point):
        raise ValueError(f"a layout has {dtype} negated")
    RECEIVING.admit((offset + _span(once, strides)) * dtype.itemsize, "a tensor's layout")
    return {**given, "shape": list(sizes), "strides": list(strides)}


def unpack(packed: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    """Return the tensor that `pack` was given, to the bit and to the stride.

    Copies only if there are gaps between the elements, or unaligned memory before them.
    """
    if layout is None:
        return packed
    shape, strides, offset = layout["shape"], layout["strides"], layout["offset"]
    once = _once_shape(shape, strides)
    is_dense = _is_dense(once, strides)
    memory = packed.reshape(-1)
    if offset or not is_dense:
        # Zeros between elements: programs may look there, and mustn't find what was there before.
        make = packed.new_empty if is_dense else packed.new_zeros
        memory = make(offset + _span(once, strides))[offset:]
        if is_dense:
            memory.copy_(packed.reshape(-1))
        else:
            memory.as_strided(once, strides).copy_(packed.reshape(once))
    tensor = memory.as_strided(shape, strides)
    if layout["neg"]:
        tensor = torch._neg_view(tensor)
    return tensor.conj() if layout["conj"] else tensor


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that lies as the tensor does; torch's `clone` closes gaps."""
    packed, layout = pack(tensor)
    own = packed.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    return unpack(packed if own else packed.clone(), layout)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on a device, where it lies as it did; itself if it is there."""
    if tensor.device == device:
        return tensor
    packed, layout = pack(tensor)
    return unpack(packed.to(device), layout)


def with_strides(tensor: torch.Tensor, strides: Sequence[int] | None) -> torch.Tensor:
    """Return the tensor with other strides, a copy unless it has these; None leaves it as it is."""
    if strides is None or tensor.stride() == tuple(strides) or not tensor.numel():
        return tensor
    once = _once_shape(tensor.shape, strides)
    make = tensor.new_empty if _is_dense(once, strides) else tensor.new_zeros  # as in `unpack`
    memory = make(_span(once, strides))
    first = tensor.as_strided(once, tensor.stride())
    memory.as_strided(once, strides).copy_(first)
    return memory.as_strided(tensor.shape, strides)


def odd_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return a tensor's strides if they aren't those of a contiguous one."""
    strides = tensor.stride()
    return None if strides == contiguous_strides(tensor.shape) else strides


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides that torch gives to a new tensor.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Return each element once: expanded dimensions at size 1."""
    shape = _once_shape(tensor.shape, tensor.stride())
    return tensor.as_strided(shape, tensor.stride())


def _once_shape(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [size if stride else min(size, 1) for size, stride in zip(shape, strides, strict=True)]


def _order(strides: Sequence[int]) -> list[int]:
    """Return the dimensions from the slowest in memory to the fastest."""
    return sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether elements lie side by side, in some order of the dimensions."""
    expected = 1
    for dim in reversed(_order(strides)):
        if shape[dim] > 1 and strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements of memory lie between a tensor's first element and its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
