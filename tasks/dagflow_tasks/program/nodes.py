"""One operator of a program, and what its arguments may be: references, sizes and encoded literals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dagflow_tasks.errors import ProgramInvalid, SizeInvalid
from dagflow_tasks.program.sizes import check_size, evaluate_size

Argument = Any
"""JSON: None, bool, int, float, str, a list, or a one-key mapping (`ref`, `size`, `dtype`, ...)."""


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes
    ----------
    name : str
        Unique in the operator DAG that the node was captured in. It is also the operator's part of
        the address of its random numbers, so it never changes when the DAG is cut.
    op : str
        ``aten.<operator>.<overload>``, ``getitem`` or an extension.
    args, kwargs
        Encoded arguments, see `Argument`.
    grad : bool
        False inside the model's ``no_grad`` regions.
    autocast : bool
        False inside regions that switch autocast off.
    module : str
        Path of the module whose forward called the operator, "" for the model itself.
    autocast_dtype : str
        The dtype of an autocast region of the model's own, "" outside of these.
    """

    name: str
    op: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument] = field(default_factory=dict)
    grad: bool = True
    autocast: bool = True
    module: str = ""
    autocast_dtype: str = ""

    def references(self) -> Iterator[str]:
        """Names of the values the node reads, in argument order, repeated if read twice."""
        for argument in (*self.args, *self.kwargs.values()):
            yield from argument_references(argument)

    def reading(self, renamed: Mapping[str, str]) -> Node:
        """Return the node with values read by other names."""
        if not any(name in renamed for name in self.references()):
            return self

        def rename(argument: Argument) -> Argument:
            if isinstance(argument, Mapping):
                name = str(argument.get("ref"))
                return {"ref": renamed[name]} if name in renamed else argument
            if isinstance(argument, (list, tuple)):
                return [rename(item) for item in argument]
            return argument

        keywords = {name: rename(argument) for name, argument in self.kwargs.items()}
        return replace(self, args=tuple(map(rename, self.args)), kwargs=keywords)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"name": self.name, "op": self.op, "args": list(self.args)}
        if self.kwargs:
            body["kwargs"] = dict(self.kwargs)
        if not self.grad:
            body["grad"] = False
        if not self.autocast:
            body["autocast"] = False
        if self.module:
            body["module"] = self.module
        if self.autocast_dtype:
            body["autocast_dtype"] = self.autocast_dtype
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Node:
        try:
            node = cls(
                name=body["name"],
                op=body["op"],
                args=tuple(body["args"]),
                kwargs=dict(body.get("kwargs", {})),
                grad=body.get("grad", True),
                autocast=body.get("autocast", True),
                module=body.get("module", ""),
                autocast_dtype=body.get("autocast_dtype", ""),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProgramInvalid(
                f"A node of a program needs 'name', 'op' and 'args'; found {body!r:.200}."
            ) from error
        texts = (node.name, node.op, node.module, node.autocast_dtype, *node.kwargs)
        flags = (node.grad, node.autocast)
        if any(type(text) is not str for text in texts) or any(type(f) is not bool for f in flags):
            raise ProgramInvalid(
                f"A node of a program has texts for names and true or false for flags; found "
                f"{body!r:.200}."
            )
        return node


def argument_references(argument: Argument) -> Iterator[str]:
    """Yield the value names inside one encoded argument."""
    if isinstance(argument, Mapping):
        if "ref" in argument:
            yield argument["ref"]
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from argument_references(item)


def mentions_size(argument: Argument) -> bool:
    """Tell whether an encoded argument depends on the batch's sizes."""
    if isinstance(argument, Mapping):
        return "size" in argument
    return isinstance(argument, (list, tuple)) and any(map(mentions_size, argument))


def encode_literal(value: Any) -> Argument:
    """Encode a Python or torch constant that appears as an operator's argument.

    Raises
    ------
    TypeError
        For anything but numbers, strings, dtypes, devices, layouts and memory formats.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode_literal(value.real), encode_literal(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "stage"}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} can't be an argument in a program")


# fmt: off
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
)
# fmt: on

_TORCH_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {name: getattr(torch, name) for name in _DTYPES},
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}


def decode_literal(
    argument: Mapping[str, Any], sizes: Mapping[str, int], device: torch.device
) -> Any:
    """Decode a one-key mapping that isn't a reference.

    `{"device": ...}` always becomes the stage's own device: no program chooses where it runs.
    """
    try:
        ((kind, value),) = argument.items()
        if kind == "size":
            return evaluate_size(value, sizes)
        if kind == "device":
            return device
        if kind == "float":
            return float(value)
        if kind == "complex":
            parts = (
                decode_literal(p, sizes, device) if isinstance(p, Mapping) else p for p in value
            )
            return complex(*parts)
        return _TORCH_CONSTANTS[kind][value]
    except SizeInvalid:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError):
        raise ProgramInvalid(f"A program holds the unknown argument {argument!r:.200}.") from None


_MOST_NUMBER = 1 << 64
# Lists of lists are the deepest that operators take; texts are names of modes, and einsum's equations.
_MOST_NESTING, _MOST_TEXT = 6, 4096


def check_argument(argument: Argument, symbols: Collection[str]) -> None:
    """Refuse what isn't an argument as `Argument` says, or is too deep or too large for one.

    Raises
    ------
    ProgramInvalid
    """
    waiting = [(argument, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, (list, tuple)) and depth < _MOST_NESTING:
            waiting += [(item, depth + 1) for item in part]
        elif isinstance(part, Mapping):
            _check_encoded(part, symbols)
        elif not (
            part is None
            or isinstance(part, (bool, float))
            or (isinstance(part, int) and abs(part) < _MOST_NUMBER)
            or (isinstance(part, str) and len(part) <= _MOST_TEXT)
        ):
            raise ProgramInvalid(f"A program holds the unknown argument {part!r:.200}.")


def _check_encoded(argument: Mapping[str, Any], symbols: Collection[str]) -> None:
    kind, value = next(iter(argument.items())) if len(argument) == 1 else ("", None)
    if kind == "size":
        check_size(value, symbols)
    elif kind == "ref" and type(value) is str:
        pass  # whether it is defined is asked where the nodes are known
    else:
        decode_literal(argument, {}, _CPU)


_CPU = torch.device("cpu")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that a program names; nothing else of torch can be reached by name."""
    dtype = _TORCH_CONSTANTS["dtype"].get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ProgramInvalid(f"A program holds the unknown dtype {name!r:.80}.")
    return dtype
