"""Tells whether what one call of forward leaves behind matters to a later one.

Whatever the first call has left, in an attribute, a container, a closure or a global, is replaced by
stand-ins while the model is traced again. They can be computed with, stored and printed; what comes
of it is a stand-in again. Comparisons with them come out one way in one trace and the other way in
another. Whoever needs their value, to index or to loop with it say, is told of by its line of code.
If no line does, and all traces give one graph, then nothing that is computed depends on them.
"""

from __future__ import annotations

import copy
import logging
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.contents import DEEPEST, contents_of, refill, same_value

MISSING = object()
"""Stands for the value of a name that isn't there."""

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent)
# Who may look at a stand-in without computing anything with it.
_HONEST = (_TORCH_FOLDER, _OWN_FOLDER, copy.__file__, str(Path(logging.__file__).parent))
_SCALARS = (bool, int, float, complex, str, bytes)
_NUMBERS = (*_SCALARS, torch.SymInt, torch.SymFloat, np.number)
# A loop that goes on for as long as a comparison says so would never end.
_MOST_COMPARISONS = 1000


class LeftBehind(CaptureFailed):
    """Forward makes use of what an earlier call left; how `examine` tells it from other failures."""


@dataclass(frozen=True)
class Left:
    """What a call has left at one place.

    Attributes
    ----------
    name : str
        Of the attribute, closure or global, for messages.
    put : callable
        Puts another value there.
    value
        What is there now; of a container that was there before, a copy.
    container
        That container, which whoever else knows it should find changed.
    refusal : str
        What to say if it changes in every call, where nothing can stand in for it (a generator, an
        array, a module's parameters); "" if something can.
    """

    name: str
    put: Callable[[Any], None]
    value: Any
    container: Any = None
    refusal: str = ""

    @property
    def holds_tensors(self) -> bool:
        """Whether there are tensors or open sizes in it, which belong to one trace."""
        return _holds_tensors(self.value)

    def put_again(self) -> None:
        """Make the change again."""
        if self.container is not None:
            refill(self.container, contents_of(self.value))
        elif not self.refusal:
            self.put(self.value)


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    contents = contents_of(value) if depth <= DEEPEST else None
    items = contents.values() if isinstance(contents, dict) else contents or ()
    return any(_holds_tensors(item, depth + 1) for item in items)


def left_at(
    name: str,
    put: Callable[[Any], None],
    before: Any,
    now: Any,
    contents: Mapping[int, tuple[Any, Any]],
) -> Iterator[Left]:
    """Find what is different at a place, as deep inside as it can be told apart.

    Parameters
    ----------
    name, put
        Of the place.
    before, now
        What it held, and holds.
    contents
        What containers and plain objects held before, by `id`, as (container, `contents_of` it).
    """
    yield from _left_at(name, put, before, now, contents, set())


def _left_at(
    name: str,
    put: Callable[[Any], None] | None,
    before: Any,
    now: Any,
    contents: Mapping[int, tuple[Any, Any]],
    seen: set[int],
) -> Iterator[Left]:
    if now is not before:
        if not same_value(now, before):
            yield _left(name, put, now)
        return
    if id(now) not in contents:
        return
    then, found = contents[id(now)][1], contents_of(now)
    if isinstance(now, _GENERATORS):
        if found != then:
            yield _left(name, None, now)
        return
    is_object = isinstance(found, dict) and not isinstance(now, dict)
    if not is_object and _keys(now, found) != _keys(now, then):
        yield _left(name, put, now)
        return
    if id(now) in seen or isinstance(now, set):
        return
    seen.add(id(now))
    for key in list(found) if isinstance(found, dict) else range(len(found)):
        was = then.get(key, MISSING) if isinstance(then, dict) else then[key]
        yield from _left_at(name, _setter(now, key, is_object), was, found[key], contents, seen)


_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, np.ndarray)


def _keys(container: Any, contents: Any) -> Any:
    """Return what a container's items are known by."""
    if isinstance(container, (dict, set)):
        return set(contents)
    return len(contents)


def _left(name: str, put: Callable[[Any], None] | None, now: Any) -> Left:
    is_container = isinstance(now, (dict, list, set, deque))
    value, container = (copy.copy(now), now) if is_container else (now, None)
    if put is None:
        return Left(name, _nowhere, value, container, carried_over(name))
    return Left(name, put, value, container)


def _nowhere(value: Any) -> None:
    """Leave a place as it is."""


def _setter(holder: Any, key: Any, is_object: bool) -> Callable[[Any], None] | None:
    if isinstance(holder, tuple):
        return None
    if is_object:
        return lambda value: object.__setattr__(holder, key, value)
    return lambda value: operator.setitem(holder, key, value)


@dataclass
class StandIns:
    """Makes stand-ins for what a call has left, and knows what became of them.

    Attributes
    ----------
    answer : bool
        How comparisons come out.
    read : dict
        The first line that compares each place's stand-in, or computes a tensor with it, by the
        place's name.
    num_compared : int
    scratch : set
        Containers, by their places' names, that are emptied, filled and read in one call.
    """

    answer: bool
    read: dict[str, str] = field(default_factory=dict)
    num_compared: int = 0
    scratch: set[str] = field(default_factory=set)
    _made: dict[int, Any] = field(default_factory=dict)

    def put(self, left: Iterable[Left]) -> None:
        """Put stand-ins into their places."""
        for item in left:
            if not item.refusal:
                item.put(self._for(item.value, item.name))

    def _for(self, value: Any, name: str) -> Any:
        """Return a stand-in for a value; the same one for the same container."""
        if value is None or value is MISSING:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._new(value, name)
        return self._made[id(value)]

    def _new(self, value: Any, name: str) -> Any:
        if type(value) is tuple:
            return tuple(self._for(item, name) for item in value)
        kind = next((k for k in _WATCHED if type(value) is k), None)
        if kind is None:
            return Leftover(value, name, self)
        if isinstance(value, dict):
            made = _WATCHED[kind]()
            for key, item in value.items():
                kind.__setitem__(made, key, self._for(item, name))
            if isinstance(value, defaultdict):
                made.default_factory = value.default_factory
        elif isinstance(value, set):
            made = _WATCHED[kind](value)
        else:
            size = (value.maxlen,) if isinstance(value, deque) else ()
            made = _WATCHED[kind]((self._for(item, name) for item in value), *size)
        made._dagflow = (name, self)
        return made

    def use(self, name: str, line: str | None = None) -> None:
        """Refuse that somebody needs what an earlier call left.

        Raises
        ------
        LeftBehind
        """
        line = line or _calling_line()
        if line:
            line = self.read.get(name, line)  # what was computed with it there came here
            raise LeftBehind(carried_over(name, line))

    def compare(self, name: str, honest: Callable[[], Any]) -> Any:
        """Answer a comparison."""
        line = _calling_line()
        if not line:
            return honest()
        self.read.setdefault(name, line)
        self.num_compared += 1
        if self.num_compared > _MOST_COMPARISONS:
            self.use(name)
        return self.answer


REMEDY = (
    "A graph holds tensor operators only, and would compute the same in every step. What to do: "
    "keep it in a buffer (register_buffer) and change it with tensor operators (a loss that keeps "
    "state: as a submodule of the model, whose forward returns the loss). If it is a table or flag "
    "that the first call makes, call the model once on a batch before."
)


def carried_over(name: str, line: str = "") -> str:
    """Say that forward reads what an earlier call left, where, and what to do about it."""
    reads = (
        f" and reads at {line} what an earlier call left there"
        if line
        else (", and what a later call computes may depend on it")
    )
    return f"Forward or the loss changes {name}{reads}. {REMEDY}"


def _calling_line() -> str:
    """Return file and line of the code that calls a stand-in; "" if it is torch's or dagflow's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    is_honest = frame.f_code.co_filename.startswith(_HONEST)
    return "" if is_honest else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _outer_line() -> str:
    """Return file and line of the innermost code that is neither torch's nor dagflow's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_HONEST, "<")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Leftover:
    """Stands for a number, string, tensor or object that an earlier call left."""

    __slots__ = ("_name", "_of", "_value")
    stands_in = True

    def __init__(self, value: Any, name: str, of: StandIns) -> None:
        self._value, self._name, self._of = value, name, of

    def _with(self, value: Any) -> Leftover:
        return Leftover(value, self._name, self._of)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Not so for tensors: torch's C++ takes whatever says it is one for one.
        return type(self._value) if isinstance(self._value, _SCALARS) else Leftover

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        mine: Leftover = next(_leftovers([*args, *keywords.values()]))
        name = getattr(func, "__name__", "")
        line = _outer_line()
        mine._of.read.setdefault(mine._name, line)
        is_own = bool(args) and type(args[0]) is Leftover
        if (_writes(name) and not is_own) or "out" in keywords:
            mine._of.use(mine._name, line)
        return mine if _writes(name) else mine._with(_A_TENSOR)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_tensor = self._value is _A_TENSOR or isinstance(self._value, torch.Tensor)
        if is_tensor and callable(getattr(torch.Tensor, name, None)):
            return lambda *_, **__: self if _writes(name) else self._with(_A_TENSOR)
        self._of.use(self._name)
        return getattr(self._value, name)

    def __copy__(self) -> Leftover:
        return self

    def __deepcopy__(self, memo: Any) -> Leftover:
        return self

    def __repr__(self) -> str:
        return repr(self._value)

    def __str__(self) -> str:
        return str(self._value)

    def __format__(self, spec: str) -> str:
        return format(self._value, spec) if isinstance(self._value, _SCALARS) else "..."

    def __bool__(self) -> bool:
        return bool(self._of.compare(self._name, lambda: bool(self._value)))


_A_TENSOR = object()
"""The value of a stand-in for a tensor that was computed with another stand-in."""


def _writes(name: str) -> bool:
    is_operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    in_place = name.endswith("_") and not name.endswith("__")
    return is_operator or in_place or name in ("__setitem__", "__set__")


def _leftovers(values: Iterable[Any]) -> Iterator[Leftover]:
    for value in values:
        if type(value) is Leftover:
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _leftovers(list.__iter__(value) if isinstance(value, list) else value)


def _plain(value: Any) -> Any:
    return value._value if type(value) is Leftover else value


def _computes(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def compute(self: Leftover, *others: Any) -> Any:
        given = [self._value, *map(_plain, others)]
        if not all(isinstance(value, _NUMBERS) for value in given):
            if any(isinstance(other, torch.Tensor) for other in others):
                self._of.read.setdefault(self._name, _outer_line())
            return self._with(_A_TENSOR)
        try:
            return self._with(function(*(given[::-1] if reflected else given)))
        except (TypeError, ValueError, ArithmeticError):  # not so with the next call's numbers
            return self._with(_A_TENSOR)

    return compute


def _compares(function: Callable[..., Any]) -> Callable[..., Any]:
    def compare(self: Leftover, other: Any) -> Any:
        if isinstance(other, torch.Tensor) or not isinstance(self._value, _SCALARS):
            return self._with(_A_TENSOR)
        return self._of.compare(self._name, lambda: function(self._value, _plain(other)))

    return compare


def _uses(name: str) -> Callable[..., Any]:
    def use(self: Leftover, *args: Any) -> Any:
        self._of.use(self._name)
        return getattr(self._value, name)(*args)

    return use


def _equip() -> None:
    """Give stand-ins the operators of numbers, and what else Python looks up in their class."""
    for name in "neg pos abs invert".split():  # noqa: SIM905
        setattr(Leftover, f"__{name}__", _computes(getattr(operator, name)))
    for name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor".split():  # noqa: SIM905
        function, slot = getattr(operator, name), name.rstrip("_")
        setattr(Leftover, f"__{slot}__", _computes(function))
        setattr(Leftover, f"__r{slot}__", _computes(function, reflected=True))
    setattr(Leftover, "__round__", _computes(round))  # noqa: B010
    for name in "eq ne lt le gt ge".split():  # noqa: SIM905
        setattr(Leftover, f"__{name}__", _compares(getattr(operator, name)))
    for name in "hash int float index complex iter len getitem setitem contains call".split():  # noqa: SIM905
        setattr(Leftover, f"__{name}__", _uses(f"__{name}__"))


_equip()


def _watched(kind: Any, reading: str, joining: str, finding: str = "") -> Any:
    """Return a class of containers in which whatever depends on how much they hold is a use.

    Parameters
    ----------
    reading, joining, finding
        Names of methods: such uses, those that make another such container, and those that look for
        a key.
    """

    def noting(name: str) -> Callable[..., Any]:
        plain = getattr(kind, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            name, of = self._dagflow
            if self._is_of_this_call:
                of.scratch.add(name)
            else:
                of.use(name)
            return plain(self, *args, **kwargs)

        return method

    def keeping(name: str) -> Callable[..., Any]:
        plain = getattr(kind, name)

        def method(self: Any, *args: Any) -> Any:
            found = plain(self, *args)
            if type(found) is kind:
                found = type(self)(found)
                found._dagflow = self._dagflow
            return found

        return method

    def clear(self: Any) -> None:
        kind.clear(self)
        self._is_of_this_call = True

    def is_filled(self: Any) -> bool:
        name, of = self._dagflow
        num_items = kind.__len__(self)
        return bool(num_items if self._is_of_this_call else of.compare(name, lambda: num_items > 0))

    def looking_up(name: str) -> Callable[..., Any]:
        plain = getattr(kind, name)

        def method(self: Any, key: Any, *args: Any) -> Any:
            label, of = self._dagflow
            if not self._is_of_this_call and not kind.__contains__(self, key):
                of.use(label)  # a key that only later calls find there
            return plain(self, key, *args)

        return method

    def put(self: Any, key: Any, item: Any) -> None:
        # Kept under a number, say that of the step: which one is nobody's business.
        kind.__setitem__(self, object() if type(key) is Leftover else key, item)

    methods: dict[str, Any] = {"__setitem__": put} if issubclass(kind, dict) else {}
    methods |= {"clear": clear, "_is_of_this_call": False, "__bool__": is_filled}
    methods |= {name: noting(name) for name in reading.split()}
    methods |= {name: looking_up(name) for name in finding.split()}
    methods |= {name: keeping(name) for name in joining.split()}
    return type(f"Watched{kind.__name__}", (kind,), methods)


_SEQUENCE = "__len__ __iter__ __reversed__ __contains__ __eq__ index count remove"
_MAPPING = "__len__ __iter__ __eq__ keys values items popitem"
_FINDING = "__contains__ get setdefault"
_WATCHED: Mapping[type, Any] = {
    list: _watched(list, _SEQUENCE + " sort", "__add__ __getitem__ copy"),
    deque: _watched(deque, _SEQUENCE, "__add__ copy"),
    set: _watched(set, "__len__ __iter__ __eq__ pop", "__or__ __sub__ copy", "__contains__"),
    dict: _watched(dict, _MAPPING, "copy", _FINDING),
    OrderedDict: _watched(OrderedDict, _MAPPING, "copy", _FINDING),
    defaultdict: _watched(defaultdict, _MAPPING, "copy", _FINDING),
    Counter: _watched(Counter, _MAPPING + " most_common elements", "copy", "__contains__ get"),
}
