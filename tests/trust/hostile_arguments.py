"""Arguments that an operator's schema takes and no model gives: drawn from a seed, the same every time."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dagflow_tasks.program.operators import resolve, schema_of

_FLOATS = (
    torch.float32,
    torch.float32,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
)
_WHOLE = (torch.int64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)
_RARE = (torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16)
_SMALL = (0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, -1, -2)
_LARGE = (
    *(7, 16, 64, 1000, -7, -1000, 1 << 20, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 40),
    *(1 << 62, (1 << 63) - 1, -(1 << 63), -(1 << 63) + 1),
)
_WILD = (float("nan"), float("inf"), float("-inf"), -1.0, 1e-40, 1e38, -1e38, 2.0**63, 0.5, 1e9)
# fmt: off
_TEXTS = (
    "none", "mean", "sum", "tanh", "floor", "trunc", "constant", "reflect", "replicate", "circular",
    "same", "valid", "ij", "xy", "fro", "nuc", "linear", "lower", "higher", "nearest", "midpoint", "amax",
    "amin", "prod", "add", "multiply", "ortho", "forward", "left", "right", "L", "U", "reduced", "complete",
    "ij,jk->ik", "ij->ji", "...i,...j->...ij", "i,i->", "bij,bjk->bik", "", "x" * 60, "ii->i", ",,->",
)
# fmt: on
_MOST_ELEMENTS = 1 << 12


@dataclass(frozen=True)
class Formal:
    """One parameter of an operator: its name, its type as schemas write it, whether it may be left out."""

    name: str
    type: str
    optional: bool
    keyword: bool


def formals_of(op: str, schema: torch.FunctionSchema | None = None) -> list[Formal]:
    """Return an operator's parameters, those of dagflow's own functions by their annotations."""
    schema = schema or schema_of(op)
    if schema is not None:
        return [
            Formal(a.name, str(a.type), a.has_default_value(), a.kwarg_only)
            for a in schema.arguments
        ]
    found = []
    for name, parameter in inspect.signature(resolve(op)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = _ANNOTATED.get(str(parameter.annotation).strip("'"), "Tensor")
        found.append(Formal(name, kind, parameter.default is not parameter.empty, False))
    return found


_ANNOTATED = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Optional[Tensor]",
    "Sequence[torch.Tensor]": "List[Tensor]",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "list[int]": "List[int]",
    "torch.dtype": "dtype",
    "torch.device": "Device",
}


class Arena:
    """Memory full of a secret, in which tensors lie that know nothing of what is around them."""

    def __init__(self, num_bytes: int = 1 << 18) -> None:
        self._memory = np.zeros(num_bytes, dtype=np.uint8)
        self._secrets: dict[bytes, np.ndarray[Any, Any]] = {}

    def fill(self, secret: bytes) -> None:
        """Begin again: nothing but the secret."""
        if secret not in self._secrets:
            repeated = np.frombuffer(secret * (self._memory.nbytes // len(secret) + 1), np.uint8)
            self._secrets[secret] = repeated[: self._memory.nbytes].copy()
        self._whole = self._secrets[secret]
        self._memory[:] = self._whole
        self._placed: list[tuple[int, int]] = []
        self._at = 4096

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor's copy in the arena, with secrets on both sides."""
        num_bytes = tensor.numel() * tensor.element_size()
        begin, end = self._at, self._at + num_bytes
        if not num_bytes or end + 4096 > self._memory.nbytes:
            return tensor
        self._at = -(-end // 64) * 64 + 256
        self._placed.append((begin, end))
        # `frombuffer` makes a storage of just these bytes.
        own = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
        return own.reshape(tensor.shape).copy_(tensor)

    def is_whole(self) -> bool:
        """Tell whether nothing around the tensors was written."""
        for begin, end in self._placed:
            self._memory[begin:end] = self._whole[begin:end]
        return bool(np.array_equal(self._memory, self._whole))


class Hostile:
    """Draws arguments for one call; drawn again from the same seed they are the same."""

    def __init__(self, seed: str, arena: Arena) -> None:
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(self._random.getrandbits(32))
        self._arena = arena
        self._shape = self._any_shape()
        self._kind = self._random.choice((_FLOATS, _FLOATS, _FLOATS, _WHOLE))
        self._dtype = self._random.choice(self._kind)
        self._calm = self._random.random() < 0.5

    def arguments(self, formals: Sequence[Formal]) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for formal in formals:
            if formal.optional and self._chance(0.5):
                continue
            value = self._value(formal.type, formal.name)
            if formal.keyword or len(positional) < formals.index(formal):
                keywords[formal.name] = value
            else:
                positional.append(value)
        return positional, keywords

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _value(self, kind: str, name: str) -> Any:
        if kind.startswith("Optional["):
            if self._chance(0.3):
                return None
            kind = kind[len("Optional[") : -1]
        if kind == "Generator":
            return None
        if kind == "Device":
            return torch.device("cpu")
        if name in ("dtype", "out_dtype") or kind == "dtype":
            return self._random.choice((*_FLOATS, *_WHOLE, *_RARE))
        if name == "layout":
            return torch.strided
        if name == "memory_format":
            return self._random.choice(
                (torch.contiguous_format, torch.preserve_format, torch.channels_last)
            )
        if kind.startswith("List["):
            inner = kind[len("List[") : -1]
            return [self._value(inner, name) for _ in range(self._length(inner))]
        return self._scalar(kind)

    def _length(self, inner: str) -> int:
        if inner == "Tensor":
            return self._random.choice((0, 1, 2, 2, 3, 4, 8))
        return self._random.choice((0, 1, 1, 2, 2, 2, 3, 3, len(self._shape), len(self._shape), 6))

    def _scalar(self, kind: str) -> Any:
        if kind == "Tensor":
            return self._tensor()
        if kind == "int":
            return self._whole_number()
        if kind == "bool":
            return self._chance(0.5)
        if kind == "float":
            return self._float()
        if kind == "number":
            return self._random.choice((self._whole_number, self._float, lambda: 1 + 2j))()
        if kind == "str":
            return self._random.choice(_TEXTS)
        raise LookupError(f"no arguments of the type {kind}")

    def _whole_number(self) -> int:
        if self._chance(0.1):
            return self._random.choice(self._shape) if self._shape else 0
        return self._random.choice(_SMALL if self._chance(0.95 if self._calm else 0.7) else _LARGE)

    def _float(self) -> float:
        return self._random.choice(_WILD) if self._chance(0.3) else self._random.random()

    def _any_shape(self) -> list[int]:
        dims = self._random.choice((0, 1, 1, 2, 2, 3, 3, 4, 4, 5))
        shape = [self._random.choice((0, 1, 2, 2, 3, 3, 4, 4, 5, 8)) for _ in range(dims)]
        if shape and self._chance(0.85):
            shape = [max(size, 1) for size in shape]
        return shape

    def _tensor(self) -> torch.Tensor:
        shape = list(self._shape) if self._chance(0.6) else self._any_shape()
        if shape and self._chance(0.2):
            shape[self._random.randrange(len(shape))] = self._random.choice((1, 2, 3, 4))
        if shape and self._chance(0.1):
            shape = shape[self._random.randrange(len(shape)) :]
        while np.prod(shape, initial=1) > _MOST_ELEMENTS:
            shape.pop()
        dtype = (
            self._dtype if self._chance(0.7) else self._random.choice((*_WHOLE, *_FLOATS, *_RARE))
        )
        placed = self._arena.place(self._filled(shape, dtype))
        if placed.dim() > 1 and self._chance(0.15):
            placed = placed.transpose(0, self._random.randrange(placed.dim()))
        if placed.dim() and placed.shape[0] > 1 and self._chance(0.1):
            placed = placed[1:]
        if placed.numel() and placed.dim() and self._chance(0.05):
            placed = placed[:1].expand(self._random.choice((1, 3, 5)), *placed.shape[1:])
        return placed

    def _filled(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        count = int(np.prod(shape, initial=1))
        if dtype.is_floating_point or dtype.is_complex:
            numbers = self._numpy.standard_normal(count)
            if self._chance(0.3):
                numbers = self._numpy.random(count)
            if self._chance(0.2) and count:
                numbers[self._numpy.integers(count)] = self._random.choice(_WILD)
        elif dtype == torch.bool:
            numbers = self._numpy.integers(0, 2, count)
        else:
            numbers = self._numpy.integers(0, self._random.choice((1, 2, 3, 5, 9)), count)
            if self._chance(0.3):
                numbers = self._numpy.integers(-3, 9, count)
            if self._chance(0.2) and count:
                numbers[self._numpy.integers(count)] = self._random.choice(_LARGE)
        return torch.from_numpy(numbers).to(dtype).reshape(shape)
