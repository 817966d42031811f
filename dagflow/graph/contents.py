"""What can change inside of a plain Python value: read, compared, and put back.

Models, losses and what their code reaches from outside keep state in lists, dictionaries, objects and
generators; whoever traces them compares these before and after (`effects.py`, `outside.py`).
"""

from __future__ import annotations

import pickle
import random
import types
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import nn


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
    if isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType)):
        return None
    if type(value).__module__.split(".")[0] in ("torch", "numpy", "builtins"):
        return None
    own = getattr(value, "__dict__", None)
    return dict(own) if isinstance(own, dict) else None


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
    elif hasattr(value, "__dict__") and not isinstance(value, tuple):
        vars(value).clear()
        vars(value).update(before)
