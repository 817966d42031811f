"""What a model's forward does beside computing: attributes it sets, random numbers of Python's.

A graph holds tensor operators only. What forward leaves in plain Python attributes, and what it draws
from Python's or NumPy's generators, happens once, while the model is traced; these effects are found
here, undone, and refused or warned of.
"""

from __future__ import annotations

import ast
import linecache
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from dagflow.graph.contents import contents_of, refill, same_contents, same_value

# What every module has, and torch itself keeps: parameters, submodules, hooks.
_MODULES_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_DEEPEST = 4
_CHANGERS = ("append", "extend", "add", "insert", "update", "appendleft", "setdefault", "clear")


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
                if name not in _MODULES_OWN:
                    self._keep(value, Change(path, name), 0)

    def _keep(self, value: Any, owner: Change, depth: int) -> None:
        is_plain = self._values and type(value) is torch.Tensor
        if is_plain and (owner.attribute not in _TABLES or owner.module.startswith(_LOSS)):
            # No parameter or buffer of the model, which a trace replaces: it writes into this one.
            self._tensors[id(value)] = (value, value._version, value.detach().clone())
        contents = contents_of(value)
        if contents is None or id(value) in self._contents or depth > _DEEPEST:
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
            if owner.attribute in _TABLES and value is self._table(owner):
                tables += [Change(owner.module, name) for name in _differing(value, before)]
            elif not same_contents(contents_of(value), before):
                found.append(owner)
        own_changes = [change for change in found if not self._is_torchs(change)]
        return list(dict.fromkeys([*own_changes, *tables]))

    def _is_torchs(self, change: Change) -> bool:
        """Tell whether torch itself keeps an attribute: recurrent layers list their weights."""
        kind = type(self._by_path[change.module])
        return kind.__module__.startswith("torch.") or change.attribute.startswith("_flat_weight")

    def now(self) -> Callable[[], None]:
        """Return what gives the changed attributes and contents the values that they have now.

        Without those that hold tensors or sizes: these belong to a trace.
        """
        attributes = [
            (own, name, own[name])
            for _, own, before in self._attributes
            for name in _differing(_without_own(own), _without_own(before))
            if name in own and not _holds_tensors(own[name])
        ]
        contents = [
            (value, contents_of(value))
            for key, (value, before) in self._contents.items()
            if self._owner[key].attribute not in _TABLES
            and not same_contents(contents_of(value), before)
            and not _holds_tensors(value)
        ]

        def give() -> None:
            for own, name, value in attributes:
                own[name] = value
            for value, kept in contents:
                refill(value, kept)

        return give

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


_MISSING = object()
_TABLES = ("_parameters", "_buffers", "_modules")


def _without_own(attributes: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in attributes.items() if n not in _MODULES_OWN}


def _differing(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return the names under which two tables hold different things."""
    return [
        name
        for name in sorted(now.keys() | before.keys())
        if now.get(name, _MISSING) is not before.get(name, _MISSING)
        and not same_value(now.get(name, _MISSING), before.get(name, _MISSING))
    ]


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    contents = contents_of(value) if depth <= _DEEPEST else None
    items = contents.values() if isinstance(contents, dict) else contents or ()
    return any(_holds_tensors(item, depth + 1) for item in items)


@dataclass
class Uses:
    """How forward uses attributes, in order: "read", "update" or "write", with the line of code."""

    of: dict[Change, list[tuple[str, str]]] = field(default_factory=dict)

    def carried_over(self, change: Change) -> str:
        """Return the line that reads what an earlier call of forward left, or ""."""
        events = self.of.get(change, [])
        if not events or events[0][0] == "write":
            return ""
        return next((line for kind, line in events if kind == "read"), "")

    def is_only_written(self, change: Change) -> bool:
        return all(kind != "read" for kind, _ in self.of.get(change, []))


@contextmanager
def watch_attributes(wrapper: nn.Module, changed: list[Change]) -> Iterator[Uses]:
    """Note every use of some attributes while the model runs."""
    uses = Uses()
    classes = []
    found = holders(wrapper)
    for path in dict.fromkeys(change.module for change in changed):
        module = found[path]
        names = {change.attribute for change in changed if change.module == path}
        classes.append((module, type(module)))
        module.__class__ = _watching(type(module), path, names, uses)
    try:
        yield uses
    finally:
        for module, plain in classes:
            module.__class__ = plain


def _watching(plain: type, path: str, names: set[str], uses: Uses) -> type:
    """Return a class like another that notes uses of attributes."""

    def note(kind: str, name: str) -> None:
        frame = sys._getframe(2)
        if not frame.f_code.co_filename.startswith(_TORCH_FOLDER):
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if kind == "read":
                kind = _kind(frame.f_code.co_filename, frame.f_lineno, name)
            uses.of.setdefault(Change(path, name), []).append((kind, line))

    class Watching(plain):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                note("read", name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in names:
                note("write", name)
            super().__setattr__(name, value)

    Watching.__name__, Watching.__qualname__ = plain.__name__, plain.__qualname__
    Watching.__module__ = plain.__module__
    return Watching


@cache
def _statements(file: str) -> list[ast.stmt]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _kind(file: str, line: int, name: str) -> str:
    """Tell what a line that names an attribute does: it may read it only to change it.

    ``self.n += 1`` is an update, ``self.losses.clear()`` a write.
    """
    around = [
        s
        for s in _statements(file)
        if s.lineno <= line <= (s.end_lineno or s.lineno) and _names(s, name)
    ]
    lengths = [(s.end_lineno or s.lineno) - s.lineno for s in around]
    innermost = [s for s, n in zip(around, lengths, strict=True) if n == min(lengths)]
    if not innermost or not all(_updates(statement, name) for statement in innermost):
        return "read"
    return "write" if all(".clear()" in ast.unparse(s) for s in innermost) else "update"


def _updates(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, ast.AugAssign):
        return _names(statement.target, name) and not _names(statement.value, name)
    if isinstance(statement, ast.Assign):
        targets = [target for target in statement.targets if _names(target, name)]
        inside = [target for target in targets if not isinstance(target, ast.Attribute)]
        return bool(targets) and (not inside or not _names(statement.value, name))
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Attribute)
        and statement.value.func.attr in _CHANGERS
        and _names(statement.value.func.value, name)
    )


def _names(tree: ast.AST, name: str) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(tree))


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
def watch_generators(largest: bool) -> Iterator[Draws]:
    """Note the lines of this thread's code that draw from Python's or NumPy's generators.

    What is drawn between 0 and 1 is as small or as large as can be, so that whoever decides by it,
    to skip a layer with some probability, decides otherwise. Python's are seen by the interpreter's
    profiling hook, under whatever name the model's code knows them, which makes a trace slower;
    NumPy's functions by wrapping them.
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
            ours, caller = frame.f_code is drawn_here.__code__, frame.f_back
            by_library = caller is not None and caller.f_code.co_filename == random.__file__
            is_uniform = caller is not None and caller.f_code is random.Random.uniform.__code__
            note(frame, ours and (is_uniform or not by_library))

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__

        def uniform(low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
            note(sys._getframe(1), tried=True)
            return function(low, high, size) * 0 + low + (high - low) * extreme

        def drawn(*args: Any, **kwargs: Any) -> Any:
            note(sys._getframe(1), tried=name in _BETWEEN_0_AND_1)
            found = function(*args, **kwargs)
            return found * 0 + extreme if name in _BETWEEN_0_AND_1 else found

        return uniform if name == "uniform" else drawn

    extreme = 1 - 2**-53 if largest else 0.0
    thread = threading.get_ident()
    python = random._inst.random

    def drawn_here() -> float:
        plain: float = python()
        return extreme if threading.get_ident() == thread else plain

    before = sys.getprofile()
    with ExitStack() as stack:
        for owner in (random, random._inst):
            stack.enter_context(patch.object(owner, "random", drawn_here))
        for name, function in vars(np.random).items():
            if isinstance(getattr(function, "__self__", None), np.random.RandomState):
                stack.enter_context(patch.object(np.random, name, noting(function)))
        sys.setprofile(called)
        try:
            yield found
        finally:
            sys.setprofile(before)


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
