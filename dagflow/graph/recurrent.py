"""Captures recurrent layers whole: convolutions, state spaces, linear attention.

transformers writes them as functions over whole sequences, with loops over tokens or chunks that a
trace would unroll. While a decoder is traced, those functions are ours: made of the operators of
`dagflow_tasks.kernels.recurrence`, which know whose tokens they get, and of operators that look at each token
by itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.recurrent_functions import FUNCTIONS
from dagflow.graph.recurrent_methods import METHODS
from dagflow.graph.recurrent_operators import States

# What a mixer may say about how to compute, not what; and where a state would be, were there a cache.
# fmt: off
_WITHOUT_EFFECT = frozenset([
    "chunk_size", "use_mambapy", "use_associative_scan", "output_final_state", "return_final_states",
    "return_last_state", "return_state", "use_cache", "acc_dtype",
])
# fmt: on
# Tells packed sequences apart: transformers' functions refuse it as well.
_PACKED = frozenset({"cu_seqlens", "seq_idx"})


@contextmanager
def recurrent_layers(model: torch.nn.Module) -> Iterator[None]:
    """Have a model's recurrent layers captured whole while it is traced."""
    states = States()
    functions = {name: partial(ours, states) for name, ours in FUNCTIONS.items()}
    methods = {name: partial(ours, states) for name, ours in METHODS.items()}
    with ExitStack() as stack:
        for owner, name, ours in [
            *replaced_functions(model, functions),
            *replaced_methods(model, methods),
        ]:
            stack.enter_context(patch.object(owner, name, ours))
        stack.enter_context(as_they_are(model))
        for module in _of_rwkv(model):
            if hasattr(module, "time_shift"):  # hands each token what the one before had
                stack.enter_context(patch.object(module.time_shift, "forward", states.previous))
        handle = model.register_forward_pre_hook(states.begin)
        stack.callback(handle.remove)
        yield


def replaced_functions(
    model: torch.nn.Module, functions: Mapping[str, Callable[..., Any]]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield functions of transformers that a model may call: their module, their name, and ours."""
    for code in {kind.__module__ for kind in kinds_of(model)}:
        for name, ours in functions.items():
            theirs = getattr(sys.modules[code], name, None)
            if theirs is not None:
                yield sys.modules[code], name, _checked(theirs, ours)


def replaced_methods(
    model: torch.nn.Module, methods: Mapping[tuple[str, str], Callable[..., Any]]
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield methods of transformers that a model may call: their class, their name, and ours."""
    for kind in kinds_of(model):
        for (of, name), ours in methods.items():
            if kind.__name__ == of:
                yield kind, name, _checked(getattr(kind, name), ours)


def kinds_of(model: torch.nn.Module) -> set[type]:
    """Return the classes of transformers' models that a model is made of."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return {kind for kind in kinds if kind.__module__.startswith("transformers.models.")}


@contextmanager
def as_they_are(model: torch.nn.Module) -> Iterator[None]:
    """Have a model leave its weights as they are when it runs.

    RWKV divides some of them in place when it first runs in evaluation mode, and its hidden states on the
    way, for the range of float16: both or neither.
    """
    with ExitStack() as stack:
        for module in _of_rwkv(model):
            if hasattr(module, "_rescale_layers"):
                stack.enter_context(patch.object(module, "_rescale_layers", lambda: None))
        yield


def _of_rwkv(model: torch.nn.Module) -> list[Any]:
    rwkv = "transformers.models.rwkv.modeling_rwkv"
    return [module for module in model.modules() if type(module).__module__ == rwkv]


def _checked(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return our function, which refuses what would change the result and isn't taken into account."""
    formals, known = inspect.signature(theirs).parameters, inspect.signature(ours).parameters

    def function(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(formals, args, strict=False)) | kwargs
        if "self" in given:
            given["module"] = given.pop("self")
        for name, value in given.items():
            matters = (name in formals and name not in _WITHOUT_EFFECT) or name in _PACKED
            if name not in known and matters and value is not None:
                raise CaptureFailed(
                    f"The model calls {theirs.__qualname__} with {name}={value!r:.40}, which dagflow "
                    "doesn't know of when a model generates. Leave it out."
                )
        return ours(**{name: value for name, value in given.items() if name in known})

    return function
