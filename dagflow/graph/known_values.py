"""Lets a trace know what follows from small inputs alone: images' sides in patches, as whole numbers.

Vision towers take a row of patches and a grid (N, 3) or (N, 2) that says whose they are, and their code
loops over the grid's numbers. Where it does, the numbers are known while the model is traced, and the graph
is right for batches with the same ones. What is computed from them alone is computed beside the trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from dagflow_tasks.program.interpreter import RANDOM_LOCK

_MOST_OF_A_GRID = 256
# Positions and windows of a few images; more is what a model computes on, not what it decides by.
_MOST_NUMBERS = 1 << 16


def grids(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the inputs that may be grids: whole numbers (N, 2) or (N, 3), 256 at most."""
    return {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if tensor.dim() == 2
        and tensor.shape[1] in (2, 3)
        and 0 < tensor.numel() <= _MOST_OF_A_GRID
        and tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        and not tensor.is_meta
    }


@dataclass(frozen=True)
class _Held:
    """What a traced tensor holds, while nothing has been written into it since."""

    value: torch.Tensor
    origins: frozenset[str]
    version: int


@dataclass
class Call:
    """A call of a torch function in a trace.

    Attributes
    ----------
    args, kwargs
        What to call it with: known masks and sizes are written as numbers.
    given
        What it was called with.
    known
        The known tensors among the arguments, if all are.
    is_known
        Whether its result follows from known numbers.
    answer
        Its result if it needn't be called, in a list.
    """

    args: Any
    kwargs: dict[str, Any]
    given: tuple[Any, dict[str, Any]]
    known: Sequence[tuple[torch.Tensor, _Held]] = ()
    is_known: bool = False
    answer: list[Any] = field(default_factory=list)

    @property
    def origins(self) -> frozenset[str]:
        return frozenset().union(*(held.origins for _, held in self.known))


class KnownValues:
    """What the tensors of one trace hold, as far as it follows from known inputs.

    Attributes
    ----------
    inputs
        What is known, by the input's name.
    read : set of str
        The inputs whose numbers have decided what the graph is.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.read: set[str] = set()

    def begin(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the trace that this is in know what some of its inputs hold."""
        for name, value in self.inputs.items():
            with _beside_the_trace():
                own = value.clone()
            self._hold(tensors[name], own, frozenset([name]))

    def call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Call:
        """Return what is to be done about a call: how to make it, or its answer."""
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [(tensor, held) for tensor in tensors if (held := _held(tensor)) is not None]
        call = Call(args, kwargs, (args, kwargs), known)
        call.is_known = len(known) == len(tensors) and bool(known or name in _MAKES_TENSORS)
        if call.is_known and name == "__iter__":
            call.answer = [iter(self._unbound(args[0]))]
        elif call.is_known and (name in _READS or _is_sized_by_values(name, args, kwargs)):
            found = _computed(func, call)
            if found:
                self.read |= call.origins
                call.answer = [self._lifted(found[0], call.origins)]
        elif known:
            self._write_numbers(name, call)
        return call

    def note(self, func: Any, call: Call, result: Any) -> None:
        """Remember what a call's result holds, and what it has written."""
        found, form = pytree.tree_flatten(result)
        if not call.is_known or not all(map(_is_small, found)):
            return
        for value in _computed(func, call):
            values, form_of_values = pytree.tree_flatten(value)
            for tensor, held in call.known:
                if tensor._version != held.version:
                    self._hold(tensor, held.value, call.origins)
            if form == form_of_values:
                for tensor, number in zip(found, values, strict=True):
                    if _are_alike(tensor, number):
                        self._hold(tensor, number, call.origins)

    def _hold(self, tensor: torch.Tensor, value: torch.Tensor, origins: frozenset[str]) -> None:
        if not tensor.is_inference():  # those don't say when they are written
            setattr(tensor, _KNOWN, _Held(value, origins, tensor._version))

    def _unbound(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        call = self.call(torch.unbind, "unbind", (tensor,), {})
        rows = torch.unbind(tensor)
        self.note(torch.unbind, call, rows)
        return rows

    def _lifted(self, found: Any, origins: frozenset[str]) -> Any:
        """Return a result with its tensors as constants of the trace."""

        def lift(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            with _beside_the_trace():
                own = value.clone()  # what is written into `value` later is no part of the constant
            constant = own.clone()
            self._hold(constant, value, origins)
            return constant

        return pytree.tree_map(lift, found)

    # Known tensors that say how much, or which, are written as the numbers that they hold.

    def _write_numbers(self, name: str, call: Call) -> None:
        args, kwargs = call.given
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(place for part in index for place in self._places(part))
            call.args = (args[0], places, *args[2:])
        elif name == "repeat_interleave":
            self._repeat(call, *args, **kwargs)
        elif name in _MAKES_TENSORS:
            call.args, call.kwargs = pytree.tree_map(self._number, (args, kwargs))
        elif name in _TAKES_SIZES:
            rest, call.kwargs = pytree.tree_map(self._number, (args[1:], kwargs))
            call.args = (*args[:1], *rest)

    def _places(self, part: Any) -> Sequence[Any]:
        held = _held(part)
        if isinstance(part, slice):
            return [slice(*map(self._number, (part.start, part.stop, part.step)))]
        if held is None or held.value.dtype != torch.bool or not held.value.dim():
            return [part]
        self.read |= held.origins
        with _beside_the_trace():
            places = held.value.nonzero(as_tuple=True)
        return [self._lifted(place, held.origins) for place in places]

    def _repeat(
        self, call: Call, values: torch.Tensor, repeats: Any, dim: int | None = None, **more: Any
    ) -> None:
        """Have rows repeated known numbers of times as torch does it: taken by their indices."""
        held = _held(repeats)
        if held is None:
            return
        if held.value.numel() == 1:
            call.args, call.kwargs = (values, self._number(repeats), dim), more
            return
        with _beside_the_trace():
            rows = torch.repeat_interleave(held.value)
        self.read |= held.origins
        source = values.reshape(-1) if dim is None else values
        call.answer = [source.index_select(dim or 0, self._lifted(rows, held.origins))]

    def _number(self, leaf: Any) -> Any:
        held = _held(leaf)
        if held is None or held.value.numel() != 1 or held.value.dtype.is_floating_point:
            return leaf
        self.read |= held.origins
        with _beside_the_trace():
            return held.value.item()


_KNOWN = "_dagflow_known"
_MAKES_TENSORS = frozenset(("arange", "zeros", "ones", "full", "tensor", "eye", "linspace"))
# Results that are no tensors: Python's code goes on with them.
_READS = frozenset(
    (
        "item",
        "tolist",
        "__int__",
        "__index__",
        "__float__",
        "__bool__",
        "__contains__",
        "is_nonzero",
        "equal",
        "allclose",
        "numpy",
    )
)
_SIZED_BY_VALUES = frozenset(("nonzero", "argwhere", "masked_select", "bincount"))
_TAKES_SIZES = frozenset(
    (
        "new_zeros",
        "new_ones",
        "new_full",
        "view",
        "reshape",
        "expand",
        "repeat",
        "split",
        "narrow",
        "unflatten",
        "interpolate",
        "pad",
        "chunk",
        "roll",
        "tensor_split",
        "split_with_sizes",
    )
)


def _held(tensor: Any) -> _Held | None:
    held: _Held | None = getattr(tensor, _KNOWN, None) if isinstance(tensor, torch.Tensor) else None
    return held if held is not None and tensor._version == held.version else None


def _is_sized_by_values(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return not isinstance(repeats, int)
    return name in _SIZED_BY_VALUES or "unique" in name or (name == "where" and len(args) == 1)


def _are_alike(tensor: Any, value: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    return tuple(tensor.shape) == tuple(value.shape) and tensor.dtype == value.dtype


@contextmanager
def _beside_the_trace() -> Iterator[None]:
    """Run what follows at once, unseen by the trace that this is in."""
    with ExitStack() as outside:
        for _ in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            outside.enter_context(_pop_mode_temporarily())
        outside.enter_context(_disable_current_modes())
        outside.enter_context(torch.no_grad())
        yield


def _leaves(tree: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(tree):
        yield from (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


def _is_small(leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return True
    sizes = tuple(leaf.shape)
    return all(isinstance(s, int) for s in sizes) and math.prod(sizes) <= _MOST_NUMBERS


def _computed(func: Any, call: Call) -> list[Any]:
    """Return a call's result on known numbers in a list; none if it is drawn, or can't be had."""
    known = {id(tensor): held.value for tensor, held in call.known}

    def number(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(*map(number, (leaf.start, leaf.stop, leaf.step)))
        return torch.device("cpu") if isinstance(leaf, torch.device) else known.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(number, call.given)
    if any(isinstance(leaf, _OPEN) for leaf in _leaves((args, kwargs))):
        return []
    with RANDOM_LOCK, _beside_the_trace():
        before = torch.default_generator.get_state()
        try:
            found = func(*args, **kwargs)
        except Exception:  # the trace makes the same call, and says so
            return []
        if torch.equal(before, torch.default_generator.get_state()):
            has_more = any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(found))
            return [] if has_more else [found]
        torch.default_generator.set_state(before)
        return []


_OPEN = (torch.SymInt, torch.SymFloat, torch.SymBool)
