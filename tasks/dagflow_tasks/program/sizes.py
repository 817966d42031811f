"""Size expressions: numbers that programs compute from a micro-batch's sizes, as JSON.

An expression is a number, a symbol, or ``[operation, operand, ...]``. It is evaluated as Python
evaluates the model's own code, operand by operand, so a scale like ``T ** -0.5`` has the same bits.

Expressions come with programs, from anybody: how large they are, and every number on the way, is limited,
so that none takes noticeable time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dagflow_tasks.errors import SizeInvalid

# Sizes, strides and offsets of torch's are whole numbers of 64 bits with a sign.
LIMIT = 1 << 63
# Zoo's models: 4 operations deep, 20 parts.
MOST_DEPTH, MOST_PARTS = 64, 4096
_MOST_BITS = 63

# Operations that take any number of operands, from left to right.
_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
    "pow": lambda a, b: _power(a, b),
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "sub": operator.sub,
    "truediv": operator.truediv,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lshift": lambda a, b: _shifted(a, b),
    "rshift": operator.rshift,
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "abs": abs,
    "not": operator.not_,
    "float": float,
    "trunc": math.trunc,
    "ceil": math.ceil,
    "floor": math.floor,
    "about": operator.pos,  # an estimate of what data decides, for costs: no program holds one
    **{
        name: getattr(math, name)
        for name in (
            *("sqrt", "exp", "log", "log2", "sin", "cos", "tan"),
            *("asin", "acos", "atan", "sinh", "cosh", "tanh"),
        )
    },
}
_SIGNS = {
    "add": " + ",
    "sub": " - ",
    "mul": "*",
    "floordiv": "//",
    "truediv": " / ",
    "mod": "%",
    "pow": "**",
    "eq": " == ",
    "ne": " != ",
    "lt": " < ",
    "le": " <= ",
    "gt": " > ",
    "ge": " >= ",
    "lshift": " << ",
    "rshift": " >> ",
    "and": " and ",
    "or": " or ",
}


def evaluate_size(expression: Any, sizes: Mapping[str, int]) -> Any:
    """Evaluate a size expression to an int, float or bool.

    >>> evaluate_size(["mul", 2, ["add", "s0", 1]], {"s0": 4})
    10
    >>> evaluate_size(["ceil", ["truediv", "s0", 2]], {"s0": 5})
    3

    Raises
    ------
    SizeInvalid
        For an expression that is none, or that leads to no number, or beyond 64 bits on the way.
    """
    try:
        return _evaluated(expression, sizes, MOST_DEPTH)
    except (ArithmeticError, TypeError, ValueError, LookupError) as error:
        raise SizeInvalid(
            f"The size {expression!r:.200} can't be calculated: {type(error).__name__}: {error}."
        ) from error


def _evaluated(expression: Any, sizes: Mapping[str, int], depth: int) -> Any:
    if isinstance(expression, (int, float)):
        return _limited(expression)
    if isinstance(expression, str):
        return sizes[expression]
    if not depth:
        raise ValueError(f"more than {MOST_DEPTH} operations deep")
    operation, *operands = expression
    return _limited(_applied(operation, [_evaluated(o, sizes, depth - 1) for o in operands]))


def _applied(operation: str, values: list[Any]) -> Any:
    if operation == "round":
        return _rounded(*values)
    if operation == "where":
        condition, chosen, other = values
        return chosen if condition else other
    if operation in _UNARY:
        (value,) = values
        return _UNARY[operation](value)
    if operation in _BINARY:
        first, second = values
        return _BINARY[operation](first, second)
    result = values[0]
    for value in values[1:]:
        result = _limited(_FOLDED[operation](result, value))
    return result


def _limited(value: Any) -> Any:
    if isinstance(value, int) and not -LIMIT <= value < LIMIT:
        raise OverflowError(f"a number of more than {_MOST_BITS} bits")
    return value


def _power(base: Any, exponent: Any) -> Any:
    """Refuse before it is calculated what would have more bits than there is memory."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        bits = (abs(base).bit_length() - 1) * exponent  # the least that the result has
        if bits > _MOST_BITS:
            raise OverflowError(f"a number of more than {_MOST_BITS} bits")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("a root of a number below 0")
    return result


def _shifted(value: int, by: int) -> int:
    if by > _MOST_BITS:
        raise OverflowError(f"a number of more than {_MOST_BITS} bits")
    return value << by


def _rounded(value: Any, digits: int | None = None) -> Any:
    if digits is not None and abs(digits) > _MOST_BITS:
        raise OverflowError(f"rounding to {digits} digits")
    return round(value, digits)


def check_size(expression: Any, symbols: Collection[str]) -> None:
    """Refuse what is no size expression, is too large, or reads a size that nobody gives.

    Raises
    ------
    SizeInvalid
    """
    waiting = [(expression, 0)]
    parts = 0
    while waiting:
        part, depth = waiting.pop()
        parts += 1
        if parts > MOST_PARTS or depth > MOST_DEPTH:
            raise SizeInvalid(
                f"A program holds a size of more than {MOST_PARTS} parts, or {MOST_DEPTH} operations "
                f"deep: {expression!r:.80}."
            )
        if isinstance(part, (int, float)) or (isinstance(part, str) and part in symbols):
            continue
        if not isinstance(part, (list, tuple)) or len(part) < 2 or not _takes(part):
            raise SizeInvalid(
                f"A program holds the unknown argument {expression!r:.200}: {part!r:.80} is no size."
            )
        waiting += [(operand, depth + 1) for operand in part[1:]]


def _takes(part: Sequence[Any]) -> bool:
    """Tell whether an operation is known, and has as many operands as it takes."""
    operation, count = part[0], len(part) - 1
    if not isinstance(operation, str):
        return False
    if operation in _UNARY:
        return count == 1
    if operation in _BINARY:
        return count == 2
    return operation in _FOLDED or (operation, count) in (("round", 1), ("round", 2), ("where", 3))


def size_text(expression: Any) -> str:
    """Write a size expression the way people do.

    >>> size_text(["mul", 2, ["add", "s0", 1]])
    '2*(s0 + 1)'
    """
    if isinstance(expression, (int, float, str)):
        return str(expression)
    operation, *operands = expression
    texts = [size_text(operand) for operand in operands]
    if operation not in _SIGNS:
        return f"{operation}({', '.join(texts)})"
    grouped = [
        f"({text})" if operation != "add" and _is_grouped(operand) else text
        for text, operand in zip(texts, operands, strict=True)
    ]
    return _SIGNS[operation].join(grouped)


def _is_grouped(operand: Any) -> bool:
    return not isinstance(operand, (int, float, str)) and operand[0] in _SIGNS
