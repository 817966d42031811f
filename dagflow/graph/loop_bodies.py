"""Reads the code of loops: may a round be added that selects no rows, without changing anything?

It may if all that leaves a round is written at rows that the round has selected: ``out.index_add_(0, rows,
...)``, ``out[rows] += ...``. What code that the loop calls writes is seen in the trace.
"""

from __future__ import annotations

import ast
import types
from dataclasses import dataclass
from functools import cache

from dagflow.graph.checks import statements

_SELECT = ("where", "nonzero", "argwhere")
_AT_ROWS = ("index_add", "index_put", "index_copy", "scatter_add")
# Methods of Python's containers that change them.
_MUTATORS = (
    "append",
    "extend",
    "insert",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "clear",
)


def loop_at(frame: types.FrameType, *, of_list: bool) -> ast.For | None:
    """Return the loop whose list a frame is evaluating, if it is one.

    Parameters
    ----------
    of_list
        Whether it is to be one over what ``tolist()`` returns, and nothing that is made of that.
    """
    line = frame.f_lineno
    found = [
        s
        for s in statements(frame.f_code.co_filename)
        if isinstance(s, ast.For) and s.iter.lineno <= line <= (s.iter.end_lineno or line)
    ]
    if len(found) != 1 or any(isinstance(n, _HIDDEN_LOOPS) for n in ast.walk(found[0].iter)):
        return None
    match found[0].iter:
        case ast.Call(func=ast.Attribute(attr="tolist")):
            return found[0] if of_list else None
    return None if of_list else found[0]


_HIDDEN_LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def loop_around(frame: types.FrameType) -> ast.For | None:
    """Return the innermost loop whose body a frame is in."""
    loops = [s for s in statements(frame.f_code.co_filename) if isinstance(s, ast.For)]
    around = [loop for loop in loops if frame.f_lineno in lines_of(loop.body)]
    return max(around, key=lambda loop: loop.lineno, default=None)


def lines_of(body: list[ast.stmt]) -> range:
    """Return the lines of a statement's body."""
    return range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)


@dataclass(frozen=True)
class Branch:
    """A branch in a loop that isn't taken for an expert that wasn't hit.

    Attributes
    ----------
    loop
    lines
        Of what is only done for one that was.
    if_hit
        The truth of what decides, then.
    """

    loop: ast.For
    lines: range
    if_hit: bool


def branch_at(frame: types.FrameType) -> Branch | None:
    """Return the branch whose condition a frame is asking, all of it, if it is one in a loop."""
    loop, line = loop_around(frame), frame.f_lineno
    if loop is None:
        return None
    found = [
        node
        for node in ast.walk(loop)
        if isinstance(node, ast.If)
        and node.test.lineno <= line <= (node.test.end_lineno or line)
        and not node.orelse
    ]
    if len(found) != 1:
        return None
    (branch,) = found
    test, is_negated = branch.test, False
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, is_negated = test.operand, not is_negated
    if isinstance(test, (ast.BoolOp, ast.IfExp)):
        return None
    if isinstance(branch.body[0], ast.Continue):
        rest = range((branch.end_lineno or line) + 1, lines_of(loop.body).stop)
        return Branch(loop, rest, is_negated)
    return (
        None if _gives_more(branch, loop) else Branch(loop, lines_of(branch.body), not is_negated)
    )


def _gives_more(branch: ast.If, loop: ast.For) -> bool:
    """Tell whether what a branch gives names to is read elsewhere in its loop."""
    inside = {node for statement in branch.body for node in ast.walk(statement)}
    names = [node for node in ast.walk(loop) if isinstance(node, ast.Name)]
    given = {n.id for n in names if n in inside and isinstance(n.ctx, ast.Store)}
    return any(n.id in given and n not in inside and isinstance(n.ctx, ast.Load) for n in names)


def changes_only_rows(loop: ast.For, frame: types.FrameType) -> bool:
    """Tell whether the code of a loop has no effects but those of writes into tensors.

    Parameters
    ----------
    frame
        Of the function that the loop is in.
    """
    function = _function_around(loop, frame.f_code.co_filename)
    return function is not None and _changes_only_rows(loop, function)


def _function_around(loop: ast.For, file: str) -> ast.stmt | None:
    around = [
        s
        for s in statements(file)
        if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))
        and s.lineno <= loop.lineno <= (s.end_lineno or s.lineno)
    ]
    return max(around, key=lambda s: s.lineno, default=None)


@cache
def _changes_only_rows(loop: ast.For, function: ast.stmt) -> bool:
    body = _Body(loop)
    if loop.orelse or not all(body.allows(statement) for statement in loop.body):
        return False
    inside = set(ast.walk(loop))
    outside = [node for node in ast.walk(function) if node not in inside]
    read = {n.id for n in outside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    shared = any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in ast.walk(function))
    return not shared and not read & body.stored


class _Body:
    """The statements of a loop's body, read in order.

    Attributes
    ----------
    stored : set of str
        Names that a round gives to something: nothing else may read them.
    given : set of str
        Those that this round has given by now.
    rows : set of str
        Those that it has given to what it has selected.
    """

    def __init__(self, loop: ast.For) -> None:
        inside = [node for statement in (loop.target, *loop.body) for node in ast.walk(statement)]
        sums = {id(n.targets[0]) for n in inside if isinstance(n, ast.Assign) and _is_sum(n)}
        names = [n for n in inside if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
        self.stored = {name.id for name in names if id(name) not in sums}
        self.given: set[str] = set()
        self.rows: set[str] = set()
        self._gives(loop.target)

    def allows(self, statement: ast.stmt) -> bool:
        """Tell whether a statement has no effect but on names of the round and on rows."""
        match statement:
            case ast.Pass() | ast.Continue() | ast.Expr(value=ast.Constant()):
                return True
            case ast.If():
                return self._reads(statement.test) and self._branches(statement)
            case ast.With():
                used = [item.context_expr for item in statement.items]
                is_named = any(item.optional_vars for item in statement.items)
                return (
                    not is_named
                    and all(map(self._reads, used))
                    and all(map(self.allows, statement.body))
                )
            case ast.Expr(value=value):
                return self._writes_rows(value)
            case ast.Assign(targets=[target], value=value):
                return self._assigns(target, value, _is_sum(statement))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                return self._assigns(target, value, False)
            case ast.AugAssign(target=target, value=value):
                is_own = isinstance(target, ast.Name) and target.id in self.given
                return self._reads(value) and (is_own or self._is_at_rows(target))
        return False

    def _branches(self, statement: ast.If) -> bool:
        """Read both branches; what only one of them gives may be an earlier round's."""
        before, ends = set(self.given), []
        for branch in (statement.body, statement.orelse):
            self.given = set(before)
            if not all(map(self.allows, branch)):
                return False
            if not (branch and isinstance(branch[-1], ast.Continue)):
                ends.append(self.given)
        self.given = set.intersection(*ends) if ends else before
        return True

    def _gives(self, target: ast.expr) -> bool:
        """Note the names that are given; False if something else is written."""
        if isinstance(target, ast.Name):
            self.given.add(target.id)
            return True
        return isinstance(target, (ast.Tuple, ast.List)) and all(map(self._gives, target.elts))

    def _assigns(self, target: ast.expr, value: ast.expr, is_sum: bool) -> bool:
        if is_sum and isinstance(target, ast.Name) and target.id not in self.stored:
            return self._writes_rows(value)
        if self._is_at_rows(target):
            return self._reads(value)
        if not self._reads(value) or not self._gives(target):
            return False
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        selected = [self._selects(part) for _, part in pairs]
        for (part, _), is_selected in zip(pairs, selected, strict=True):
            names = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
            self.rows = self.rows | names if is_selected else self.rows - names
        return True

    def _selects(self, value: ast.expr) -> bool:
        """Tell whether an expression is a selection, or a part of one: ``mask.nonzero()[:, 0]``."""
        node = value
        while isinstance(node, (ast.Subscript, ast.Attribute, ast.Call)):
            if isinstance(node, ast.Attribute) and node.attr in _SELECT:
                return True
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Compare) or (
            isinstance(node, ast.Name) and node.id in self.rows
        )

    def _writes_rows(self, value: ast.expr) -> bool:
        """Tell whether an expression is a call that writes at rows that were selected."""
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return False
        is_write = value.func.attr.removesuffix("_") in _AT_ROWS
        arguments = [*value.args[:-1], *(k.value for k in value.keywords)]
        is_at_rows = any(self._is_of_rows(argument) for argument in arguments)
        return is_write and is_at_rows and all(map(self._reads, [*value.args, *arguments]))

    def _is_at_rows(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Subscript) and self._is_of_rows(target.slice)

    def _is_of_rows(self, index: ast.expr) -> bool:
        return any(
            isinstance(n, ast.Compare) or (isinstance(n, ast.Name) and n.id in self.rows)
            for n in ast.walk(index)
        )

    def _reads(self, value: ast.expr) -> bool:
        """Tell whether an expression only computes, and of earlier rounds takes no notice."""
        return not any(self._is_more(node) for node in ast.walk(value))

    def _is_more(self, node: ast.AST) -> bool:
        match node:
            case ast.NamedExpr() | ast.Yield() | ast.YieldFrom() | ast.Await():
                return True
            case ast.Call(func=ast.Attribute(attr=name)):
                return name in _MUTATORS
            case ast.Name(id=name, ctx=ast.Load()):
                return name in self.stored and name not in self.given
        return False


def _is_sum(statement: ast.Assign) -> bool:
    """Tell whether a statement is ``out = out.index_add(...)``."""
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=name)],
            value=ast.Call(func=ast.Attribute(value=ast.Name(id=same), attr=method)),
        ):
            return name == same and method in _AT_ROWS
    return False
