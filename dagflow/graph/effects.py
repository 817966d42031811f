"""What a model's forward does beside computing: attributes it sets, random numbers of Python's.

A graph holds tensor operators only. What forward leaves in plain Python attributes, and what it draws
from Python's or NumPy's generators, happens once, while the model is traced; these effects are found
here, undone, and refused or warned of.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import sympy.core.random
import torch
from torch import nn

from dagflow.graph.contents import DEEPEST, contents_of, refill, same_contents, same_value
from dagflow.graph.leftovers import MISSING, Left, carried_over, left_at

# What every module has, and torch itself keeps: parameters, submodules, hooks.
TABLES = frozenset({"_parameters", "_buffers", "_modules"})
MODULES_OWN = frozenset(vars(nn.Module())) - TABLES
_TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Change:
    """An attribute of a module that isn't what it was: by the module's path and its own name."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'}: self.{self.attribute}"


_LOSS = "the loss "


def holders(wrapper: nn.Module) -> dict[str, Any]:
    """Return the model's modules and the loss's objects, by their paths and names."""
    found: dict[str, Any] = dict(wrapper.get_submodule("model").named_modules())
    known = {id(module) for module in found.values()}
    for number, holder in enumerate(getattr(wrapper, "beside", ())):
        name = f"{_LOSS}{type(holder).__name__}" + (f" ({number})" if number else "")
        parts = holder.named_modules() if isinstance(holder, nn.Module) else [("", holder)]
        for path, part in parts:
            if id(part) not in known:
                known.add(id(part))
                found[f"{name}.{path}" if path else name] = part
    return found


class Snapshot:
    """A model's and its loss's attributes, all the way through containers and plain objects.

    `changes` tells what is different now, `restore` puts everything back, in place: whoever holds
    one of the model's lists holds it still.

    Parameters
    ----------
    wrapper : torch.nn.Module
        Around the model (its child ``model``), with the objects of the loss in ``beside``, if any.
    values : bool
        Whether to keep what plain tensors hold; not while a trace would see it.
    """

    def __init__(self, wrapper: nn.Module, values: bool = True) -> None:
        self._values = values
        self._by_path = holders(wrapper)
        self._attributes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._owner: dict[int, Change] = {}
        for path, holder in self._by_path.items():
            own = holder.__dict__
            self._attributes.append((path, own, dict(own)))
            for name, value in own.items():
                if name not in MODULES_OWN:
                    self._keep(value, Change(path, name), 0)

    def _keep(self, value: Any, owner: Change, depth: int) -> None:
        is_plain = self._values and type(value) is torch.Tensor
        if is_plain and (owner.attribute not in TABLES or owner.module.startswith(_LOSS)):
            # No parameter or buffer of the model, which a trace replaces: it writes into this one.
            self._tensors[id(value)] = (value, value._version, value.detach().clone())
        contents = contents_of(value)
        if contents is None or id(value) in self._contents or depth > DEEPEST:
            return
        self._contents[id(value)] = (value, contents)
        self._owner[id(value)] = owner
        for item in contents.values() if isinstance(contents, dict) else contents:
            self._keep(item, owner, depth + 1)

    def changes(self) -> list[Change]:
        """Return the attributes that differ, and the parameters, buffers and submodules."""
        found = []
        for path, own, before in self._attributes:
            now, then = _without_own(own), _without_own(before)
            found += [Change(path, name) for name in _differing(now, then)]
        tables = []
        for key, (value, before) in self._contents.items():
            owner = self._owner[key]
            if owner.attribute in TABLES and value is self._table(owner):
                tables += [Change(owner.module, name) for name in _differing(value, before)]
            elif not same_contents(contents_of(value), before):
                found.append(owner)
        own_changes = [change for change in found if not self._is_torchs(change)]
        return list(dict.fromkeys([*own_changes, *tables]))

    def _is_torchs(self, change: Change) -> bool:
        """Tell whether torch itself keeps an attribute: recurrent layers list their weights."""
        kind = type(self._by_path[change.module])
        return kind.__module__.startswith("torch.") or change.attribute.startswith("_flat_weight")

    def left(self) -> list[Left]:
        """Return what is different now, at each place that can be told apart."""
        changed = set(self.changes())
        found: list[Left] = []
        kept = {k: c for k, c in self._contents.items() if self._owner[k].attribute not in TABLES}
        for path, own, before in self._attributes:
            for name in sorted((own.keys() | before.keys()) - MODULES_OWN - TABLES):
                change = Change(path, name)
                if change not in changed:
                    continue
                changed.discard(change)
                put = functools.partial(_put, own, name)
                found += left_at(
                    str(change), put, before.get(name, MISSING), own.get(name, MISSING), kept
                )
        return found + [
            Left(str(change), _put_nothing, None, refusal=self._refusal(change))
            for change in self.changes()
            if change in changed
        ]

    def _refusal(self, change: Change) -> str:
        own = vars(self._by_path[change.module])
        if not any(change.attribute in own.get(t, ()) for t in ("_parameters", "_modules")):
            return carried_over(str(change))
        return (
            f"Forward replaces a parameter or submodule ({change}), and stages train those that the "
            "model was built with. What to do: write into the parameter in place, under "
            "torch.no_grad(), or build the module in __init__."
        )

    def _table(self, owner: Change) -> Any:
        return next(own[owner.attribute] for p, own, _ in self._attributes if p == owner.module)

    def restore(self) -> None:
        """Put all attributes, contents and plain tensors' values back."""
        for tensor, version, kept in self._tensors.values():
            if tensor._version != version:
                tensor.detach().copy_(kept)
        for _, own, before in self._attributes:
            if own.keys() != before.keys() or any(own[name] is not before[name] for name in before):
                own.clear()
                own.update(before)
        for value, before in self._contents.values():
            if not same_contents(contents_of(value), before):
                refill(value, before)


class RandomStates:
    """The states of Python's and NumPy's generators in this process.

    Not torch's: a trace draws nothing from it, and stages in other threads seed it meanwhile.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def changed(self) -> bool:
        """Tell whether one has moved, here or in another thread."""
        return random.getstate() != self._python or not all(
            np.array_equal(a, b) for a, b in zip(np.random.get_state(), self._numpy, strict=True)
        )

    def restore(self) -> None:
        """Put the states back."""
        if self.changed():
            random.setstate(self._python)
            np.random.set_state(self._numpy)


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    if value is MISSING:
        table.pop(name, None)
    else:
        table[name] = value


def _put_nothing(value: Any) -> None:
    """Leave a parameter, buffer or submodule as it is."""


def _without_own(attributes: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in attributes.items() if n not in MODULES_OWN}


def _differing(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return the names under which two tables hold different things."""
    return [
        name
        for name in sorted(now.keys() | before.keys())
        if now.get(name, MISSING) is not before.get(name, MISSING)
        and not same_value(now.get(name, MISSING), before.get(name, MISSING))
    ]


@contextmanager
def watch_attributes(wrapper: nn.Module, names: Collection[str]) -> Iterator[set[str]]:
    """Find the attributes that every call of forward first sets and then reads.

    They are its scratch paper: nobody else is likely to look at them.

    Parameters
    ----------
    names
        Of attributes, as a `Change` is written.
    """
    read: set[str] = set()
    classes = []
    for path, module in holders(wrapper).items():
        begin = str(Change(path, ""))
        own = {name.removeprefix(begin): name for name in names if name.startswith(begin)}
        if own:
            classes.append((module, type(module)))
            module.__class__ = _watching(type(module), own, read)
    try:
        yield read
    finally:
        for module, plain in classes:
            module.__class__ = plain


def _watching(plain: type, names: Mapping[str, str], read: set[str]) -> type:
    """Return a class like another that notes uses of attributes."""
    first: dict[str, str] = {}

    def is_models() -> bool:
        return not sys._getframe(2).f_code.co_filename.startswith(_TORCH_FOLDER)

    class Watching(plain):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names and is_models() and first.setdefault(name, "read") == "write":
                read.add(names[name])
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in names and is_models():
                first.setdefault(name, "write")
            super().__setattr__(name, value)

    Watching.__name__, Watching.__qualname__ = plain.__name__, plain.__qualname__
    Watching.__module__ = plain.__module__
    return Watching


@dataclass
class Draws:
    """Lines that draw from Python's or NumPy's generators.

    Attributes
    ----------
    lines
        All of them.
    untried
        Those whose numbers can't be made as small and as large as can be.
    """

    lines: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)


@contextmanager
def watch_generators(kind: str, lines: bool = True) -> Iterator[Draws]:
    """Note the lines of this thread's code that draw from Python's or NumPy's generators.

    What is drawn between 0 and 1 is as small or as large as can be, so that whoever decides by it,
    to skip a layer with some probability, decides otherwise; or it is between whatever bounds it is
    compared with. Python's are seen by the interpreter's
    profiling hook, under whatever name the model's code knows them, which makes a trace slower;
    NumPy's functions by wrapping them. Without `lines` there is no hook.
    """
    found = Draws()

    def note(frame: types.FrameType | None, tried: bool) -> None:
        while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        if frame is not None:
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            found.lines.append(line)
            if not tried:
                found.untried.append(line)

    def called(frame: types.FrameType, event: str, function: Any) -> None:
        if event == "c_call" and isinstance(getattr(function, "__self__", None), random.Random):
            if function.__self__ in sympys:
                return
            ours, caller = frame.f_code is drawn_here.__code__, frame.f_back
            by_library = caller is not None and caller.f_code.co_filename == random.__file__
            is_uniform = caller is not None and caller.f_code is random.Random.uniform.__code__
            note(frame, ours and (is_uniform or not by_library))

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        def uniform(low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
            note(sys._getframe(1), tried=True)
            return extreme * (function(low, high, size) * 0 + (high - low)) + low

        def drawn(*args: Any, **kwargs: Any) -> Any:
            note(sys._getframe(1), tried=name in _BETWEEN_0_AND_1)
            found = function(*args, **kwargs)
            return extreme + found * 0 if name in _BETWEEN_0_AND_1 else found

        return uniform if name == "uniform" else drawn

    extreme = _KINDS[kind]
    thread = threading.get_ident()
    python = random._inst.random
    drawn_so_far = itertools.count()

    def drawn_here() -> float:
        plain: float = python()
        is_ours = threading.get_ident() == thread and next(drawn_so_far) < _MOST_DRAWS
        return extreme if is_ours else plain

    # With these it shuffles, in whatever asks about open sizes.
    sympys = (sympy.core.random.rng, sympy.core.random._assumptions_rng)
    before = sys.getprofile()
    with ExitStack() as stack:
        for owner in (random, random._inst):
            stack.enter_context(patch.object(owner, "random", drawn_here))
        for name, function in vars(np.random).items():
            if isinstance(getattr(function, "__self__", None), np.random.RandomState):
                stack.enter_context(patch.object(np.random, name, noting(function)))
        sys.setprofile(called if lines else before)
        try:
            yield found
        finally:
            sys.setprofile(before)


class _Between(float):
    """A number drawn between two bounds, that is on whichever side it is asked of, if it can be."""

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> _Between:
        found = super().__new__(cls, value)
        found.low, found.high = min(low, high), max(low, high)
        return found

    def __lt__(self, other: Any) -> bool:
        return bool(self.low < other)

    def __le__(self, other: Any) -> bool:
        return bool(self.low <= other)

    def __gt__(self, other: Any) -> bool:
        return bool(self.high > other)

    # No draw is the upper bound itself.
    __ge__ = __gt__

    def __eq__(self, other: object) -> bool:
        return self <= other < self.high if isinstance(other, (int, float)) else False

    __hash__ = float.__hash__

    def _moved(self, by: Callable[[float, Any], Any], other: Any) -> Any:
        value = by(float(self), other)
        if value is NotImplemented:
            return value
        return _Between(value, by(self.low, other), by(self.high, other))

    def __mul__(self, other: Any) -> Any:
        return self._moved(float.__mul__, other)

    def __add__(self, other: Any) -> Any:
        return self._moved(float.__add__, other)

    def __rsub__(self, other: Any) -> Any:
        return self._moved(float.__rsub__, other)

    __rmul__, __radd__ = __mul__, __add__


_KINDS = {"largest": 1 - 2**-53, "smallest": 0.0, "between": _Between(0.5, 0.0, 1.0)}
# After so many, real ones: a loop may go on for as long as its draws are small.
_MOST_DRAWS = 1000
_BETWEEN_0_AND_1 = ("rand", "random", "random_sample", "sample", "ranf")
_LIBRARIES = (
    __file__,
    contents_of.__code__.co_filename,
    str(Path(random.__file__)),
    str(Path(np.__file__).parent),
    _TORCH_FOLDER,
)


def gradient_hooks(model: nn.Module) -> list[str]:
    """Name the modules and parameters that have hooks on their gradients."""
    found = [
        f"module {path or 'the model itself'!r}"
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    return found + [
        f"parameter {name!r}"
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take the modules' hooks on gradients off: traced, they would wrap inputs in functions."""
    taken = [(m, m._backward_hooks, m._backward_pre_hooks) for m in model.modules()]
    for module, hooks, _ in taken:
        module._backward_hooks, module._backward_pre_hooks = type(hooks)(), type(hooks)()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in taken:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks
