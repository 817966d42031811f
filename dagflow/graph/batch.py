"""Batches as flat mappings from name to tensor, whatever the user's data yields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dagflow.errors import BatchInvalid

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
"""Names under which a mapping may hold what the loss compares with."""


def flatten_batch(batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a batch into its tensors and its constants, both by dotted name.

    >>> flatten_batch({"ids": torch.zeros(2), "flags": {"cache": False}})
    ({'ids': tensor([0., 0.])}, {'flags.cache': False})

    Raises
    ------
    BatchInvalid
        For anything but tensors, NumPy arrays, numbers, strings and None in mappings and sequences.
    """
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    if isinstance(batch, torch.Tensor):
        return {"input": batch}, {}
    for name, leaf in _leaves(batch, ""):
        if isinstance(leaf, torch.Tensor):
            tensors[name] = leaf
        elif hasattr(leaf, "__array__") and hasattr(leaf, "dtype"):
            tensors[name] = torch.as_tensor(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            constants[name] = leaf
        else:
            raise BatchInvalid(
                f"The batch holds a {type(leaf).__name__} at {name!r}; wanted tensors, NumPy "
                "arrays, numbers, strings or None, in mappings, tuples and lists."
            )
    if not tensors:
        raise BatchInvalid(
            f"The batch holds no tensor: {batch!r:.200}. Wanted a tensor, a tuple of tensors, or a "
            "mapping from argument name to tensor."
        )
    return tensors, constants


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, (tuple, list)):
        items = list(enumerate(tree))
    else:
        return [(prefix, tree)]
    found = []
    for key, value in items:
        found.extend(_leaves(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def take_rows(tensors: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
    """Return some rows of every tensor; 0-d tensors as they are."""
    return {name: t[begin:end].contiguous() if t.dim() else t for name, t in tensors.items()}


def rebuilder(batch: Any) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Return a function that builds a batch like this one from its tensors in flattened order."""

    def rebuild(tensors: Sequence[torch.Tensor]) -> Any:
        return _rebuilt(batch, iter(tensors))

    return rebuild


def _rebuilt(tree: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rebuilt(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_rebuilt(value, tensors) for value in tree)
    is_tensor = isinstance(tree, torch.Tensor) or hasattr(tree, "__array__")
    return next(tensors) if is_tensor else tree


def split_target(batch: Any) -> tuple[Any, Any]:
    """Split a batch into the model's input and the loss function's target.

    A tuple's last item is the target; in a mapping it is the first of `TARGET_NAMES` that exists.

    Raises
    ------
    BatchInvalid
        If there is no target.
    """
    if isinstance(batch, Mapping):
        for name in TARGET_NAMES:
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
        raise BatchInvalid(
            f"Labels are missing: loss= needs a target, and the batch has only {sorted(batch)}. "
            f"Name the target one of {', '.join(TARGET_NAMES)}, or yield tuples (input, target)."
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), batch[-1]
    raise BatchInvalid(
        "Labels are missing: loss= needs a target, and the batch is a single tensor. Yield tuples "
        "(input, target) or a mapping with 'labels'."
    )


def unknown_columns(model: torch.nn.Module, batch: Any, has_loss: bool) -> tuple[str, ...]:
    """Return the entries of a mapping that the model's forward doesn't take.

    Parameters
    ----------
    has_loss : bool
        Whether the target goes to a loss function instead of the model.
    """
    if not isinstance(batch, Mapping):
        return ()
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken):
        return ()
    known = {parameter.name for parameter in taken}
    if has_loss:
        known |= set([name for name in TARGET_NAMES if name in batch][:1])
    return tuple(name for name in batch if name not in known)


def check_columns(model: torch.nn.Module, batch: Any, dropped: Sequence[str]) -> None:
    """Check that a mapping holds what the model's forward can't do without.

    Parameters
    ----------
    batch
        What the model is called with: without the target if that goes to a loss function, and
        without the dropped columns.
    dropped
        Entries of the batch that forward doesn't take.

    Raises
    ------
    BatchInvalid
    """
    if not isinstance(batch, Mapping):
        return
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind not in variable
        and parameter.default is parameter.empty
        and parameter.name not in batch
    ]
    if not missing:
        return
    name = type(model).__name__
    columns = [*batch, *dropped]
    text = (
        f"The forward of {name} needs {', '.join(map(repr, missing))}, and the batch has the "
        f"columns {', '.join(map(repr, columns)) or 'none'}. A mapping is passed by keyword: name "
        "its columns as the arguments of forward."
    )
    if len(missing) == 1 and not batch:
        text += f" If {missing[0]!r} is to be the whole mapping, yield {{{missing[0]!r}: batch}}."
    raise BatchInvalid(text)


def without_columns(batch: Any, names: Sequence[str]) -> Any:
    """Return a batch without some of a mapping's entries."""
    if not names or not isinstance(batch, Mapping):
        return batch
    return {name: value for name, value in batch.items() if name not in names}


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Call the model as its batch suggests: by keyword for a mapping, by position otherwise."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)
