"""What forward may leave behind outside of attributes: in closures, defaults, classes and globals.

And iterators, whose position can't be put back.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import sysconfig
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dagflow.errors import CaptureFailed
from dagflow.graph.contents import DEEPEST, contents_of, own_attributes, refill, same_contents
from dagflow.graph.effects import MODULES_OWN, TABLES, holders
from dagflow.graph.leftovers import MISSING, REMEDY, Left, Leftover, left_at

# Libraries' functions keep caches and flags of their own.
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
_SCALARS = (bool, int, float, complex, str, bytes, types.NoneType)


@dataclass(frozen=True)
class _Place:
    """Something with a name that holds a value."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], None]


class Outside:
    """The plain data that the functions of a model and its loss hold or use by name.

    `changed` names what is different now, `restore` puts it back.
    """

    def __init__(self, wrapper: nn.Module) -> None:
        self._kept = []
        self._contents: dict[int, tuple[Any, Any]] = {}
        for place in _places(wrapper):
            value = place.get()
            if not _is_iterator(value):
                self._kept.append((place, value, self._frozen(value, 0, keep=True)))

    def left(self) -> list[Left]:
        """Return what isn't as it was, at each place that can be told apart."""
        found: list[Left] = []
        for place, value, before in self._kept:
            now = place.get()
            if self._frozen(now, 0, keep=False) != before:
                found += left_at(place.name, place.put, value, now, self._contents)
        return found

    def restore(self) -> None:
        """Put everything back."""
        for place, value, _ in self._kept:
            if place.get() is not value:
                place.put(value)
        for value, before in self._contents.values():
            if not same_contents(contents_of(value), before):
                refill(value, before)

    def _frozen(self, value: Any, depth: int, keep: bool) -> Any:
        if isinstance(value, _SCALARS):
            return value
        contents = contents_of(value) if depth <= DEEPEST and not _is_librarys(value) else None
        if contents is None:
            return id(value)
        if keep:
            self._contents.setdefault(id(value), (value, contents))
        if isinstance(contents, dict):
            keys = [key if isinstance(key, _SCALARS) else id(key) for key in contents]
            items = [self._frozen(item, depth + 1, keep) for item in contents.values()]
            return (id(value), tuple(keys), tuple(items))
        return (id(value), tuple(self._frozen(item, depth + 1, keep) for item in contents))


class _Refusing:
    """Stands for an iterator during a trace."""

    def __init__(self, name: str, iterator: Any) -> None:
        self._name, self._iterator, self._thread = name, iterator, threading.get_ident()

    def __iter__(self) -> _Refusing:
        return self

    def __next__(self) -> Any:
        if threading.get_ident() != self._thread:
            return next(self._iterator)
        raise CaptureFailed(
            f"Forward or the loss takes the next item of an iterator ({self._name}), another one in "
            f"every call. {REMEDY}"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


@contextmanager
def refuse_iterators(wrapper: nn.Module) -> Iterator[None]:
    """While a model is traced, refuse that it takes items of iterators that outlive the call."""
    undo: list[Callable[[], None]] = []
    for path, holder in holders(wrapper).items():
        own = vars(holder)
        for name in own.keys() - MODULES_OWN - TABLES:
            place = _item(f"{path or 'the model itself'}: self.{name}", own, name)
            _refuse_at(place, undo, 0, set())
    for place in list(_places(wrapper)):
        _refuse_at(place, undo, 0, set())
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _refuse_at(place: _Place, undo: list[Callable[[], None]], depth: int, seen: set[int]) -> None:
    """Replace the iterators at a place, and in the containers and objects there."""
    value = place.get()
    contents = contents_of(value) if depth <= DEEPEST and not _is_librarys(value) else None
    if _is_iterator(value):
        place.put(_Refusing(place.name, value))
        undo.append(lambda: place.put(value))
    elif type(value) is tuple:
        items = list(value)
        for index in range(len(items)):
            _refuse_at(_inside(place, items, index), undo, depth + 1, seen)
        if any(new is not old for new, old in zip(items, value, strict=True)):
            place.put(tuple(items))
            undo.append(lambda: place.put(value))
    elif contents is not None and id(value) not in seen and not isinstance(value, _NO_ITEMS):
        seen.add(id(value))
        for key in list(contents) if isinstance(contents, dict) else range(len(contents)):
            _refuse_at(_inside(place, value, key), undo, depth + 1, seen)


# What changes inside of these is no iterator.
_NO_ITEMS = (set, tuple, random.Random, np.random.RandomState, np.random.Generator, np.ndarray)


def _inside(place: _Place, holder: Any, key: Any) -> _Place:
    table = holder if isinstance(holder, (dict, list, deque)) else own_attributes(holder) or {}
    if not isinstance(table, dict) or key in table:
        return _Place(place.name, lambda: table[key], lambda v: operator.setitem(table, key, v))
    return _Place(  # in a slot
        place.name,
        lambda: object.__getattribute__(holder, key),
        lambda v: object.__setattr__(holder, key, v),
    )


def _is_iterator(value: Any) -> bool:
    kind = type(value)
    return hasattr(kind, "__next__") and hasattr(kind, "__iter__") and not hasattr(kind, "read")


# Modules of the standard library whose objects are containers.
_PLAIN = {"argparse", "builtins", "collections", "random", "types"}


def _is_librarys(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    package = type(value).__module__.split(".")[0]
    return package in sys.stdlib_module_names - _PLAIN


def _is_data(value: Any) -> bool:
    is_plain = isinstance(value, (*_SCALARS, torch.Tensor, Leftover)) or _is_iterator(value)
    return is_plain or (contents_of(value) is not None and not _is_librarys(value))


def _places(wrapper: nn.Module) -> Iterator[_Place]:
    found = holders(wrapper)
    seen: set[int] = set(map(id, found.values()))
    for holder in found.values():
        for value in list(vars(holder).values()):
            yield from _of_value(value, seen)
            hooks = value.values() if isinstance(value, OrderedDict) else ()
            for hook in list(hooks):
                yield from _found(_constant(f"a hook, a {type(hook).__name__},", hook), hook, seen)
        yield from _of_class(type(holder), seen)
    for loss in getattr(wrapper, "_loss", ()):
        yield from _of_value(loss, seen)


def _constant(name: str, value: Any) -> _Place:
    """Return the place of an object that stays, but for what is in it."""
    return _Place(name, lambda: value, lambda _: None)


def _item(label: str, table: dict[str, Any], name: str) -> _Place:
    def put(value: Any) -> None:
        if value is MISSING:
            table.pop(name, None)
        else:
            table[name] = value

    return _Place(label, lambda: table.get(name, MISSING), put)


def _of_value(value: Any, seen: set[int]) -> Iterator[_Place]:
    """Find what functions, classes, and containers of these hold."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, types.MethodType):
        owner = value.__self__
        yield from _of_value(value.__func__, seen)
        if id(owner) not in seen:
            name = f"the {type(owner).__name__} of {value.__func__.__qualname__}"
            yield from _found(_constant(name, owner), owner, seen)
    elif isinstance(value, functools.partial):
        yield from _of_value(value.func, seen)
        for index, item in enumerate(value.args):
            yield from _found(_argument(value, index), item, seen)
        for name, item in list(value.keywords.items()):
            label = f"the argument {name!r} of a partial"
            yield from _found(_item(label, value.keywords, name), item, seen)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _of_value(value.__func__, seen)
    elif isinstance(value, nn.Module):
        if id(value) not in seen:
            yield from _of_module(value, seen)
    elif isinstance(value, (list, tuple, dict)) and not isinstance(value, OrderedDict):
        for item in list(value.values() if isinstance(value, dict) else value)[:_MOST_ITEMS]:
            if isinstance(item, (nn.Module, *_FUNCTIONS)):
                yield from _of_value(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not _is_librarys(value):
        yield from _of_class(type(value), seen)


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# A container of modules or functions is short; one of data isn't worth looking through.
_MOST_ITEMS = 1000


def _of_module(module: nn.Module, seen: set[int]) -> Iterator[_Place]:
    """Find what a module keeps that is no submodule of the model."""
    for path, part in module.named_modules():
        if id(part) in seen:
            continue
        seen.add(id(part))
        own = vars(part)
        of = f"{type(module).__name__}{'.' if path else ''}{path}, which isn't registered,"
        for name, value in list(own.items()):
            if name not in MODULES_OWN | TABLES:
                yield from _found(_item(f"{of}: self.{name}", own, name), value, seen)
        yield from _of_class(type(part), seen)


def _argument(partial: functools.partial[Any], index: int) -> _Place:
    def put(value: Any) -> None:
        given = partial.args
        given = (*given[:index], value, *given[index + 1 :])
        partial.__setstate__((partial.func, given, partial.keywords, vars(partial)))  # type: ignore[attr-defined]

    return _Place("an argument of a partial", lambda: partial.args[index], put)


def _of_class(kind: type, seen: set[int]) -> Iterator[_Place]:
    for base in kind.__mro__:
        package = base.__module__.split(".")[0]
        file = str(getattr(sys.modules.get(base.__module__), "__file__", ""))
        if id(base) in seen or package in sys.stdlib_module_names or file.startswith(_INSTALLED):
            continue
        seen.add(id(base))
        for name, value in list(vars(base).items()):
            if name.startswith("__"):
                continue
            if _is_data(value):
                yield _Place(
                    f"{base.__qualname__}.{name}",
                    functools.partial(getattr, base, name, MISSING),
                    functools.partial(setattr, base, name),
                )
            yield from _of_value(value, seen)
        yield from _of_value(vars(base).get("__call__"), seen)


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[_Place]:
    if id(function) in seen or function.__code__.co_filename.startswith(_INSTALLED):
        return
    seen.add(id(function))
    of = f"of {function.__qualname__}"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        place = _Place(
            f"{name!r} in the closure {of}",
            functools.partial(getattr, cell, "cell_contents"),
            functools.partial(setattr, cell, "cell_contents"),
        )
        try:
            value = place.get()
        except ValueError:  # nothing in it yet
            continue
        yield from _found(place, value, seen)
    for index, value in enumerate(function.__defaults__ or ()):
        yield from _found(_default(function, index, f"a default {of}"), value, seen)
    keywords = function.__kwdefaults__ or {}
    for name, value in list(keywords.items()):
        yield from _found(_item(f"the default of {name!r} {of}", keywords, name), value, seen)
    for name, value in list(vars(function).items()):
        yield from _found(_item(f"the attribute {name!r} {of}", vars(function), name), value, seen)
    for name in _names(function.__code__):
        value = function.__globals__.get(name, MISSING)
        yield from _found(_item(f"the global {name!r}", function.__globals__, name), value, seen)


def _default(function: types.FunctionType, index: int, name: str) -> _Place:
    def get() -> Any:
        return (function.__defaults__ or ())[index]

    def put(value: Any) -> None:
        given = function.__defaults__ or ()
        function.__defaults__ = (*given[:index], value, *given[index + 1 :])

    return _Place(name, get, put)


def _found(place: _Place, value: Any, seen: set[int]) -> Iterator[_Place]:
    if isinstance(value, type):
        yield from _of_class(value, seen)
    elif _is_data(value):
        yield place
    yield from _of_value(value, seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
