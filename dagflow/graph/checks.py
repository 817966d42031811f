"""Checks of tensors' values in a model's code that only raise: ``if labels.max() >= n: raise``.

A graph can't branch on a value. But a branch that ends with an exception is no part of what the model
computes: the graph goes the other way, and asserts on the worker that it was right to.
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
class RaisingCheck:
    """What a tensor must be, true or false, for the model's code not to raise, and where it is asked."""

    wanted: bool
    line: str
    statement: str


def passed(tensor: torch.Tensor, frame: types.FrameType | None) -> bool | None:
    """Answer for a tensor whose truth a frame's code asks for, and record the assertion.

    Returns
    -------
    bool or None
        None where the code does something else than raising, or where torch knows the answer.
    """
    if frame is None or not isinstance(tensor, FakeTensor) or tensor.constant is not None:
        return None
    check = check_at(frame)
    if check is None or tensor.numel() != 1:
        return None
    holds = tensor.reshape(()) if check.wanted else tensor.reshape(()).logical_not()
    torch._assert_async(holds, f"{check.line}: {check.statement}")  # type: ignore[attr-defined]
    return check.wanted


def check_at(frame: types.FrameType) -> RaisingCheck | None:
    """Return the check whose condition a frame is evaluating, if it is one."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    around = [
        s
        for s in _statements(file)
        if isinstance(s, (ast.If, ast.Assert))
        and s.test.lineno <= line <= (s.test.end_lineno or s.test.lineno)
    ]
    if len(around) != 1:
        return None
    (statement,) = around
    if isinstance(statement, ast.If) and not _only_raises(statement.body):
        return None
    questions = list(_questions(statement.test, isinstance(statement, ast.Assert)))
    places = _places(frame)
    asked = [q for q in questions if len(questions) == 1 or _span(q.asks) in places]
    if len(asked) != 1 or not asked[0].decides:
        return None
    return RaisingCheck(asked[0].wanted, f"{file}:{line}", _head(statement))


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
    else:
        yield _Question(test, wanted, decides)


def _head(statement: ast.If | ast.Assert) -> str:
    test = " ".join(ast.unparse(statement.test).split())[:120]
    return f"assert {test}" if isinstance(statement, ast.Assert) else f"if {test}: raise"


def _only_raises(body: list[ast.stmt]) -> bool:
    leaving = (ast.Return, ast.Break, ast.Continue)
    inside = (node for statement in body for node in ast.walk(statement))
    return isinstance(body[-1], ast.Raise) and not any(isinstance(n, leaving) for n in inside)


def _span(node: ast.expr) -> tuple[Any, ...]:
    return (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)


def _places(frame: types.FrameType) -> list[tuple[Any, ...]]:
    """Return where in its file the code is that a frame is at, and what it did just before.

    A jump has the place of the whole statement, and what it jumps by was made just before.
    """
    positions, index = list(frame.f_code.co_positions()), frame.f_lasti // 2
    return [positions[i] for i in (index, index - 1) if 0 <= i < len(positions)]


@cache
def _statements(file: str) -> list[ast.stmt]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
