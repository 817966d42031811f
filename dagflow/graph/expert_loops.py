"""Captures loops over the experts that were hit: ``for expert in (counts > 0).nonzero(): ...``.

Such a loop has as many rounds as the data says, which no graph holds. Where an expert without a token
would change nothing, a loop over all experts computes the same, to the bit: each round takes the rows
of its expert, of which there may be none (`dagflow.graph.data_sizes`). That it would change nothing is
made sure of in two ways. The loop's code has no other effects than writes into tensors in place; and
all that is written in place, in the modules that it calls as well, is written at the rows that the
round has selected. What a round selects is empty by construction if its expert wasn't hit.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.symbol import SymT, symbol_is_type

from dagflow.errors import CaptureFailed
from dagflow.graph.loop_bodies import changes_only_rows, loop_at

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_HITS = "_dagflow_hits"


@dataclass(frozen=True)
class _Hits:
    """What a tensor is a list of: the places where a vector isn't zero."""

    vector: torch.Tensor
    version: int


@dataclass
class _Round:
    """A round of a loop that is being traced.

    Attributes
    ----------
    expert
    is_hit
        Whether the expert was hit: a tensor of one number.
    symbols
        Numbers of rows that were selected in this round, as torch calls them.
    parameters
        Those that were computed with.
    """

    expert: int
    is_hit: torch.Tensor
    line: str
    symbols: set[sympy.Symbol] = field(default_factory=set)
    parameters: dict[int, torch.nn.Parameter] = field(default_factory=dict)


class ExpertLoops:
    """The loops over experts that were hit in one trace.

    Parameters
    ----------
    module
        Returns the path of the module that the trace is in.

    Attributes
    ----------
    apart : dict of str to str
        Modules whose experts have parameters of their own each, by the loop's line.
    """

    def __init__(self, module: Callable[[], str]) -> None:
        self._module = module
        self._rounds: list[_Round] = []
        self.apart: dict[str, str] = {}

    def iterated(self, name: str, args: Any) -> Any | None:
        """Return what a loop over the experts that were hit goes through instead, if it is one."""
        if name not in ("unbind", "tolist") or not args:
            return None
        hits: _Hits | None = getattr(args[0], _HITS, None)
        frame = _frame_of_model()
        if hits is None or frame is None or (name == "unbind" and not _is_iterating()):
            return None
        loop = loop_at(frame)
        if loop is None or not changes_only_rows(loop, frame) or not _is_unwritten(hits):
            return None
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return _Experts(lambda: self._all(hits.vector, line, name == "tolist", args[0].dim()))

    def _all(
        self, vector: torch.Tensor, line: str, as_numbers: bool, dims: int
    ) -> Iterator[torch.Tensor | int]:
        """Go through all experts: one-element tensors as rows of `nonzero`, or numbers."""
        used: list[dict[int, torch.nn.Parameter]] = []
        for expert in range(vector.shape[0]):
            self._rounds.append(_Round(expert, vector[expert] != 0, line))
            number: Any = expert if dims == 1 else [expert]
            yield number if as_numbers else torch.tensor(number)
            used.append(self._rounds.pop().parameters)
        if len(used) > 1 and any(p.requires_grad for own in _differing(used) for p in own.values()):
            self.apart.setdefault(line, self._module())

    def arguments(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments with which a call does nothing for an expert that wasn't hit."""
        if not self._rounds:
            return args, kwargs
        if name == "__getitem__":
            return (args[0], self._existing(*args)), kwargs
        return self._selecting(name, args, kwargs)

    def _existing(self, table: torch.Tensor, index: Any) -> Any:
        """Return an index into experts' weights: some masks have a place for what is no expert.

        There the model's own code fails; the graph asserts that it isn't hit.
        """
        if isinstance(index, tuple) and index:
            return (self._existing(table, index[0]), *index[1:])
        number = index.constant if isinstance(index, FakeTensor) and not index.dim() else index
        current, size = self._rounds[-1], table.shape[0] if table.dim() else None
        if isinstance(number, bool) or not isinstance(number, (int, torch.Tensor)):
            return index
        if not isinstance(size, int) or int(number) != current.expert or current.expert < size:
            return index
        text = f"{current.line}: there is no expert {current.expert}"
        torch._assert_async(current.is_hit.logical_not(), text)
        return 0

    def _selecting(
        self, name: str, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        more = {key: value for key, value in kwargs.items() if key in _NO_MASK}
        given = [*args, *(value for key, value in kwargs.items() if key not in _NO_MASK)]
        if name not in _SELECT or len(given) != 1:
            return args, kwargs
        for current in self._rounds:
            given[0] = given[0] * current.is_hit
        return tuple(given), more

    def check(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Refuse what a round would write for an expert that wasn't hit.

        Raises
        ------
        CaptureFailed
        """
        if not self._rounds:
            return
        current = self._rounds[-1]
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        current.parameters |= {id(t): t for t in leaves if isinstance(t, torch.nn.Parameter)}
        target = _written(name, args, kwargs)
        if target is None or self._is_selected(target) or self._is_at_rows(name, args, kwargs):
            return
        raise CaptureFailed(
            f"Module {self._module()!r} loops over the experts that were hit ({current.line}), and "
            f"{name} writes what is no row of an expert's tokens. A graph has the rounds of all experts, "
            "so that one without a token must change nothing. What to do: write at the rows that "
            "torch.where or nonzero has selected in the same round, or loop over all experts, with "
            "range()."
        )

    def _is_selected(self, tensor: torch.Tensor) -> bool:
        own = set().union(*(current.symbols for current in self._rounds))
        return bool(own & unknown_sizes(tensor))

    def _is_at_rows(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
        position = _INDEX.get(name.removesuffix("_") if name[:2] != "__" else name)
        if position is None:
            return False
        index = args[position] if len(args) > position else dict(kwargs).get("index")
        return any(
            self._is_selected(part)
            for part in pytree.tree_leaves(index)
            if isinstance(part, torch.Tensor)
        )

    def note(self, name: str, args: Any, result: Any) -> None:
        """Remember what is a list of experts that were hit, and what a round has selected."""
        found = [t for t in pytree.tree_leaves(result) if isinstance(t, FakeTensor)]
        if self._rounds and name in _SELECT:
            given = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            before = set().union(*map(unknown_sizes, given))
            self._rounds[-1].symbols |= set().union(*map(unknown_sizes, found)) - before
        source = args[0] if args and isinstance(args[0], FakeTensor) else None
        if source is None or len(found) != 1:
            return
        if name == "nonzero" and source.dim() == 1 and isinstance(source.shape[0], int):
            setattr(found[0], _HITS, _Hits(source, source._version))
        elif name in _RESHAPE and hasattr(source, _HITS) and _are_as_many(source, found[0]):
            setattr(found[0], _HITS, getattr(source, _HITS))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Let a round know that it has rows: without any, what it goes on to do changes nothing."""
        thread, original = threading.get_ident(), ShapeEnv.evaluate_sym_node

        def evaluate(environment: ShapeEnv, node: Any, *args: Any, **kwargs: Any) -> Any:
            if self._rounds and threading.get_ident() == thread:
                own = set().union(*(current.symbols for current in self._rounds))
                unknown = node.expr.free_symbols & own
                if len(unknown) == 1:
                    answer = _if_there_are_rows(node.expr, unknown.pop())
                    if answer is not None:
                        return answer
            return original(environment, node, *args, **kwargs)

        with patch.object(ShapeEnv, "evaluate_sym_node", evaluate):
            yield


class _Experts:
    """What is iterated over instead of a list of those that were hit."""

    def __init__(self, rounds: Callable[[], Iterator[Any]]) -> None:
        self._rounds = rounds

    def __iter__(self) -> Iterator[Any]:
        return self._rounds()


_SELECT = frozenset(("where", "nonzero", "argwhere"))
_NO_MASK = frozenset(("as_tuple",))
_RESHAPE = frozenset(
    ("squeeze", "flatten", "view", "reshape", "__getitem__", "select", "to", "cpu")
)
# Where the arguments of functions that write at rows have these rows.
_INDEX: Mapping[str, int] = {
    **dict.fromkeys(("index_add", "index_copy", "scatter_add"), 2),
    **dict.fromkeys(("index_put", "__setitem__"), 1),
}


def _written(name: str, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the tensor that a torch function writes in place, or returns with rows written."""
    writes = name in _IN_PLACE or name in _INDEX or (name[:2] != "__" and name.endswith("_"))
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
    sizes = [size for size in tensor.shape if isinstance(size, torch.SymInt)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    return {symbol for symbol in symbols if symbol_is_type(symbol, SymT.UNBACKED_INT)}


def _if_there_are_rows(question: Any, rows: sympy.Symbol) -> Any:
    """Return the answer to a question that says no more than whether there are rows; else None."""
    if question.free_symbols != {rows}:
        return None
    answers = {question.subs(rows, number) for number in (1, 2, 3, 1 << 20)}
    if len(answers) != 1 or question.subs(rows, 0) in answers:
        return None
    (answer,) = answers
    return answer if answer in (sympy.true, sympy.false) else None


def _are_as_many(source: torch.Tensor, result: torch.Tensor) -> bool:
    numbers: list[Any] = [source.numel(), result.numel()]
    first, second = (n.node.expr if isinstance(n, torch.SymInt) else n for n in numbers)
    return bool(first == second) and result.dim() in (1, 2)


def _is_unwritten(hits: _Hits) -> bool:
    return hits.vector._version == hits.version


def _differing(
    used: list[dict[int, torch.nn.Parameter]],
) -> Iterator[dict[int, torch.nn.Parameter]]:
    """Yield of each round the parameters that no other round computes with."""
    for index, own in enumerate(used):
        others = {key for i, more in enumerate(used) if i != index for key in more}
        yield {key: parameter for key, parameter in own.items() if key not in others}


def _is_iterating() -> bool:
    """Tell whether the torch function that is called now is what a `for` asks for."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDER):
        frame = frame.f_back
    return frame is not None and frame.f_code is torch.Tensor.__iter__.__code__


_OWN_FOLDER = str(Path(__file__).parent)


def _frame_of_model() -> types.FrameType | None:
    """Return the innermost frame of code that is neither torch's nor the capture's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
        frame = frame.f_back
    return frame
