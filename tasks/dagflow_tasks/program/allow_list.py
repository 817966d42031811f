"""Which of torch's operators programs may name: those of `allowed_operators.toml`, and no other.

The file is reviewed by people; what a name says is checked by what torch says of the operator, its schema.
An operator that isn't what its section claims, in this torch, is refused though it is in the list.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files

import torch

FILE = "allowed_operators.toml"
FUNCTIONAL, VIEWS, IN_PLACE, RANDOM, PRIVATE, INTO, SELECTING = (
    *("functional", "views", "in_place", "random", "private", "into", "selecting"),
)

# What an argument may be. Not among them: storages, streams, files, objects of torch's own classes.
# Layouts, dtypes and memory formats are ints in schemas; devices are replaced by the stage's.
_ARGUMENT = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|float|bool|number|str|Device|Generator)\]*"
)


@cache
def allowed() -> Mapping[str, str]:
    """Return the section of each operator in the list, by the name that programs give it."""
    body = tomllib.loads((files("dagflow_tasks.program") / FILE).read_text("utf-8"))
    names = dict.fromkeys(body[FUNCTIONAL]["operators"], FUNCTIONAL)
    for section in (VIEWS, IN_PLACE, RANDOM, PRIVATE, INTO, SELECTING):
        names |= dict.fromkeys(body[section], section)
    return {name_in_programs(name): section for name, section in names.items()}


def name_in_programs(name: str) -> str:
    """Return an operator's name in programs for its name in the list.

    >>> name_in_programs("add.Tensor"), name_in_programs("abs")
    ('aten.add.Tensor', 'aten.abs.default')
    """
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


def unlike(section: str, operator: torch._ops.OpOverload) -> str:
    """Say why an operator doesn't belong to a section of the list; "" if it does.

    Whatever the section: arguments are tensors, numbers, and texts, and results are new tensors or
    share memory with arguments as the schema says.
    """
    schema = operator._schema
    for argument in schema.arguments:
        if not _ARGUMENT.fullmatch(str(argument.type)):
            return f"its argument {argument.name!r} is a {argument.type}"
    for result in schema.returns:
        if str(result.type) not in ("Tensor", "List[Tensor]"):
            return f"it returns a {result.type}"
    is_dynamic = torch.Tag.dynamic_output_shape in operator.tags and section != SELECTING
    if is_dynamic and operator not in _shaped_by_arguments():
        return "the size of its result depends on the data"
    return _SECTIONS[section](operator)


def _functional(operator: torch._ops.OpOverload) -> str:
    if _is_private(operator):
        return "it is private"
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "it draws random numbers"
    return _shares_nothing(operator)


def _private(operator: torch._ops.OpOverload) -> str:
    if not _is_private(operator):
        return "it isn't private"
    writes = any(_writes(argument) for argument in operator._schema.arguments)
    return "it writes an argument" if writes else ""


def _views(operator: torch._ops.OpOverload) -> str:
    if _is_private(operator):
        return "it is private"
    if any(_writes(argument) for argument in operator._schema.arguments):
        return "it writes an argument"
    returns = operator._schema.returns
    return "" if any(r.alias_info is not None for r in returns) else "it returns no view"


def _in_place(operator: torch._ops.OpOverload) -> str:
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "it draws random numbers"
    return _writes_its_input(operator)


def _random(operator: torch._ops.OpOverload) -> str:
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return "torch doesn't say that it draws random numbers, so nobody would seed it"
    in_place = any(_writes(argument) for argument in operator._schema.arguments)
    return _writes_its_input(operator) if in_place else _shares_nothing(operator)


def _into(operator: torch._ops.OpOverload) -> str:
    written = [argument.name for argument in operator._schema.arguments if _writes(argument)]
    return "" if written == ["out"] else f"it writes {written} instead of 'out'"


def _writes_its_input(operator: torch._ops.OpOverload) -> str:
    written = [i for i, argument in enumerate(operator._schema.arguments) if _writes(argument)]
    if _is_private(operator) or not operator._opname.endswith("_"):
        return "its name isn't that of a public operator in place"
    return "" if written == [0] else "it writes another argument than its first"


def _shares_nothing(operator: torch._ops.OpOverload) -> str:
    schema = operator._schema
    shared = [*schema.arguments, *schema.returns]
    return "it shares or writes memory" if any(s.alias_info is not None for s in shared) else ""


def _writes(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _is_private(operator: torch._ops.OpOverload) -> bool:
    name = operator._opname
    return name.startswith("_") and not name.startswith("__")  # `__and__` is Python's &


def _selecting(operator: torch._ops.OpOverload) -> str:
    return "it is private" if _is_private(operator) else _shares_nothing(operator)


_SECTIONS: Mapping[str, Callable[[torch._ops.OpOverload], str]] = {
    FUNCTIONAL: _functional,
    VIEWS: _views,
    IN_PLACE: _in_place,
    RANDOM: _random,
    PRIVATE: _private,
    INTO: _into,
    SELECTING: _selecting,
}


@cache
def _shaped_by_arguments() -> frozenset[torch._ops.OpOverload]:
    """Operators whose results depend on data for some arguments only.

    `x[mask]`, and `one_hot` without a number of classes.
    """
    aten = torch.ops.aten
    return frozenset((aten.index.Tensor, aten.one_hot.default))
