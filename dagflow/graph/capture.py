"""From a torch module to its operator DAG, through `torch.export` at the training IR.

The training IR keeps `linear`, `layer_norm`, `scaled_dot_product_attention` and `dropout` whole, so
that the DAG runs the same kernels as the model did, to the same bits.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.overrides import TorchFunctionMode

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.batch import call_model, flatten_batch, rebuilder, split_target
from dagflow.graph.dag import OperatorDag, input_value
from dagflow.graph.translate import translate
from dagflow_tasks.program import ValueSpec

LossFunction = Callable[[Any, Any], torch.Tensor]

_TORCH_FOLDER = str(Path(torch.__file__).parent)


def capture(
    model: torch.nn.Module,
    example_batch: Any,
    *,
    loss: LossFunction | None = None,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> OperatorDag:
    """Return the model's operator DAG, loss included, with the batch and sequence sizes left open.

    The model is captured in its current mode (`train()` or `eval()`) and isn't changed. Parameters
    may be on the meta device.

    Parameters
    ----------
    model : torch.nn.Module
    example_batch
        A mapping (passed by keyword), a tuple (by position) or a tensor. Sizes of 1 are taken as
        fixed; show a batch of at least two rows to leave the batch size open.
    loss : callable, optional
        ``loss(output, target)``. Without it the model returns a scalar or something with ``.loss``.
    dynamic : mapping, optional
        Dimensions to leave open by tensor name. By default the first of every tensor, and the
        second of integer matrices (B, T) and of float (B, T, D) sequences.

    Raises
    ------
    CaptureFailed
        If the model's control flow depends on its data, or uses operators that no worker would
        run; names module, source line and operator.
    BatchInvalid
        If the batch isn't made of tensors, or holds no target though `loss` needs one.

    Warns
    -----
    UserWarning
        If the model calls a `torch.autograd.Function`: its forward is captured, its backward isn't.
    """
    tensors, constants = flatten_batch(example_batch)
    wrapper = _LossModule(model, loss, rebuilder(example_batch))
    dims = {name: _dynamic_dims(name, tensor, dynamic) for name, tensor in tensors.items()}
    exported, position = export_module(wrapper, model, tensors, dims)
    for function, module in position.functions.items():
        warnings.warn(
            f"Module {module or 'the model itself'!r} calls {function.__qualname__}, a "
            "torch.autograd.Function with a backward of its own. A graph holds operators only: "
            "dagflow will use the derivative of its forward instead. If they differ by more than "
            "rounding (straight-through estimators, clipped gradients), write it with detach().",
            stacklevel=2,
        )
    inputs = [
        ValueSpec(input_value(name), str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    ]
    return translate(exported, model, inputs, constants)


def export_module(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
) -> tuple[torch.export.ExportedProgram, _Position]:
    """Export a module around a model (its child ``model``) over tensors with open sizes.

    Raises
    ------
    BatchInvalid, CaptureFailed
    """
    with _on_one_device(model, tensors) as leaves, _watch(wrapper) as position:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(
                    wrapper,
                    tuple(leaves.values()),
                    dynamic_shapes=(tuple(dict.fromkeys(dims[name], Dim.AUTO) for name in leaves),),
                    strict=False,
                )
        except (BatchInvalid, CaptureFailed):
            raise
        except Exception as error:
            raise CaptureFailed(_explain(error, position)) from error
    return exported, position


class _LossModule(torch.nn.Module):
    """The model and its loss as one module over the batch's tensors."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: LossFunction | None,
        rebuild: Callable[[Sequence[torch.Tensor]], Any],
    ) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._rebuild = rebuild
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        batch = self._rebuild(tensors)
        if self._loss is not None:
            batch, target = split_target(batch)
            return _scalar(
                self._loss(call_model(self.model, batch), target), "loss(output, target)"
            )
        output = call_model(self.model, batch)
        value = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
        if value is None:
            raise BatchInvalid(
                f"The model returned a {type(output).__name__} without a loss. Are labels missing "
                "from the batch? Add them, or pass loss=function(output, target)."
            )
        return _scalar(value, "the model")


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


def _dynamic_dims(
    name: str, tensor: torch.Tensor, dynamic: Mapping[str, Sequence[int]] | None
) -> tuple[int, ...]:
    if dynamic is not None and name in dynamic:
        wanted = list(dynamic[name])
    else:
        is_sequence = tensor.dim() == 3 or (tensor.dim() == 2 and not tensor.is_floating_point())
        wanted = [0, 1] if is_sequence else [0]
    return tuple(d for d in wanted if d < tensor.dim() and tensor.shape[d] > 1)


@contextmanager
def _on_one_device(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield copies of the batch's tensors where the model's parameters are.

    A model whose parameters are on the meta device often keeps real buffers (rotary tables); they
    are swapped for meta ones while it is traced. Copies, because two arguments that are one tensor
    in the example (labels=input_ids) would be traced as one.
    """
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CaptureFailed(
            f"The model's parameters are on several devices ({names}); move it to one, or build it "
            "on the meta device."
        )
    (device,) = devices
    swapped: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                swapped.append((module, name, buffer))
                module._buffers[name] = buffer.to(device)
    try:
        yield {name: tensor.detach().clone().to(device) for name, tensor in tensors.items()}
    finally:
        for module, name, buffer in swapped:
            module._buffers[name] = buffer


class _Position(TorchFunctionMode):
    """Remembers which module and torch function the trace is in."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[str] = []
        self.operator = ""
        self.functions: dict[type[torch.autograd.Function], str] = {}

    @property
    def module(self) -> str:
        """Path of the innermost module, in words where there is none."""
        if not self.modules:
            return "none, outside the model's forward"
        return self.modules[-1] or "the model itself"

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operator = getattr(func, "__name__", str(func))
        function = _enclosing_function()
        if function is not None:
            self.functions.setdefault(function, self.modules[-1] if self.modules else "")
        return func(*args, **(kwargs or {}))


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _enclosing_function() -> type[torch.autograd.Function] | None:
    """Return the user's `torch.autograd.Function` whose forward is being traced, if any.

    Found on the stack rather than by replacing `apply`: models often keep `apply` itself under
    another name, and other threads may call it meanwhile.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_code is _APPLY:
            found: type[torch.autograd.Function] = frame.f_locals["cls"]
            # torch's own keep to the derivative (activation checkpointing, custom operators).
            return None if found.__module__.startswith("torch.") else found
        frame = frame.f_back
    return None


@contextmanager
def _watch(wrapper: Any) -> Iterator[_Position]:
    """Follow the trace through the modules, so that a failure can say where it was."""
    position = _Position()
    handles = []

    def leave(*_: Any) -> None:
        position.modules.pop()

    for path, module in wrapper.model.named_modules():

        def enter(*_: Any, path: str = path) -> None:
            position.modules.append(path)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    forward = wrapper.forward

    def watched(*tensors: torch.Tensor) -> Any:
        with position:
            return forward(*tensors)

    wrapper.forward = watched
    try:
        yield position
    finally:
        for handle in handles:
            handle.remove()


def _explain(error: Exception, position: _Position) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_TORCH_FOLDER) and frame.filename != __file__
    ]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown"
    reason = " ".join(str(error).split())[:400]
    return (
        f"The model can't be captured. Module: {position.module!r}. Source: {where}. "
        f"Operator: {position.operator or 'unknown'}. torch says: {type(error).__name__}: {reason} "
        f"What to do: {_advice(error)}"
    )


def _advice(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "data-dependent" in text or "DataDependent" in text or "Unbacked" in text:
        return (
            "the line decides by a tensor's value, which a graph can't; write it with torch.where "
            "or a mask, or take the decision outside of forward()."
        )
    if "torch._dynamo" in text or "Constraint" in text:
        return "the model fixes a size that varies; pass dynamic={'tensor': [dims that vary]}."
    return "make that line work under torch.export.export(model, ..., strict=False)."
