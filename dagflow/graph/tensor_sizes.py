"""Lets a trace know whole numbers that forward computes of sizes in tensors: ``torch.div(T, 2, ...)``.

Models calculate with sizes by torch's functions as well as by Python's, and take what comes out for sizes
again. torch knows tensors' shapes while it traces, and of such a tensor no more than of any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def note_size(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Remember the number in a tensor that a torch function has computed of sizes and known numbers."""
    compute = _OPERATIONS.get(name)
    if compute is None or not _is_one_number(result):
        return
    numbers = [_number(argument) for argument in args]
    if not numbers or any(number is None for number in numbers):
        return
    rounding = kwargs.get("rounding_mode")
    if name == "div":
        # Python's division rounds down, as truncation does where nothing is negative.
        is_whole = rounding == "floor" or (rounding == "trunc" and all(map(_is_natural, numbers)))
        if not is_whole or len(numbers) != 2:
            return
    elif set(kwargs) - {"dtype", "device"}:
        return
    result.item_memo = compute(*numbers)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "tensor": operator.pos,
    "div": operator.floordiv,
    "floor_divide": operator.floordiv,
    "__floordiv__": operator.floordiv,
    "__rfloordiv__": lambda a, b: b // a,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "__rsub__": lambda a, b: b - a,
    "neg": operator.neg,
}


def _number(argument: Any) -> Any:
    """Return the whole number that an argument is, or holds if a trace knows it; else None."""
    if isinstance(argument, (int, torch.SymInt)) and not isinstance(argument, bool):
        return argument
    if not _is_one_number(argument):
        return None
    if argument.constant is not None:
        return int(argument.constant)
    return argument.item_memo


def _is_one_number(value: Any) -> bool:
    is_alone = isinstance(value, FakeTensor) and not value.dim()
    return is_alone and value.dtype in (torch.int32, torch.int64)


def _is_natural(number: Any) -> bool:
    return bool(statically_known_true(number >= 0))
