"""What forward may leave behind outside of attributes: in closures, defaults, classes and globals.

And iterators, whose position can't be put back.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dagflow.errors import CaptureFailed
from dagflow.graph.contents import contents_of, refill, same_contents
from dagflow.graph.effects import holders

_DEEPEST = 4
# Libraries' functions keep caches and flags of their own.
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
_MISSING = object()
_SCALARS = (bool, int, float, complex, str, bytes, types.NoneType)
_REMEDY = (
    "A graph holds tensor operators only, and would compute the same in every step. What to do: "
    "keep it in a buffer (register_buffer) and change it with tensor operators. If it is a table "
    "or flag that the first call makes, call the model once on a batch before."
)


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

    def changed(self) -> list[str]:
        """Return the names of what isn't as it was."""
        return [
            place.name
            for place, _, before in self._kept
            if self._frozen(place.get(), 0, keep=False) != before
        ]

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
        contents = contents_of(value) if depth <= _DEEPEST and not _is_librarys(value) else None
        if contents is None:
            return id(value)
        if keep:
            self._contents.setdefault(id(value), (value, contents))
        if isinstance(contents, dict):
            keys = [key if isinstance(key, _SCALARS) else id(key) for key in contents]
            items = [self._frozen(item, depth + 1, keep) for item in contents.values()]
            return (id(value), tuple(keys), tuple(items))
        return (id(value), tuple(self._frozen(item, depth + 1, keep) for item in contents))


def refuse_outside(names: list[str]) -> None:
    """Refuse what forward changes in one call and may read in a later one.

    Raises
    ------
    CaptureFailed
    """
    if names:
        raise CaptureFailed(
            f"Forward or the loss changes {', '.join(dict.fromkeys(names))}, which later calls may "
            f"read. {_REMEDY}"
        )


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
            f"every call. {_REMEDY}"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


@contextmanager
def refuse_iterators(wrapper: nn.Module) -> Iterator[None]:
    """While a model is traced, refuse that it takes items of iterators that outlive the call."""
    found = [(place, place.get()) for place in _places(wrapper)]
    iterators = [(place, value) for place, value in found if _is_iterator(value)]
    for place, value in iterators:
        place.put(_Refusing(place.name, value))
    try:
        yield
    finally:
        for place, value in iterators:
            place.put(value)


def _is_iterator(value: Any) -> bool:
    kind = type(value)
    return hasattr(kind, "__next__") and hasattr(kind, "__iter__") and not hasattr(kind, "read")


def _is_librarys(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    package = type(value).__module__.split(".")[0]
    return package in sys.stdlib_module_names - {"builtins", "collections", "random"}


def _is_data(value: Any) -> bool:
    is_plain = isinstance(value, (*_SCALARS, torch.Tensor)) or _is_iterator(value)
    return is_plain or (contents_of(value) is not None and not _is_librarys(value))


def _places(wrapper: nn.Module) -> Iterator[_Place]:
    seen: set[int] = set()
    for path, holder in holders(wrapper).items():
        own = vars(holder)
        for name, value in list(own.items()):
            if _is_iterator(value):
                yield _item(f"{path or 'the model itself'}: self.{name}", own, name)
            yield from _of_value(value, seen)
        yield from _of_class(type(holder), seen)
    for loss in getattr(wrapper, "_loss", ()):
        yield from _of_value(loss, seen)


def _item(label: str, table: dict[str, Any], name: str) -> _Place:
    return _Place(label, lambda: table.get(name, _MISSING), lambda v: table.__setitem__(name, v))


def _of_value(value: Any, seen: set[int]) -> Iterator[_Place]:
    """Find what functions, classes, and containers of these hold."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, types.MethodType):
        yield from _of_value(value.__func__, seen)
    elif isinstance(value, functools.partial):
        yield from _of_value(value.func, seen)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _of_value(value.__func__, seen)
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "OrderedDict":
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (types.FunctionType, types.MethodType, functools.partial)):
                yield from _of_value(item, seen)


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
                    functools.partial(getattr, base, name, _MISSING),
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
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not _is_iterator(value):
            yield from _found(
                _Place(f"a default {of}", functools.partial(_same_value, value), lambda _: None),
                value,
                seen,
            )
    for name, value in list(vars(function).items()):
        yield from _found(_item(f"the attribute {name!r} {of}", vars(function), name), value, seen)
    for name in _names(function.__code__):
        value = function.__globals__.get(name, _MISSING)
        yield from _found(_item(f"the global {name!r}", function.__globals__, name), value, seen)


def _same_value(value: Any) -> Any:
    return value


def _found(place: _Place, value: Any, seen: set[int]) -> Iterator[_Place]:
    if isinstance(value, type):
        yield from _of_class(value, seen)
    elif _is_data(value):
        yield place
    yield from _of_value(value, seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
