"""Branches on tensors' values that a graph may leave out: ``if labels.max() >= n: raise``.

A graph can't branch on a value. But a branch that ends with an exception is no part of what the model
computes, and one for numbers that aren't finite (``if not h.isfinite().all(): h = h.clamp(...)``) comes
too late: the graph goes the other way, and asserts on the worker that it was right to.
"""

from __future__ import annotations

import ast
import linecache
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Check:
    """What a tensor must be, true or false, for the other branch to be taken, and where it is asked."""

    wanted: bool
    line: str
    statement: str


def passed(tensor: torch.Tensor, frame: types.FrameType | None) -> bool | None:
    """Answer for a tensor whose truth a frame's code asks for, and record the assertion.

    Returns
    -------
    bool or None
        None where the branch can't be left out, or where torch knows the answer.
    """
    if frame is None or not isinstance(tensor, FakeTensor) or tensor.constant is not None:
        return None
    check = check_at(frame)
    if check is None or tensor.numel() != 1:
        return None
    holds = tensor.reshape(()) if check.wanted else tensor.reshape(()).logical_not()
    torch._assert_async(holds, f"{check.line}: {check.statement}")
    return check.wanted


def is_asked_for(tensor: torch.Tensor, frame: types.FrameType | None) -> bool:
    """Tell whether a number is read out of a tensor for a check that raises: the tensor does as well."""
    if frame is None or not isinstance(tensor, FakeTensor) or tensor.constant is not None:
        return False
    statement = _statement_at(frame)
    return statement is not None and _raises(statement)


def check_at(frame: types.FrameType) -> Check | None:
    """Return the check whose condition a frame is evaluating, if it is one."""
    statement = _statement_at(frame)
    if statement is None:
        return None
    questions = _questions(statement.test, isinstance(statement, ast.Assert))
    by_place = {_span(question.asks): question for question in questions}
    asked = [by_place[place] for place in _places(frame) if place in by_place]
    if not asked:
        return None
    question = asked[0]
    if not _raises(statement):
        wanted = _if_finite(question.asks)
    else:
        wanted = question.wanted if question.decides else None
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return None if wanted is None else Check(wanted, line, _head(statement))


def _statement_at(frame: types.FrameType) -> ast.If | ast.Assert | None:
    line = frame.f_lineno
    found = [
        s
        for s in statements(frame.f_code.co_filename)
        if isinstance(s, (ast.If, ast.Assert))
        and s.test.lineno <= line <= (s.test.end_lineno or s.test.lineno)
    ]
    return found[0] if len(found) == 1 else None


def _raises(statement: ast.If | ast.Assert) -> bool:
    return isinstance(statement, ast.Assert) or _only_raises(statement.body)


@dataclass(frozen=True)
class _Question:
    """A part of a condition.

    Attributes
    ----------
    asks
    wanted
        The answer with which the condition is what it is to be.
    decides
        Whether no other answer will do once this part is asked.
    """

    asks: ast.expr
    wanted: bool
    decides: bool


def _questions(test: ast.expr, wanted: bool, decides: bool = True) -> Iterator[_Question]:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _questions(test.operand, not wanted, decides)
    elif isinstance(test, ast.BoolOp):
        all_must = isinstance(test.op, ast.And) == wanted
        for value in test.values:
            last = value is test.values[-1]
            yield from _questions(value, wanted, decides and (all_must or last))
    elif isinstance(test, ast.Compare) and not _is_of_two(test):
        yield _Question(test, wanted, decides=False)  # it asks for the truth of several tensors
    else:
        yield _Question(test, wanted, decides)


def _is_of_two(test: ast.Compare) -> bool:
    return len(test.ops) == 1 and not isinstance(test.ops[0], (ast.In, ast.NotIn))


def _head(statement: ast.If | ast.Assert) -> str:
    test = " ".join(ast.unparse(statement.test).split())[:120]
    return f"{'assert' if isinstance(statement, ast.Assert) else 'if'} {test}"


def _if_finite(asks: ast.expr) -> bool | None:
    """Return the answer to a question that finite numbers give, if it asks just that."""
    if isinstance(asks, ast.UnaryOp) and isinstance(asks.op, ast.Invert):
        found = _if_finite(asks.operand)
        return None if found is None else not found
    text = ast.unparse(asks)
    if "isfinite(" in text and text.endswith(".all()"):
        return True
    return False if ("isinf(" in text or "isnan(" in text) and text.endswith(".any()") else None


def _only_raises(body: list[ast.stmt]) -> bool:
    leaving = (ast.Return, ast.Break, ast.Continue)
    inside = (node for statement in body for node in ast.walk(statement))
    return isinstance(body[-1], ast.Raise) and not any(isinstance(n, leaving) for n in inside)


def _span(node: ast.expr) -> tuple[Any, ...]:
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)


def _places(frame: types.FrameType) -> list[tuple[Any, ...]]:
    """Return where in its file the code is that a frame ran last, and that it is at.

    What a jump decides by was made just before; the jump itself often has another part's place.
    """
    positions, index = list(frame.f_code.co_positions()), frame.f_lasti // 2
    return [positions[i] for i in (index - 1, index) if 0 <= i < len(positions)]


@cache
def statements(file: str) -> list[ast.stmt]:
    """Return all statements of a file's code; none where it can't be read."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
