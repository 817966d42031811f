"""FLOPs of one operator: torch's own formulas, extended where it has none.

Composite operators (`linear`, `matmul`, `conv2d`, `scaled_dot_product_attention`) are run on meta
tensors, which cost nothing, under torch's flop counter; it sees the matrix products inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dagflow_tasks.program.operators import resolve

# Elementwise and reducing operators: FLOPs an element of the largest tensor. Rough, and only
# relative to each other: next to a matrix product they hardly count.
_FLOPS_PER_ELEMENT = {
    "layer_norm": 8,
    "batch_norm": 8,
    "softmax": 5,
    "gelu": 8,
    "tanh": 4,
    "dropout": 2,
}

# fmt: off
_VIEWS = frozenset([
    "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "chunk", "detach", "detach_", "t", "getitem", "flatten", "alias", "contiguous", "to",
    "type_as", "lift_fresh_copy", "unbind", "narrow", "as_strided", "unflatten",
    "broadcast_tensors", "broadcast_to", "expand_as", "view_as",
])
# fmt: on


def is_view(op: str) -> bool:
    """Tell whether the operator usually moves no data."""
    return _short(op) in _VIEWS


def operator_flops(op: str, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> int:
    """Return the FLOPs of one call.

    Parameters
    ----------
    op : str
        Operator name as in programs.
    args, kwargs
        Arguments, with meta tensors of concrete sizes for tensors.
    output
        The call's result as meta tensors.
    """
    if is_view(op):
        return 0
    special = _EXTENDED.get(_short(op))
    if special is not None:
        return special(args)
    counted = _counted(op, args, kwargs) if _may_multiply(op) else 0
    largest = max((t.numel() for t in _tensors([args, output])), default=0)
    return counted or largest * _FLOPS_PER_ELEMENT.get(_short(op), 1)


@cache
def _may_multiply(op: str) -> bool:
    """Tell whether torch counts an operator, or it is made of others that it might count."""
    function = resolve(op)
    if not isinstance(function, torch._ops.OpOverload):
        return True
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return (
        function._overloadpacket in flop_registry
        or composite in function.py_kernels
        or function.has_kernel_for_dispatch_key(composite)
    )


def _counted(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            resolve(op)(*args, **kwargs)
        return int(counter.get_total_flops())
    except Exception:
        return 0


def _short(op: str) -> str:
    return op.split(".")[1] if "." in op else op


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []


def _recurrent(args: Sequence[Any]) -> int:
    """Matrix products of LSTM, GRU and plain recurrences: every weight matrix, every time step."""
    data, _, weights = args[:3]
    rows = data.shape[0] * data.shape[1]
    return sum(2 * rows * weight.numel() for weight in weights if weight.dim() == 2)


def _grouped(args: Sequence[Any]) -> int:
    rows, weight = args[0], args[1]
    return int(2 * rows.shape[0] * weight.shape[1] * weight.shape[2])


_EXTENDED: dict[str, Callable[[Sequence[Any]], int]] = {
    "embedding": lambda args: 0,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "grouped_mm_fallback": _grouped,
}
