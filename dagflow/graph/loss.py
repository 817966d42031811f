"""The model and its loss as one module: what is captured."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.batch import call_model, split_target

LossFunction = Callable[[Any, Any], torch.Tensor]


class LossModule(torch.nn.Module):
    """The model and its loss as one module over the batch's tensors.

    Parameters
    ----------
    loss : callable, optional
        ``loss(output, target)``: a function, a module, a bound method. What tensors it holds are
        constants of the graph. It returns, as the model does without it, a scalar, a mapping or an
        object with ``loss``, or a tuple that begins with it.
    rebuild : callable
        Makes a batch of its tensors.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: LossFunction | None,
        rebuild: Callable[[Sequence[torch.Tensor]], Any],
    ) -> None:
        super().__init__()
        self.model = model
        # In a tuple, for a module would otherwise become a child, and its tensors state.
        self._loss = (loss,)
        self.beside = tuple(_objects(loss, set()))
        self._rebuild = rebuild
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        batch = self._rebuild(tensors)
        (loss,) = self._loss
        if loss is not None:
            batch, target = split_target(batch)
            found = loss(call_model(self.model, batch), target)
            value = _loss_of(found)
            return _scalar(found if value is None else value, "loss(output, target)")
        output = call_model(self.model, batch)
        value = _loss_of(output)
        if value is None:
            raise BatchInvalid(
                f"The model returned a {type(output).__name__} without a loss{_contents(output)}. "
                "Are labels missing from the batch? Add them, or pass loss=function(output, target)"
                f"{_loss_advice(output)}."
            )
        return _scalar(value, "the model")


def _loss_of(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        first = output[0] if output else None
        return first if isinstance(first, torch.Tensor) and first.dim() == 0 else None
    return getattr(output, "loss", None)


def _contents(output: Any) -> str:
    """Say what a result holds in which no loss was found."""
    if isinstance(output, Mapping):
        return f"; its keys are {', '.join(map(repr, output)) or 'none'}"
    if isinstance(output, (tuple, list)):
        items = [
            (f"a tensor of {item.dim()} dimensions" if item.dim() else "a scalar tensor")
            if isinstance(item, torch.Tensor)
            else f"a {type(item).__name__}"
            for item in output
        ]
        return f" in front; its items are {', '.join(items) or 'none'}"
    return ""


def _loss_advice(output: Any) -> str:
    """Say which part of a result may be the loss, and how to have it taken."""
    if isinstance(output, Mapping):
        named = [key for key in output if "loss" in str(key).lower()]
        parts = " + ".join(f"output[{key!r}]" for key in named)
        if named:
            return (
                f": have forward return it as 'loss', or loss=lambda output, target: {parts}, "
                "with the target in the batch by its name"
            )
    if isinstance(output, (tuple, list)):
        scalars = [i for i, x in enumerate(output) if isinstance(x, torch.Tensor) and x.dim() == 0]
        if scalars:
            return (
                ": have forward return the loss first, or "
                f"loss=lambda output, target: output[{scalars[0]}]"
            )
    return ""


def _scalar(value: Any, origin: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        found = (
            f"shape {list(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        raise BatchInvalid(
            f"A loss is a scalar tensor; {origin} returned {found}. Reduce it, with .mean() say, "
            "or pass loss=function(output, target)."
        )
    return value


def check_loss(loss: LossFunction | None, model: torch.nn.Module) -> None:
    """Refuse a loss with parameters of its own to train: stages train the model's.

    Raises
    ------
    CaptureFailed
    """
    of_model = {id(parameter) for parameter in model.parameters()}
    for name, tensor in _tensors(loss, set()):
        if tensor.requires_grad and id(tensor) not in of_model:
            raise CaptureFailed(
                f"The loss {getattr(loss, '__name__', type(loss).__name__)} holds {name}, which is "
                "to be trained, and only the model's parameters are. What to do: make the loss a "
                "submodule of the model and have forward return the loss, or freeze it with "
                "requires_grad_(False)."
            )


def _tensors(value: Any, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Find the tensors that a function uses: a module's, a closure's, globals, a partial's."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield f"a tensor of shape {list(value.shape)}", value
    elif isinstance(value, torch.nn.Module):
        for name, parameter in value.named_parameters():
            yield f"the parameter {name!r} of {type(value).__name__}", parameter
    else:
        for part in _parts(value):
            yield from _tensors(part, seen)


def _objects(value: Any, seen: set[int]) -> Iterator[Any]:
    """Find the modules and plain objects that a loss consists of: whatever may keep something."""
    if id(value) in seen:
        return
    seen.add(id(value))
    is_plain = isinstance(getattr(value, "__dict__", None), dict)
    if is_plain and not isinstance(value, _KEEP_NOTHING):
        yield value
    for part in _parts(value):
        yield from _objects(part, seen)


# As far as a loss's own state goes; functions' own is looked for by what they use.
_KEEP_NOTHING = (
    type,
    torch.Tensor,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        tensors = [part for part in named if isinstance(part, (torch.Tensor, torch.nn.Module))]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *tensors, *defaults]
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else []


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
