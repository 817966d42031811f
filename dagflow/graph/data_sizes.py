"""Sizes that data decides: how many rows an expert's tokens are.

A program holds no such number, and needs none: what selects rows (`torch.where(mask)`) and what is
computed of them takes as many as there are. In an operator DAG their number is written as an estimate,
``["about", size]``, which costs are reckoned with. Values of such a size never leave a stage, and what is
computed of selected rows is put back at rows before anything else is: a sum over them, a mean above all,
is refused as what a micro-batch's share of it is can't be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

ABOUT = "about"
_SELECTS = frozenset(
    (
        "aten.where.default",
        "aten.nonzero.default",
        "aten.nonzero_numpy.default",
        "aten.argwhere.default",
    )
)
# By a mask, as their second argument or in it.
_BY_MASK = frozenset(("aten.index.Tensor", "aten.masked_select.default"))
_AT_ROWS = frozenset(("index_add", "index_put", "index_copy", "scatter_add", "masked_scatter"))
_SPLIT = "aten.split_with_sizes.default"


def is_of_data(size: Any) -> bool:
    """Tell whether a size expression is an estimate of what data decides."""
    if not isinstance(size, (list, tuple)):
        return False
    return size[0] == ABOUT or any(map(is_of_data, size[1:]))


def are_of_data(outputs: Any) -> bool:
    """Tell whether an operator's results, (dtype, shape) each, have such a size."""
    return any(is_of_data(size) for _, shape in outputs for size in shape)


def puts_at_rows(op: str) -> bool:
    """Tell whether an operator writes values at rows of what it returns."""
    name = op.split(".")[1] if op.startswith("aten.") else op
    return name.removesuffix("_") in _AT_ROWS


class DataSizes:
    """The estimates in one graph.

    Parameters
    ----------
    graph_module
        What torch.export has made.
    place : callable
        Returns where in the model's code a node comes from.
    write : callable
        Writes a number that torch holds as a size expression.

    Attributes
    ----------
    estimates : dict
        By torch's names of the numbers.
    """

    def __init__(
        self,
        graph_module: torch.fx.GraphModule,
        place: Callable[[torch.fx.Node], Any],
        write: Callable[[Any], Any],
    ) -> None:
        self._place, self._write = place, write
        self._rounds = Counter(self._key(node) for node in _selections(graph_module))
        self.estimates: dict[str, Any] = {}

    def learn(self, node: torch.fx.Node) -> None:
        """Estimate the numbers of rows that a node selects: as many in each round of its loop."""
        value = node.meta.get("val")
        mask = _mask(node)
        if mask is not None:
            tensors = [value] if isinstance(value, torch.Tensor) else value
            names = {str(symbol) for t in tensors or () for symbol in free_unbacked_symbols(t)}
            self._estimate(names, mask.meta["val"].numel(), self._rounds[self._key(node)])
        elif str(node.target) == _SPLIT:
            source, sizes, *dim = node.args
            assert isinstance(source, torch.fx.Node)
            numbers = {str(s) for tensor in value or () for s in free_unbacked_symbols(tensor)}
            whole = source.meta["val"].shape[dim[0] if dim else node.kwargs.get("dim", 0)]
            self._estimate(numbers, whole, len(sizes))  # type: ignore[arg-type]

    def _estimate(self, names: set[str], rows: Any, parts: int) -> None:
        for name in names - set(self.estimates):
            each = ["add", ["floordiv", self._write(rows), parts], 1]
            self.estimates[name] = [ABOUT, each]

    def _key(self, node: torch.fx.Node) -> Any:
        return str(node.target), self._place(node)


def number_in_tensor(node: Any) -> torch.fx.Node | None:
    """Return the node of the tensor of one number that a node reads, if it does no more."""
    if not isinstance(node, torch.fx.Node) or str(node.target) not in _READS:
        return None
    (source,) = node.args
    return source if isinstance(source, torch.fx.Node) else None


_READS = ("aten.item.default", "aten._local_scalar_dense.default")


def takes_numbers_in_tensors(op: str) -> bool:
    """Tell whether an operator may be given tensors of one number each where it takes sizes."""
    return op == _SPLIT


def _selections(graph_module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from (node for node in module.graph.nodes if _mask(node) is not None)


def _mask(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return what a node selects rows by, if it does."""
    if str(node.target) in _SELECTS:
        found: Any = node.args[0]
        return found if isinstance(found, torch.fx.Node) else None
    if str(node.target) not in _BY_MASK:
        return None
    given: Any = node.args[1]
    for part in given if isinstance(given, (list, tuple)) else (given,):
        if isinstance(part, torch.fx.Node) and part.meta["val"].dtype == torch.bool:
            return part
    return None
