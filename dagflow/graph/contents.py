"""What can change inside of a plain Python value: read, compared, and put back.

Models, losses and what their code reaches from outside keep state in lists, dictionaries, objects and
generators; whoever traces them compares these before and after (`effects.py`, `outside.py`).
"""

from __future__ import annotations

import contextlib
import pickle
import random
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

# Whoever walks through contents goes so far in, or what one keeps another wouldn't compare.
DEEPEST = 4


def contents_of(value: Any) -> Any:
    """Return what can change inside of a value without its identity, or None."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    if isinstance(value, random.Random):
        return {"state": pickle.dumps(value.getstate())}
    if isinstance(value, np.random.RandomState):
        return {"state": pickle.dumps(value.get_state(legacy=False))}
    if isinstance(value, np.random.Generator):
        return {"state": pickle.dumps(value.bit_generator.state)}
    if isinstance(value, np.ndarray):
        is_small = value.nbytes <= _LARGEST_ARRAY_BYTES and not value.dtype.hasobject
        return {"state": value.tobytes()} if is_small else None
    if isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType)):
        return None
    kind = type(value)  # isinstance asks a stand-in (`leftovers.py`) for what it stands for
    if kind.__module__.split(".")[0] in ("torch", "numpy", "builtins") or hasattr(
        kind, "stands_in"
    ):
        return None
    own, names = own_attributes(value), _slots(kind)
    if own is None and not names:
        return None
    return {**(own or {}), **_slotted(value, names)}


# Numbers that code keeps are few; an array this large is a data set, or a table.
_LARGEST_ARRAY_BYTES = 1 << 20


def _slots(kind: type) -> tuple[str, ...]:
    """Return the names of a class's __slots__, but for those of its objects' dictionary."""
    names = [
        name
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    ]
    return tuple(name for name in names if not name.startswith("__"))


def own_attributes(value: Any) -> dict[str, Any] | None:
    """Return an object's ``__dict__``, or None, whatever its class says to whoever reads attributes."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return own if isinstance(own, dict) else None


def _slotted(value: Any, names: Iterable[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(value, name)
    return found


def same_contents(found: Any, before: Any) -> bool:
    """Compare what `contents_of` returned, now and before."""
    if isinstance(found, dict):
        return found.keys() == before.keys() and all(
            found[name] is before[name] or same_value(found[name], before[name]) for name in before
        )
    return len(found) == len(before) and all(
        a is b or same_value(a, b) for a, b in zip(found, before, strict=True)
    )


def same_value(found: Any, before: Any) -> bool:
    """Compare numbers, strings and containers by value; all else is equal to itself only."""
    if type(found) is not type(before):
        return False
    if isinstance(found, (dict, list, tuple, set, deque)):  # torch.export puts copies into place
        return same_contents(contents_of(found), contents_of(before))
    return isinstance(found, (bool, int, float, str, bytes)) and bool(found == before)


def refill(value: Any, before: Any) -> None:
    """Give a value, in place, the contents that `contents_of` returned."""
    if isinstance(value, (dict, set)):
        value.clear()
        value.update(before)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(before)
    elif isinstance(value, random.Random):
        value.setstate(pickle.loads(before["state"]))
    elif isinstance(value, np.random.RandomState):
        value.set_state(pickle.loads(before["state"]))
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = pickle.loads(before["state"])
    elif isinstance(value, np.ndarray):
        value[...] = np.frombuffer(before["state"], value.dtype).reshape(value.shape)
    elif not isinstance(value, tuple):
        _refill_object(value, before)


def _refill_object(value: Any, before: dict[str, Any]) -> None:
    slots = set(_slots(type(value)))
    for name in slots:
        if name in before:
            object.__setattr__(value, name, before[name])
        elif _slotted(value, [name]):
            object.__delattr__(value, name)
    own = own_attributes(value)
    if own is not None:
        own.clear()
        own.update({n: item for n, item in before.items() if n not in slots})
