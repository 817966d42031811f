"""From a torch module to its operator DAG, through `torch.export` at the training IR.

The training IR keeps `linear`, `layer_norm`, `scaled_dot_product_attention` and `dropout` whole, so
that the DAG runs the same kernels as the model did, to the same bits.
"""

from __future__ import annotations

import functools
import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import proxy_tensor

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.batch import (
    check_columns,
    flatten_batch,
    rebuilder,
    split_target,
    unknown_columns,
    without_columns,
)
from dagflow.graph.dag import FixedSize, OperatorDag, input_value
from dagflow.graph.effects import gradient_hooks, without_gradient_hooks
from dagflow.graph.examine import examined
from dagflow.graph.experts import experts_by_groups
from dagflow.graph.explain import decides_by_values, explain
from dagflow.graph.known_numbers import known_constants, whole_numbers
from dagflow.graph.known_values import grids
from dagflow.graph.loss import LossFunction, LossModule, check_loss
from dagflow.graph.masks import without_needless_masks
from dagflow.graph.outside import refuse_iterators
from dagflow.graph.sizes import what_fixed
from dagflow.graph.trace import Trace, follow
from dagflow.graph.translate import translate
from dagflow.graph.whole_sequences import whole_sequences
from dagflow_tasks.program.stage_program import ValueSpec

# torch.export changes the model and torch itself while it traces: one trace at a time in a process.
TRACING = threading.RLock()


@contextmanager
def tracing() -> Iterator[None]:
    """Let nobody else trace, and look for no garbage meanwhile.

    A trace makes objects by the million and keeps them: a sixth of its time would be spent on that.
    """
    with TRACING:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def capture(
    model: torch.nn.Module,
    example_batch: Any,
    *,
    loss: LossFunction | None = None,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> OperatorDag:
    """Return the model's operator DAG, loss included, with the batch and sequence sizes left open.

    The model is captured in its current mode (`train()` or `eval()`) and is left as it was: its
    attributes, buffers, hooks and flags, and the random states of torch, Python and NumPy. Parameters
    may be on the meta device. Any thread may call this; captures wait for one another.

    What the graph can't hold is refused by name or warned of. What it holds is what forward computes
    for this batch's dtypes and names, for all sizes for which `dagflow.graph.signature.match_batch`
    accepts a batch; a hand-written backward isn't in it.

    Parameters
    ----------
    model : torch.nn.Module
    example_batch
        A mapping (passed by keyword), a tuple (by position) or a tensor. Sizes of 1 are taken as
        fixed; show a batch of at least two rows to leave the batch size open.
    loss : callable, optional
        ``loss(output, target)``: a function, a module, a bound method; tensors it holds become
        constants. Without it the model returns a scalar, something with a ``loss``, or a tuple that
        begins with it.
    dynamic : mapping, optional
        Dimensions to leave open by tensor name. By default the first of every tensor, and the
        second of integer matrices (B, T) and of float (B, T, D) sequences.

    Raises
    ------
    CaptureFailed
        If the model's control flow depends on its data, it uses operators that no worker would
        run, or keeps state that is no buffer; names module, source line and what to do.
    BatchInvalid
        If the batch isn't made of tensors, or holds no target though `loss` needs one.

    Warns
    -----
    UserWarning
        If the model calls a `torch.autograd.Function` (its forward is captured, its backward isn't)
        or has hooks on gradients; if it sets attributes that stay as they are in training; if the
        batch has columns that forward doesn't take, which are dropped; if it asks for autocast on
        another device; if its code fixes a size that was to be open, with `len(x)` or
        `float(x.shape[0])` say; if it decides by the numbers in a grid of whole numbers, (N, 2) or
        (N, 3), which is then fixed.
    """
    check_loss(loss, model)
    dropped = unknown_columns(model, example_batch, loss is not None)
    batch = without_columns(example_batch, dropped)
    check_columns(model, batch if loss is None else split_target(batch)[0], dropped)
    if dropped:
        warnings.warn(
            f"The batch's columns {', '.join(map(repr, dropped))} are dropped: the forward of "
            f"{type(model).__name__} doesn't take them.",
            stacklevel=2,
        )
    tensors, constants = flatten_batch(batch)
    wrapper = LossModule(model, loss, rebuilder(batch))
    dims = {name: _dynamic_dims(name, tensor, dynamic) for name, tensor in tensors.items()}
    with tracing(), whole_sequences(model), without_needless_masks(), experts_by_groups():
        dag, trace = _captured(wrapper, model, tensors, constants, dims)
    read = {} if trace.known is None else trace.known.inputs
    dims |= dict.fromkeys(read, ())
    for text in _warnings(trace, model):
        warnings.warn(text, stacklevel=2)
    fixed = _fixed_sizes(dag, trace, dims)
    for size in fixed:
        # Operators fix lengths for good reasons (tables of positions), the number of rows for none
        # but a grid that is fixed: it says how many rows of patches there are.
        if not (read if size.dim == 0 else size.by_operator):
            warnings.warn(_fixed_warning(size), stacklevel=2)
    values = {name: tensor.tolist() for name, tensor in read.items()}
    return replace(dag, dropped_columns=dropped, fixed_sizes=fixed, fixed_values=values)


def _captured(
    wrapper: LossModule,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
    dims: Mapping[str, Sequence[int]],
) -> tuple[OperatorDag, Trace]:
    """Export and translate a model; where that fails, once more with the numbers in grids known."""
    inputs = [
        ValueSpec(input_value(name), str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    ]

    def translated(exported: ExportedProgram, trace: Trace) -> OperatorDag:
        return translate(exported, model, inputs, constants, decisions=trace.decisions)

    def knowing(known: Mapping[str, torch.Tensor]) -> tuple[OperatorDag, Trace]:
        exported, trace = export_module(wrapper, model, tensors, dims, known, translated)
        return translated(exported, trace), trace

    try:
        return knowing({})
    except CaptureFailed as error:
        failed, known = error, grids(tensors)
    if known:
        # If some number was read, what stops it now is what stands in the way beside grids.
        with suppress(_NothingRead):
            return knowing(known)
    raise failed


class _NothingRead(CaptureFailed):
    """The model's code has read no number that is known."""


def _fixed_sizes(
    dag: OperatorDag, trace: Trace, dims: Mapping[str, Sequence[int]]
) -> tuple[FixedSize, ...]:
    """Find the sizes that were to be open and are fixed, with the lines that did it."""
    found = []
    for spec, open_dims, traced in zip(dag.inputs, dims.values(), trace.shapes, strict=True):
        for dim in open_dims:
            if not isinstance(spec.shape[dim], int):
                continue
            symbol = traced[dim]
            by = None if isinstance(symbol, int) else what_fixed(symbol, trace.decisions)
            source, by_operator = ("", True) if by is None else (by.source, by.by_operator)
            found.append(FixedSize(spec.name, dim, source, by_operator))
    return tuple(found)


def _fixed_warning(fixed: FixedSize) -> str:
    return (
        f"The size of {fixed.input.removeprefix('in.')!r} in dimension {fixed.dim} is fixed to that "
        f"of the example batch: {fixed.reason} Batches of another size will be refused."
    )


def _warnings(trace: Trace, model: torch.nn.Module) -> Iterator[str]:
    for function, module in trace.functions.items():
        yield (
            f"Module {module or 'the model itself'!r} calls {function.__qualname__}, a "
            "torch.autograd.Function with a backward of its own. A graph holds operators only: "
            "dagflow will use the derivative of its forward instead. If they differ by more than "
            "rounding (straight-through estimators, clipped gradients), write it with detach()."
        )
    hooks = [f"module {module!r} ({line})" for module, line in trace.hooks]
    hooks += gradient_hooks(model)
    if hooks:
        yield (
            f"Hooks on gradients aren't run: {', '.join(dict.fromkeys(hooks))}. Workers make the "
            "gradients, and programs hold no Python code. If a hook changes gradients, the model "
            "will train differently: write the change into forward, with detach()."
        )
    for name in () if trace.known is None else trace.known.inputs:
        yield (
            f"Forward decides by the numbers in {name!r}, and a graph holds what it decided for the "
            "example batch: batches with other numbers there will be refused. If they are images' "
            "sizes, bring all images to one size (resize, or crop and pad) in the data loader."
        )
    if trace.clock:
        yield (
            f"Forward reads the clock at {', '.join(dict.fromkeys(trace.clock))}: what it computes "
            "from that is the same in every step."
        )
    for line, module in trace.apart.items():
        yield (
            f"Module {module or 'the model itself'!r} loops over those of its experts that have rows "
            f"({line}), and each has parameters of its own. Where no token of a whole batch goes to an "
            "expert, torch's optimizers pass it over; here its gradient is zero, so that momentum and "
            "weight decay move it. If that matters, keep the experts' weights in one tensor, as "
            "transformers does (num_experts, ...)."
        )
    for line, device in trace.autocasts.items():
        yield (
            f"{line} asks for autocast on {device!r}, where the model's parameters aren't: it does "
            "nothing, as in the model itself, and workers compute without it. Take the device from a "
            "tensor: torch.autocast(x.device.type, ...)."
        )
    if trace.drawn:
        yield (
            f"Forward draws from Python's or NumPy's random numbers at {trace.drawn}. Other numbers "
            "gave the same graph, so it is taken to make no use of them. If it does, draw with torch."
        )
    if trace.unused:
        yield (
            f"Forward sets {'; '.join(trace.unused)}. They stay as they are while dagflow trains: "
            "workers run operators, not the model's code."
        )


def export_module(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
    known: Mapping[str, torch.Tensor] | None = None,
    refuse: Callable[[ExportedProgram, Trace], object] = lambda exported, trace: None,
) -> tuple[ExportedProgram, Trace]:
    """Export a module around a model (its child ``model``) over tensors with open sizes.

    The model is left as it was, whether this succeeds or not.

    Parameters
    ----------
    known
        What some tensors hold: the graph is that for these numbers. The trace says by which of them
        the model's code decides; there must be one.
    refuse
        May raise for a graph that is of no use, where further traces can be spared by that.

    Raises
    ------
    BatchInvalid, CaptureFailed
    """
    with tracing():
        export = functools.partial(_export, wrapper, model, tensors, dims, known or {})
        return examined(wrapper, export, list(tensors.values()), refuse)


def _export(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
    known: Mapping[str, torch.Tensor],
) -> tuple[ExportedProgram, Trace]:
    once = functools.partial(_export_once, wrapper, model, tensors, dims)
    if known:
        return _export_knowing(once, whole_numbers(model), known)
    try:
        return once()
    except CaptureFailed as error:
        if not decides_by_values(error.__cause__):
            raise
        failed = error
    # Perhaps by buffers that never change: strides and kernel sizes, say.
    with suppress(CaptureFailed):
        return _export_knowing(once, whole_numbers(model), {})
    raise failed


def _export_knowing(
    once: Callable[..., tuple[ExportedProgram, Trace]],
    numbers: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> tuple[ExportedProgram, Trace]:
    """Export a model whose code reads numbers out of buffers and inputs.

    Only buffers that forward doesn't write are taken as known, and only inputs whose numbers it reads.
    """
    while numbers or inputs:
        exported, trace = once(numbers, inputs)
        read = set() if trace.known is None else trace.known.read
        if not trace.written_numbers and read == set(inputs):
            return exported, trace
        numbers = {n: value for n, value in numbers.items() if n not in trace.written_numbers}
        inputs = {n: value for n, value in inputs.items() if n in read}
    raise _NothingRead("The model's code reads no number that could be known.")


def _export_once(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
    read_buffers: Mapping[str, torch.Tensor] | None = None,
    read_inputs: Mapping[str, torch.Tensor] | None = None,
) -> tuple[ExportedProgram, Trace]:
    open_dims = {**dims, **dict.fromkeys(read_inputs or {}, ())}
    with (
        _on_one_device(model, tensors) as leaves,
        _without_extras(),
        without_gradient_hooks(model),
        refuse_iterators(wrapper),
        _without_torchs_log(),
        follow(wrapper, read_buffers, tuple(tensors), read_inputs) as trace,
    ):
        try:
            with warnings.catch_warnings(), known_constants():
                warnings.simplefilter("ignore")
                shapes = tuple(dict.fromkeys(open_dims[name], Dim.AUTO) for name in leaves)
                return torch.export.export(
                    wrapper, tuple(leaves.values()), dynamic_shapes=(shapes,), strict=False
                ), trace
        except (BatchInvalid, CaptureFailed):
            raise
        except Exception as error:
            has_read = trace.known is None or trace.known.read
            refusal = CaptureFailed if has_read else _NothingRead
            raise refusal(explain(error, trace)) from error


@contextmanager
def _without_extras() -> Iterator[None]:
    """Leave out what takes a quarter of a trace's time and serves nobody here.

    That are torch's cache of operators' results, which hardly ever finds one where sizes are open,
    and a second description of each result beside the result itself.
    """
    thread = threading.get_ident()
    described = proxy_tensor._extract_tensor_metadata  # type: ignore[attr-defined]

    def describe(*given: Any) -> Any:
        return None if threading.get_ident() == thread else described(*given)

    with (
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        patch.object(proxy_tensor, "_extract_tensor_metadata", describe),
    ):
        yield


@contextmanager
def _without_torchs_log() -> Iterator[None]:
    """Keep torch from logging a traceback of what is raised anyway, and from printing the graph so far."""
    from torch.export import _trace  # takes a second, which only captures need

    logs = [logging.getLogger(name) for name in _LOGS_OF_FAILURES]
    before = [log.disabled for log in logs]
    thread = threading.get_ident()

    def show(*text: Any, **where: Any) -> None:
        if threading.get_ident() != thread:
            print(*text, **where)

    try:
        for log in logs:
            log.disabled = True
        with patch.object(_trace, "print", show, create=True):
            yield
    finally:
        for log, was_disabled in zip(logs, before, strict=True):
            log.disabled = was_disabled


_LOGS_OF_FAILURES = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


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
