"""What torch.export's nodes are, as far as translating them asks."""

from __future__ import annotations

from typing import Any

import torch

from dagflow.graph.dag import dtype_bytes
from dagflow.graph.sizes import SIZE_CALLS

SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


# Nodes that only say what the ranges of the symbols say already.
_RANGE_CHECKS = ("sym_constrain_range", "_assert_scalar", "sym_constrain_range_for_size")


def is_node(value: Any) -> bool:
    return isinstance(value, torch.fx.Node)


def is_number(node: torch.fx.Node) -> bool:
    """Tell whether a node computes a size, or a number from sizes, and no tensor."""
    value = node.meta.get("val")
    return isinstance(value, (*SYMBOLIC, int, float)) or node.target in SIZE_CALLS


def is_unread_selection(node: torch.fx.Node) -> bool:
    """Tell whether a node selects by a mask, for nobody: see `dagflow.graph.whole`."""

    def is_unread(node: torch.fx.Node) -> bool:
        return all(
            is_range_check(user) or (is_number(user) and is_unread(user)) for user in node.users
        )

    return str(node.target) in ("aten.masked_select.default", "aten.index.Tensor") and is_unread(
        node
    )


def is_range_check(node: torch.fx.Node) -> bool:
    return any(word in str(node.target) for word in _RANGE_CHECKS)


def symbolic_sizes(node: torch.fx.Node) -> list[Any]:
    value = node.meta.get("val")
    if node.op != "placeholder" or not isinstance(value, torch.Tensor):
        return []
    return [size for size in value.shape if isinstance(size, torch.SymInt)]


def is_dropout_off(node: torch.fx.Node) -> bool:
    """Tell whether an operator is a dropout that returns its input itself.

    The tracer finds such operators by itself and gives what comes later their name alone, but for
    dropout, which it keeps whole. Behind a cut two names of one tensor would be two tensors, each
    with a gradient of its own: their sum would have another order than without the cut.
    """
    if str(node.target) != "aten.dropout.default":
        return False
    given = dict(zip(("input", "p", "train"), node.args, strict=False)) | node.kwargs
    return bool(given["train"] is False or given["p"] == 0)


def bytes_of(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * dtype_bytes(str(tree.dtype).removeprefix("torch."))
    if isinstance(tree, (list, tuple)):
        return sum(bytes_of(item) for item in tree)
    return 0
