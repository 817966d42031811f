"""Size expressions: numbers that programs compute from a micro-batch's sizes, as JSON.

An expression is a number, a symbol, or ``[operation, operand, ...]``. It is evaluated as Python
evaluates the model's own code, operand by operand, so a scale like ``T ** -0.5`` has the same bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

# Operations that take any number of operands, from left to right.
_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
    "pow": operator.pow,
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
    "lshift": operator.lshift,
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
    KeyError
        For an unknown symbol or operation.
    """
    if isinstance(expression, (int, float)):
        return expression
    if isinstance(expression, str):
        return sizes[expression]
    operation, *operands = expression
    values = [evaluate_size(operand, sizes) for operand in operands]
    if operation == "round":
        return round(*values)
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
        result = _FOLDED[operation](result, value)
    return result


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
