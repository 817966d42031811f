"""Keeps what ``torch._check`` and its like demand of values: a trace takes it for granted, workers assert it.

transformers has its checks of values in this form (``torch_compilable_check``): that there are as many
places for images in a text as there are images' features, say.
"""

from __future__ import annotations

import ast
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import TensorReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

from dagflow.errors import CaptureFailed
from dagflow.graph.checks import statements

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FILES = (__file__, str(Path(__file__).with_name("trace.py")))
_UNKNOWN = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)


@dataclass(frozen=True)
class _Number:
    """A number that a trace doesn't know: what computes it as a tensor, and of what."""

    computed: Callable[[torch.Tensor], torch.Tensor]
    tensor: torch.Tensor
    version: int


class Demands:
    """What a model's code demands of values while it is traced.

    Parameters
    ----------
    module
        Returns the path of the module that the trace is in.
    """

    def __init__(self, module: Callable[[], str]) -> None:
        self._module = module
        self._numbers: dict[sympy.Symbol, _Number] = {}

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Remember where a number comes from that a torch function returns, or has as a size."""
        if name == "item" and isinstance(result, _SYMBOLIC):
            self._note(result, args[0], lambda tensor: tensor.reshape(()))
        elif name == "tolist" and isinstance(result, list):
            for index, number in enumerate(result):
                if isinstance(number, _SYMBOLIC):
                    self._note(number, args[0], lambda tensor, index=index: tensor[index])  # type: ignore[misc]
        elif name in ("__getitem__", "masked_select", "nonzero"):
            mask = args[0] if name == "nonzero" else _mask(args[1])
            # nonzero(as_tuple=True) returns one tensor for each dimension, all of one size.
            selected = result[0] if isinstance(result, tuple) else result
            for size in selected.shape if mask is not None else ():
                if isinstance(size, torch.SymInt):
                    self._note(size, mask, torch.count_nonzero)

    def _note(
        self, number: Any, tensor: Any, computed: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        unknown = _unknown(number)
        if len(unknown) == 1:
            self._numbers[unknown.pop()] = _Number(computed, tensor, tensor._version)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have torch's checks, in this thread, assert on workers what they demand of values."""
        thread = threading.get_ident()

        def asserting(check: Callable[..., None]) -> Callable[..., None]:
            def checked(error_type: Any, condition: Any, message: Any = None) -> None:
                is_ours = threading.get_ident() == thread and _is_called_by_model()
                if not (is_ours and self.keep(condition)):
                    check(error_type, condition, message)
                elif not isinstance(condition, torch.Tensor):
                    # What follows may rely on it; of some equations torch can make no use.
                    with suppress(AssertionError):
                        check(error_type, condition, message)

            return checked

        with ExitStack() as stack:
            for name in ("_check_with", "_check_tensor_all_with"):
                original = getattr(torch, name)
                stack.enter_context(patch.object(torch, name, asserting(original)))
            yield

    def keep(self, condition: Any) -> bool:
        """Record an assertion of what the model's code demands.

        Returns
        -------
        bool
            Whether there is one: of sizes alone torch itself knows whether it holds.
        """
        if isinstance(condition, FakeTensor):
            if condition.constant is not None or condition.dtype != torch.bool:
                return False
            torch._assert_async(condition.all(), _text(_asking()))
            return True
        if isinstance(condition, torch.SymBool) and not statically_known_true(condition):
            unknown = _unknown(condition)
            if unknown:
                text = _text(_asking())
                torch._assert_async(self._as_tensor(condition, unknown, text), text)
                return True
        return False

    def _as_tensor(
        self, condition: torch.SymBool, unknown: set[sympy.Symbol], text: str
    ) -> torch.Tensor:
        """Compute a condition, which torch has as an expression of sympy, by tensors."""
        environment = condition.node.shape_env
        known = {s: n for s, n in self._numbers.items() if n.tensor._version == n.version}
        values: dict[sympy.Symbol, torch.Tensor] = {}
        try:
            for symbol in condition.node.expr.free_symbols:
                if symbol in unknown:
                    values[symbol] = known[symbol].computed(known[symbol].tensor)
                else:
                    size = environment.create_symintnode(symbol, hint=None)
                    values[symbol] = torch.full((), size, dtype=torch.int64)
            found = sympy_interp(TensorReferenceAnalysis, values, condition.node.expr)
        except (KeyError, NotImplementedError, AttributeError, TypeError) as error:
            raise CaptureFailed(
                f"Module {self._module()!r} demands something of a number that depends on the data "
                f"({text}), and a graph can't compute that number. What to do: demand it of a "
                "tensor, with torch._check_tensor_all(...) or `assert tensor.all()`, or check it in "
                "the data loader."
            ) from error
        return found  # type: ignore[no-any-return]


_SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


def _unknown(number: Any) -> set[sympy.Symbol]:
    """Return the symbols of numbers that depend on the data."""
    found: set[sympy.Symbol] = number.node.expr.free_symbols
    return {symbol for symbol in found if symbol_is_type(symbol, _UNKNOWN)}


def _mask(index: Any) -> torch.Tensor | None:
    """Return the mask in an index, if there is one."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = [p for p in parts if isinstance(p, torch.Tensor) and p.dtype == torch.bool]
    return masks[0] if len(masks) == 1 else None


def _is_called_by_model() -> bool:
    """Tell whether it is the model's code that calls one of torch's checks, and no operator of torch's."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == torch.__file__:
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_TORCH_FOLDER)


def _asking() -> types.FrameType:
    """Return the frame of the model's code whose check it is."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in _OWN_FILES
        or frame.f_code.co_filename.startswith(_TORCH_FOLDER)
        or frame.f_code.co_name == "torch_compilable_check"  # transformers passes it on
    ):
        frame = frame.f_back
    return frame


def _text(frame: types.FrameType) -> str:
    """Name the line that a frame is at, and what it demands."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    calls = [
        s.value
        for s in statements(file)
        if isinstance(s, ast.Expr)
        and isinstance(s.value, ast.Call)
        and s.value.args
        and s.lineno <= line <= (s.end_lineno or s.lineno)
    ]
    if len(calls) != 1:
        return f"{file}:{line}"
    demanded = " ".join(ast.unparse(calls[0].args[0]).split())[:120]
    return f"{file}:{line}: {ast.unparse(calls[0].func)}({demanded})"
