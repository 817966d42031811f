"""What torch knows of the batch's sizes, written down for programs and for the check of batches.

torch calculates with sizes symbolically while it traces. A size that an operator takes becomes an
expression of the program; a branch that the model's code takes by a size becomes a condition that
every batch must meet, because a graph holds the branch that the example batch took and no other.
"""

from __future__ import annotations

import builtins
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions

from dagflow.graph.dag import Condition

_TORCH_FOLDER = str(Path(torch.__file__).parent)


class SizeUnknown(ValueError):
    """A number that no expression over the batch's sizes gives.

    Attributes
    ----------
    depends_on_data : bool
        Whether it comes from a tensor's values.
    """

    def __init__(self, text: str, depends_on_data: bool) -> None:
        super().__init__(text)
        self.depends_on_data = depends_on_data


@dataclass(frozen=True)
class Decision:
    """A branch that the model's code took by a size: the expression that holds then.

    Attributes
    ----------
    fixes
        torch's symbols that have one value only from here on: of `int()` or `==` of a size.
    by_operator
        Whether an operator decided, inside, for which the line called it.
    """

    environment: ShapeEnv
    expression: Any
    source: str
    fixes: frozenset[Any] = frozenset()
    by_operator: bool = False


@contextmanager
def watch_decisions(own_files: frozenset[str]) -> Iterator[list[Decision]]:
    """Collect the decisions that Python code takes by sizes while a model is traced.

    What an operator decides inside, about its result's layout say, is one only where it fixes a
    size: else the operator decides anew whenever it runs.

    Parameters
    ----------
    own_files
        Files of dagflow that trace: never the source of a decision.
    """
    found: list[Decision] = []
    thread = threading.get_ident()
    original = ShapeEnv.evaluate_sym_node

    def evaluate(self: ShapeEnv, node: Any, *args: Any, **kwargs: Any) -> Any:
        before, num_known = node.expr, len(self.replacements)
        result = original(self, node, *args, **kwargs)
        if before.free_symbols and threading.get_ident() == thread:
            frame, by_operator = _decider()
            free = before.free_symbols if len(self.replacements) > num_known else ()
            fixes = frozenset(s for s in free if self.replace(s).is_Integer)
            source = _line(frame, by_operator, own_files) if fixes or not by_operator else ""
            if source:
                holding = _holding(before, result)
                found.append(Decision(self, holding, source, fixes, by_operator))
        return result

    with patch.object(ShapeEnv, "evaluate_sym_node", evaluate):
        yield found


def decided(flag: torch.SymBool, source: str) -> tuple[bool, Decision]:
    """Return the answer to a question about sizes that the model's code has asked, as a decision of it.

    Parameters
    ----------
    source
        The line that leaves the answer to a function it calls.
    """
    expression, environment = flag.node.expr, flag.node.shape_env
    answer = bool(flag)
    return answer, Decision(environment, _holding(expression, answer), source)


def what_fixed(symbol: Any, decisions: Sequence[Decision]) -> Decision | None:
    """Return the decision that fixed a size; None if it is open, or no line of the model's did.

    Parameters
    ----------
    symbol
        What torch called the size while it was open.
    """
    for decision in decisions:
        value = decision.environment.replace(symbol)
        if not value.is_Integer:
            return None
        # Or the line fixed a size that is equal to this one.
        if any(fixed == symbol for fixed in decision.fixes) or any(
            decision.environment.replace(fixed) == value for fixed in decision.fixes
        ):
            return decision
    return None


def _holding(expression: Any, result: Any) -> Any:
    if result is sympy.true or result is True:
        return expression
    if result is sympy.false or result is False:
        return sympy.Not(expression)
    return sympy.Eq(expression, result)


def _decider() -> tuple[Any, bool]:
    """Return the innermost frame of what decides, and if that is an operator.

    Called by what torch asks for each of thousands of decisions in a trace: quick, hence the names
    of functions first.
    """
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        # An operator that torch records whole; one that it takes apart decides for the graph.
        if code.co_name == "proxy_call" and code.co_filename.endswith("proxy_tensor.py"):
            return frame, True
        if code.co_name == "decompose" and code.co_filename.endswith("_ops.py"):
            return frame, False
        if not _is_torchs(code.co_filename):
            return frame, False
        frame = frame.f_back  # type: ignore[assignment]
    return None, False


@cache
def _is_torchs(file: str) -> bool:
    return file.startswith((_TORCH_FOLDER, "<")) or file in _PASSED


# Through demands.py torch's own checks are called, through expert_loops.py its questions come by.
_PASSED = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in ("demands", "expert_loops"))


def _line(frame: Any, by_operator: bool, own_files: frozenset[str]) -> str:
    """Return the line of the model's code that a frame serves, "" if it is none."""
    while frame is not None:
        file = frame.f_code.co_filename
        # Operators are called through the capture's own functions.
        passed = by_operator and file in own_files
        if not passed and not _is_torchs(file):
            return "" if file in own_files else f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@dataclass
class SizeWriter:
    """Writes torch's symbolic numbers as size expressions.

    Attributes
    ----------
    symbols
        Names of the sizes that the batch's tensors show.
    nodes
        What stands for a node inside of a region: a node outside of it.
    estimates
        What to write for numbers that data decides; see `dagflow.graph.data_sizes`.
    """

    symbols: set[str] = field(default_factory=set)
    nodes: dict[torch.fx.Node, Any] = field(default_factory=dict)
    estimates: Mapping[str, Any] = field(default_factory=dict)

    def of_value(self, value: Any) -> Any:
        """Write a number that torch holds, symbolic or not.

        Raises
        ------
        SizeUnknown
        """
        if isinstance(value, (bool, int, float)):
            return value
        return self.of_expression(value.node.expr)

    def of_node(self, node: torch.fx.Node) -> Any:
        """Write the number that a node of the graph computes.

        With floats among its operands it is written as the model's code has it: torch's own
        expressions reorder sums and products, which changes floats.

        Raises
        ------
        SizeUnknown
        """
        value = node.meta.get("val")
        if isinstance(value, (bool, int, float)):
            return value
        if value is None or _has_floats(value.node.expr):
            inner = self.nodes.get(node, node)
            written = self._as_called(inner) if isinstance(inner, torch.fx.Node) else inner
            if written is not None:
                return written
        if value is None:
            raise SizeUnknown(str(node), False)
        return self.of_value(value)

    def _as_called(self, node: torch.fx.Node) -> Any:
        if node.op != "call_function":
            return None
        operands = [a for a in node.args if a is not None]
        if node.target in (torch.sym_sum, builtins.sum):
            operands = list(operands[0])  # type: ignore[arg-type]
        name = SIZE_CALLS.get(node.target)
        if name is None or node.kwargs:
            return None
        return [name, *(self._operand(operand) for operand in operands)]

    def _operand(self, operand: Any) -> Any:
        return self.of_node(operand) if isinstance(operand, torch.fx.Node) else operand

    def of_expression(self, expression: Any) -> Any:
        """Write one of torch's (sympy's) expressions.

        Raises
        ------
        SizeUnknown
        """
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float:
            return float(expression)
        if expression.is_symbol:
            if str(expression) in self.symbols:
                return str(expression)
            if str(expression) in self.estimates:
                return self.estimates[str(expression)]
            raise SizeUnknown(str(expression), True)
        if expression.is_Rational:
            return ["truediv", int(expression.p), int(expression.q)]
        operands = [self.of_expression(operand) for operand in expression.args]
        name = type(expression).__name__
        if name.startswith("OpaqueUnaryFn_"):
            return [name.removeprefix("OpaqueUnaryFn_"), *operands]
        if name == "Identity":
            return operands[0]
        if name == "TruncToFloat":
            return ["float", ["trunc", *operands]]
        if name == "ModularIndexing":
            return ["mod", ["floordiv", operands[0], operands[1]], operands[2]]
        for kind, operation in _KINDS:
            if isinstance(expression, kind):
                return [operation, *operands]
        raise SizeUnknown(str(expression), False)


def _has_floats(expression: Any) -> bool:
    return bool(expression.has(sympy.Float, *_FLOAT_KINDS)) or any(
        type(part).__name__.startswith("OpaqueUnaryFn_")
        for part in sympy.preorder_traversal(expression)
    )


_FLOAT_KINDS = (
    functions.ToFloat,
    functions.IntTrueDiv,
    functions.FloatTrueDiv,
    functions.FloatPow,
    functions.RoundDecimal,
    functions.TruncToFloat,
)

_KINDS: tuple[tuple[Any, str], ...] = (
    (sympy.Add, "add"),
    (sympy.Mul, "mul"),
    ((sympy.Pow, functions.FloatPow, functions.PowByNatural), "pow"),
    (functions.FloorDiv, "floordiv"),
    ((functions.Mod, functions.PythonMod, sympy.Mod), "mod"),
    ((functions.Max, sympy.Max), "max"),
    ((functions.Min, sympy.Min), "min"),
    ((functions.IntTrueDiv, functions.FloatTrueDiv), "truediv"),
    (functions.ToFloat, "float"),
    (functions.TruncToInt, "trunc"),
    (functions.CeilToInt, "ceil"),
    (functions.FloorToInt, "floor"),
    ((functions.RoundToInt, functions.RoundDecimal), "round"),
    (functions.LShift, "lshift"),
    (functions.RShift, "rshift"),
    (functions.Where, "where"),
    (sympy.Eq, "eq"),
    (sympy.Ne, "ne"),
    (sympy.StrictLessThan, "lt"),
    (sympy.LessThan, "le"),
    (sympy.StrictGreaterThan, "gt"),
    (sympy.GreaterThan, "ge"),
    (sympy.And, "and"),
    (sympy.Or, "or"),
    (sympy.Not, "not"),
)

# Python's and torch's functions over sizes that appear in torch's graphs, as operations.
SIZE_CALLS: dict[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.floordiv: "floordiv",
    operator.truediv: "truediv",
    operator.mod: "mod",
    operator.pow: "pow",
    operator.neg: "neg",
    operator.abs: "abs",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.and_: "and",
    operator.or_: "or",
    operator.not_: "not",
    math.ceil: "ceil",
    math.floor: "floor",
    math.trunc: "trunc",
    builtins.round: "round",
    builtins.abs: "abs",
    builtins.sum: "add",
    torch.sym_float: "float",
    torch.sym_int: "trunc",
    torch.sym_max: "max",
    torch.sym_min: "min",
    torch.sym_not: "not",
    torch.sym_ite: "where",
    torch.sym_sum: "add",
    torch._sym_sqrt: "sqrt",  # type: ignore[attr-defined]
    torch._sym_log2: "log2",  # type: ignore[attr-defined]
    **{
        getattr(torch, f"_sym_{name}"): name
        for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
    },
}


def conditions(
    environment: ShapeEnv | None, decisions: list[Decision], writer: SizeWriter
) -> tuple[Condition, ...]:
    """Write what must hold for a batch's sizes, each once, the model's own decisions first.

    Raises
    ------
    SizeUnknown
        If a decision can't be written, with the line that takes it.
    """
    if environment is None:
        return ()
    found: dict[Any, Condition] = {}
    own = [
        (d.expression, d.source)
        for d in decisions
        if d.environment is environment and not d.by_operator
    ]
    inside = [(guard.expr, "") for guard in environment.guards]
    for expression, source in (*own, *inside):
        expression = environment.replace(expression)
        if expression is sympy.true or expression in found:
            continue
        try:
            written = writer.of_expression(expression)
        except SizeUnknown as error:
            if source and not error.depends_on_data:
                raise SizeUnknown(f"{expression} ({source})", False) from error
            continue
        found[expression] = Condition(written, source)
    return tuple(found.values())


@contextmanager
def symbolic_mathematics() -> Iterator[dict[str, str]]:
    """Have `math.sqrt` and `math.log2` keep sizes open instead of fixing them.

    Yields the line that called each on an open size last.
    """
    lines: dict[str, str] = {}

    def open_to_sizes(plain: Callable[..., float], symbolic: Callable[..., Any]) -> Any:
        def function(*operands: Any) -> Any:
            if len(operands) == 1 and isinstance(operands[0], (torch.SymInt, torch.SymFloat)):
                caller = sys._getframe(1)
                lines[plain.__name__] = f"{caller.f_code.co_filename}:{caller.f_lineno}"
                return symbolic(operands[0])
            return plain(*operands)

        return function

    replaced: dict[str, Any] = {
        name: open_to_sizes(getattr(math, name), getattr(torch, f"_sym_{name}"))
        for name in ("sqrt", "log2")
    }
    with patch.multiple(math, **replaced):
        yield lines
