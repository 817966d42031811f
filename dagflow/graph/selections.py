"""What torch functions select and write, and what is asked about numbers of rows, while a model is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.symbol import SymT, symbol_is_type

SELECT = frozenset(("where", "nonzero", "argwhere"))
NO_MASK = frozenset(("as_tuple",))
# What may keep a list's numbers and their order: see `is_same_list`.
RESHAPE = frozenset(("squeeze", "flatten", "view", "reshape", "__getitem__", "select", "to", "cpu"))
# Where the arguments of functions that write at rows have these rows.
INDEX: Mapping[str, int] = {
    **dict.fromkeys(("index_add", "index_copy", "scatter_add"), 2),
    **dict.fromkeys(("index_put", "__setitem__"), 1),
}


def written(name: str, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the tensor that a torch function writes in place, or returns with rows written."""
    writes = name in _IN_PLACE or name in INDEX or (name[:2] != "__" and name.endswith("_"))
    out = kwargs.get("out")
    if isinstance(out, torch.Tensor):
        return out
    if not (writes or kwargs.get("inplace")) or not args or not isinstance(args[0], torch.Tensor):
        return None
    return args[0] if name not in _NO_WRITES else None


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)
_NO_WRITES = frozenset(("requires_grad_", "detach_", "retain_grad_"))


def unknown_sizes(tensor: torch.Tensor) -> set[sympy.Symbol]:
    """Return the symbols of the numbers that depend on data and that a traced tensor has as sizes."""
    sizes: list[Any] = [size for size in tensor.shape if isinstance(size, torch.SymInt)]
    return {symbol for size in sizes for symbol in unknown_in(size.node.expr)}


def unknown_in(expression: Any) -> set[sympy.Symbol]:
    """Return the symbols of numbers that depend on data."""
    found = expression.free_symbols
    return {symbol for symbol in found if symbol_is_type(symbol, SymT.UNBACKED_INT)}


def if_there_are_rows(question: Any, unknown: set[sympy.Symbol]) -> Any:
    """Return the answer to a question that says no more than whether there are rows; else None."""
    if len(unknown) != 1 or question.free_symbols != unknown:
        return None
    (rows,) = unknown
    answers = {question.subs(rows, number) for number in (1, 2, 3, 1 << 20)}
    if len(answers) != 1 or question.subs(rows, 0) in answers:
        return None
    (answer,) = answers
    return answer if answer in (sympy.true, sympy.false) else None


def is_same_list(args: Any, result: torch.Tensor) -> bool:
    """Tell whether a tensor has the numbers of another one that it was made of, in their order."""
    source, *more = args
    is_as_long = bool(statically_known_true(source.numel() == result.numel()))
    is_same_kind = result.dtype == source.dtype and result.dim() in (1, 2)
    by_tensors = any(isinstance(part, torch.Tensor) for part in pytree.tree_leaves(more))
    return is_as_long and is_same_kind and not by_tensors
