"""Captures loops over the experts that were hit: ``for expert in (counts > 0).nonzero(): ...``.

Such a loop has as many rounds as the data says, which no graph holds. Where an expert without a token
would change nothing, a loop over all experts computes the same, to the bit: each round takes the rows
of its expert, of which there may be none (`dagflow.graph.data_sizes`). That it would change nothing is
made sure of in two ways. The loop's code has no other effects than writes into tensors in place; and
all that is written in place, in the modules that it calls as well, is written at the rows that the
round has selected. What a round selects is empty by construction if its expert wasn't hit.

Loops over all experts that ask whether there are rows (``if rows.numel() > 0``, ``if mask.any()``) are
captured in the same way: there are, says the trace, and without any what depends on the answer changes
nothing.
"""

from __future__ import annotations

import ast
import dis
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dagflow.errors import CaptureFailed
from dagflow.graph.loop_bodies import (
    branch_at,
    changes_only_rows,
    lines_of,
    loop_around,
    loop_at,
)
from dagflow.graph.selections import (
    INDEX,
    NO_MASK,
    RESHAPE,
    SELECT,
    if_there_are_rows,
    is_same_list,
    unknown_in,
    unknown_sizes,
    written,
)

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_HITS, _MASKED = "_dagflow_hits", "_dagflow_masked"


@dataclass(frozen=True)
class _Hits:
    """What a tensor is a list of: the places where a vector isn't zero."""

    vector: torch.Tensor
    version: int


@dataclass(eq=False)
class _Round:
    """A round of a loop that is being traced.

    Attributes
    ----------
    symbols
        Numbers of rows that were selected in this round, as torch calls them.
    parameters
        Those that were computed with.
    """

    symbols: set[sympy.Symbol] = field(default_factory=set)
    parameters: dict[int, torch.nn.Parameter] = field(default_factory=dict)


@dataclass(eq=False)
class _Hit(_Round):
    """A round for an expert, with a tensor of one number that says whether it was hit.

    `masked` has what selects rows, by its identity and version, and what stands for it: nothing, if it
    wasn't hit.
    """

    expert: int = -1
    is_hit: torch.Tensor = field(default_factory=torch.Tensor)
    masked: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask without any place if the expert wasn't hit; always the same tensor."""
        key = id(mask), mask._version
        if key not in self.masked:
            self.masked[key] = mask, mask * self.is_hit
            setattr(self.masked[key][1], _MASKED, True)
        return self.masked[key][1]


@dataclass(eq=False)
class _Loop:
    """A loop that is being traced.

    Attributes
    ----------
    frame, code
        Of the function that it is in, and the statement.
    lines
        Which of its lines depend on an answer, if it goes through all experts by itself.
    rounds
        So far. The last one is under way.
    """

    frame: types.FrameType
    code: ast.For
    lines: range | None = None
    rounds: list[_Round] = field(default_factory=list)

    @property
    def line(self) -> str:
        return f"{self.frame.f_code.co_filename}:{self.code.lineno}"

    def is_under_way(self) -> bool:
        """Tell whether what is called now is called in the loop, where it depends on an answer."""
        if self.lines is None:
            return True  # who goes through the experts says when it ends
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None and frame.f_lineno in self.lines


class ExpertLoops:
    """The loops over experts that were hit in one trace.

    Parameters
    ----------
    module
        Returns the path of the module that the trace is in.
    """

    def __init__(self, module: Callable[[], str]) -> None:
        self._module = module
        self._loops: list[_Loop] = []
        self._used: dict[str, list[dict[int, torch.nn.Parameter]]] = {}
        self._modules: dict[str, str] = {}

    def iterated(self, name: str, args: Any) -> Any | None:
        """Return what a loop over the experts that were hit goes through instead, if it is one."""
        frame = _iterating() if name == "unbind" and hasattr(args[0], _HITS) else None
        return None if frame is None else self._over_all(args[0], frame, as_numbers=False)

    def _over_all(
        self, listed: torch.Tensor, frame: types.FrameType, as_numbers: bool
    ) -> Any | None:
        """Return what goes through all experts instead of a list of those that were hit."""
        hits: _Hits | None = getattr(listed, _HITS, None)
        code = loop_at(frame, of_list=as_numbers)
        if hits is None or hits.vector._version != hits.version:
            return None
        if code is None or not changes_only_rows(code, frame):
            return None
        loop = _Loop(frame, code)
        return _Experts(lambda: self._all(loop, hits.vector, as_numbers, listed.dim()))

    def _all(
        self, loop: _Loop, vector: torch.Tensor, as_numbers: bool, dims: int
    ) -> Iterator[torch.Tensor | int]:
        """Go through all experts: one-element tensors as rows of `nonzero`, or numbers."""
        self._loops.append(loop)
        for expert in range(vector.shape[0]):
            loop.rounds.append(_Hit(expert=expert, is_hit=vector[expert] != 0))
            number: Any = expert if dims == 1 else [expert]
            yield number if as_numbers else torch.tensor(number)
        self._end(loop)

    def _end(self, loop: _Loop) -> None:
        self._loops.remove(loop)
        self._modules.setdefault(loop.line, self._module())
        self._used.setdefault(loop.line, []).extend(r.parameters for r in loop.rounds)

    def apart(self) -> dict[str, str]:
        """Return the modules whose experts have parameters of their own each, by the loop's line."""
        found = {}
        for line, used in self._used.items():
            own = [p for parameters in _differing(used) for p in parameters.values()]
            if len(used) > 1 and any(p.requires_grad for p in own):
                found[line] = self._modules[line]
        return found

    @property
    def _rounds(self) -> list[_Round]:
        """The rounds that are under way, outermost first."""
        for loop in [loop for loop in self._loops if not loop.is_under_way()]:
            self._end(loop)
        return [loop.rounds[-1] for loop in self._loops if loop.rounds]

    def arguments(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments with which a call does nothing for an expert that wasn't hit."""
        hits = [r for r in (self._rounds if self._loops else ()) if isinstance(r, _Hit)]
        if not hits:
            return args, kwargs
        if name in ("__getitem__", "__setitem__", "index_put_") and len(args) > 1:
            index = pytree.tree_map(partial(self._masked, hits), args[1])
            if name == "__getitem__":
                index = self._existing(args[0], index, hits[-1])
            return (args[0], index, *args[2:]), kwargs
        more = {key: value for key, value in kwargs.items() if key in NO_MASK}
        given = [*args, *(value for key, value in kwargs.items() if key not in NO_MASK)]
        if name not in SELECT or len(given) != 1:
            return args, kwargs
        for hit in hits:
            given[0] = hit.of(given[0])
        return tuple(given), more

    def _masked(self, hits: list[_Hit], part: Any) -> Any:
        """Return what a mask in an index selects for experts that were hit."""
        if isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.dim():
            for hit in hits:
                part = hit.of(part)
        return part

    def _existing(self, table: torch.Tensor, index: Any, hit: _Hit) -> Any:
        """Return an index into experts' weights: some masks have a place for what is no expert.

        There the model's own code fails; the graph asserts that it isn't hit.
        """
        if isinstance(index, tuple) and index:
            return (self._existing(table, index[0], hit), *index[1:])
        number = index.constant if isinstance(index, FakeTensor) and not index.dim() else index
        size = table.shape[0] if table.dim() else None
        if isinstance(number, bool) or not isinstance(number, (int, torch.Tensor)):
            return index
        if not isinstance(size, int) or int(number) != hit.expert or hit.expert < size:
            return index
        text = f"{self._loops[-1].line}: there is no expert {hit.expert}"
        torch._assert_async(hit.is_hit.logical_not(), text)
        return 0

    def check(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Refuse what a round would write for an expert that wasn't hit.

        Raises
        ------
        CaptureFailed
        """
        rounds = self._rounds if self._loops else []
        if not rounds:
            return
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        rounds[-1].parameters |= {id(t): t for t in leaves if isinstance(t, torch.nn.Parameter)}
        target = written(name, args, kwargs)
        if target is None or self._is_selected(target) or self._is_at_rows(name, args, kwargs):
            return
        raise CaptureFailed(
            f"Module {self._module()!r} loops over the experts that were hit "
            f"({self._loops[-1].line}), and {name} writes what is no row of an expert's tokens. A graph "
            "has the rounds of all experts, so that one without a token must change nothing. What to do: "
            "write at the rows that torch.where or nonzero has selected in the same round; or loop over "
            "all experts, with range(), and don't ask whether there are rows."
        )

    def _selected(self) -> set[sympy.Symbol]:
        return set().union(*(current.symbols for current in self._rounds))

    def _is_selected(self, tensor: torch.Tensor) -> bool:
        return bool(self._selected() & unknown_sizes(tensor))

    def _is_at_rows(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
        position = INDEX.get(name.removesuffix("_") if name[:2] != "__" else name)
        if position is None:
            return False
        index = args[position] if len(args) > position else dict(kwargs).get("index")
        return any(
            self._is_selected(part) or hasattr(part, _MASKED)
            for part in pytree.tree_leaves(index)
            if isinstance(part, torch.Tensor)
        )

    def note(self, name: str, args: Any, result: Any) -> None:
        """Remember what is a list of experts that were hit, and what a round has selected."""
        if name not in SELECT | RESHAPE:
            return
        found = [t for t in pytree.tree_leaves(result) if isinstance(t, FakeTensor)]
        rounds = self._rounds if self._loops else []
        if rounds and isinstance(rounds[-1], _Hit):  # a loop over all asks about its own
            given = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            before = set().union(*map(unknown_sizes, given))
            rounds[-1].symbols |= set().union(*map(unknown_sizes, found)) - before
        source = args[0] if args and isinstance(args[0], FakeTensor) else None
        if source is None or len(found) != 1:
            return
        if name == "nonzero" and source.dim() == 1 and isinstance(source.shape[0], int):
            setattr(found[0], _HITS, _Hits(source, source._version))
        elif name in RESHAPE and hasattr(source, _HITS) and is_same_list(args, found[0]):
            setattr(found[0], _HITS, getattr(source, _HITS))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """See what torch functions don't show: lists of numbers, and questions about sizes."""
        thread, original = threading.get_ident(), ShapeEnv.evaluate_sym_node
        to_list = FakeTensor.tolist

        def tolist(tensor: FakeTensor) -> Any:
            frame = _frame_of_model() if threading.get_ident() == thread else None
            experts = None if frame is None else self._over_all(tensor, frame, as_numbers=True)
            return to_list(tensor) if experts is None else experts

        def evaluate(environment: ShapeEnv, node: Any, *args: Any, **kwargs: Any) -> Any:
            answer = None
            if threading.get_ident() == thread:
                answer = self._answer(node.expr)
            return original(environment, node, *args, **kwargs) if answer is None else answer

        with (
            patch.object(ShapeEnv, "evaluate_sym_node", evaluate),
            patch.object(FakeTensor, "tolist", tolist),
        ):
            yield

    def _answer(self, question: Any) -> Any:
        """Let a round know that it has rows: without any, what it goes on to do changes nothing."""
        unknown = unknown_in(question)
        answer = if_there_are_rows(question, unknown)
        if answer is None or unknown <= self._selected():
            return answer
        frame = _frame_that_asks()
        code = None if frame is None else loop_around(frame)
        if frame is None or code is None or not changes_only_rows(code, frame):
            return None
        if any(loop.frame is frame and loop.code is not code for loop in self._loops):
            return None
        if any(loop.frame is frame and loop.lines is None for loop in self._loops):
            return None  # it asks about rows that this round hasn't selected
        self._begin(frame, code, lines_of(code.body), _Round(unknown))
        return answer

    def asked(self, tensor: Any, frame: types.FrameType) -> bool | None:
        """Answer whether an expert was hit to a loop that passes over those that weren't.

        Returns
        -------
        bool or None
            None where a tensor's truth decides something else.
        """
        branch = branch_at(frame) if isinstance(tensor, FakeTensor) else None
        if branch is None or tensor.constant is not None or tensor.numel() != 1:
            return None
        if not changes_only_rows(branch.loop, frame):
            return None
        is_hit = tensor.reshape(()).to(torch.bool)
        is_hit = is_hit if branch.if_hit else is_hit.logical_not()
        self._begin(frame, branch.loop, branch.lines, _Hit(is_hit=is_hit))
        return branch.if_hit

    def _begin(self, frame: types.FrameType, code: ast.For, lines: range, current: _Round) -> None:
        known = [loop for loop in self._loops if loop.frame is frame and loop.lines == lines]
        loop = known[0] if known else _Loop(frame, code, lines)
        loop.rounds.append(current)
        if not known:
            self._loops.append(loop)


class _Experts:
    """What is iterated over instead of a list of those that were hit."""

    def __init__(self, rounds: Callable[[], Iterator[Any]]) -> None:
        self._rounds = rounds

    def __iter__(self) -> Iterator[Any]:
        return self._rounds()


def _differing(
    used: list[dict[int, torch.nn.Parameter]],
) -> Iterator[dict[int, torch.nn.Parameter]]:
    """Yield of each round the parameters that no other round computes with."""
    for index, own in enumerate(used):
        others = {key for i, more in enumerate(used) if i != index for key in more}
        yield {key: parameter for key, parameter in own.items() if key not in others}


_OWN_FOLDER = str(Path(__file__).parent)


def _iterating() -> types.FrameType | None:
    """Return the frame whose `for` asks a tensor for its rows, if that is what is being called."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FOLDER):
        frame = frame.f_back
    if frame is None or frame.f_code is not torch.Tensor.__iter__.__code__ or frame.f_back is None:
        return None
    asking = frame.f_back
    operation = dis.opname[asking.f_code.co_code[asking.f_lasti]]
    return asking if operation == "GET_ITER" else None  # and not what `enumerate` or `zip` asks for


def _frame_of_model() -> types.FrameType | None:
    """Return the innermost frame of code that is neither torch's nor the capture's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
        frame = frame.f_back
    return frame


def _frame_that_asks() -> types.FrameType | None:
    """Return the frame of code that asks for a truth by itself, and not in an operator's name."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH_FOLDER, *_ASKED)):
        frame = frame.f_back
    is_own = frame is None or frame.f_code.co_filename.startswith(_OWN_FOLDER)
    return None if is_own else frame


_ASKED = (__file__, str(Path(__file__).with_name("sizes.py")))
