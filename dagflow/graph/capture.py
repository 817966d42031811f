"""From a torch module to its operator DAG, through `torch.export` at the training IR.

The training IR keeps `linear`, `layer_norm`, `scaled_dot_product_attention` and `dropout` whole, so
that the DAG runs the same kernels as the model did, to the same bits.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

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
from dagflow.graph.effects import (
    Change,
    RandomStates,
    Snapshot,
    Uses,
    gradient_hooks,
    holders,
    watch_attributes,
    watch_generators,
    without_gradient_hooks,
)
from dagflow.graph.loss import LossFunction, LossModule, check_loss
from dagflow.graph.outside import Outside, refuse_iterators, refuse_outside
from dagflow.graph.sizes import what_fixed
from dagflow.graph.trace import OWN_FILES, Trace, explain, follow
from dagflow.graph.translate import translate
from dagflow.graph.whole_sequences import whole_sequences
from dagflow_tasks.program import ValueSpec

# torch.export changes the model and torch itself while it traces: one trace at a time in a process.
TRACING = threading.RLock()


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
        batch has columns that forward doesn't take, which are dropped; if its code fixes a size
        that was to be open, with `len(x)` or `float(x.shape[0])` say.
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
    with TRACING, whole_sequences(model):
        exported, trace = export_module(wrapper, model, tensors, dims)
    for text in _warnings(trace, model):
        warnings.warn(text, stacklevel=2)
    inputs = [
        ValueSpec(input_value(name), str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    ]
    dag = translate(exported, model, inputs, constants, decisions=trace.decisions)
    fixed = _fixed_sizes(dag, trace, dims)
    for size in fixed:
        # Operators fix lengths for good reasons (tables of positions), the number of rows for none.
        if not size.by_operator or size.dim == 0:
            warnings.warn(_fixed_warning(size), stacklevel=2)
    return replace(dag, dropped_columns=dropped, fixed_sizes=fixed)


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
    if trace.clock:
        yield (
            f"Forward reads the clock at {', '.join(dict.fromkeys(trace.clock))}: what it computes "
            "from that is the same in every step."
        )
    if trace.drawn:
        yield (
            f"Forward draws from Python's or NumPy's random numbers at {trace.drawn}. Other numbers "
            "gave the same graph, so it is taken to make no use of them. If it does, draw with torch."
        )
    if trace.attributes:
        yield (
            f"Forward sets {'; '.join(map(str, trace.attributes))}. They stay as they are while "
            "dagflow trains: workers run operators, not the model's code."
        )


def export_module(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
) -> tuple[ExportedProgram, Trace]:
    """Export a module around a model (its child ``model``) over tensors with open sizes.

    The model is left as it was, whether this succeeds or not.

    Raises
    ------
    BatchInvalid, CaptureFailed
    """
    with TRACING:
        outside = Outside(wrapper)
        try:
            with _left_as_it_was(wrapper) as states:
                exported, trace = _export(wrapper, model, tensors, dims)
                drawn, moved = states.changed(), outside.changed()
            if trace.changes or drawn or moved:
                with _left_as_it_was(wrapper):
                    _examine(wrapper, model, tensors, dims, (exported, trace, moved))
        finally:
            outside.restore()
    return exported, trace


@contextmanager
def _left_as_it_was(wrapper: torch.nn.Module) -> Iterator[RandomStates]:
    states, snapshot = RandomStates(), Snapshot(wrapper)
    try:
        yield states
    finally:
        snapshot.restore()
        states.restore()


def _export(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
) -> tuple[ExportedProgram, Trace]:
    with (
        _on_one_device(model, tensors) as leaves,
        without_gradient_hooks(model),
        refuse_iterators(wrapper),
        follow(wrapper) as trace,
    ):
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
            raise CaptureFailed(explain(error, trace)) from error
    return exported, trace


def _examine(
    wrapper: torch.nn.Module,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    dims: Mapping[str, Sequence[int]],
    first: tuple[ExportedProgram, Trace, list[str]],
) -> None:
    """Trace a second call, with other random numbers, to see what becomes of what the first changed.

    A state that the second call leaves alone, and that gives the same graph, does no harm: every
    later call is like the second.

    Raises
    ------
    CaptureFailed
        If attributes carry something from one call to the next, or random numbers of Python's or
        NumPy's decide what is computed.
    """
    exported, trace, moved = first
    trace.make_changes()
    outside = Outside(wrapper)
    graphs = [_fingerprint(exported)]
    with watch_attributes(wrapper, trace.changes) as uses, watch_generators(largest=True) as draws:
        again, later = _export(wrapper, model, tensors, dims)
    graphs.append(_fingerprint(again))
    if draws.lines:
        with watch_generators(largest=False):
            graphs.append(_fingerprint(_export(wrapper, model, tensors, dims)[0]))
    is_same = len(set(graphs)) == 1
    refuse_outside(moved if outside.changed() or not is_same else [])
    _refuse_state(wrapper, trace.changes if later.changes or not is_same else (), uses)
    trace.attributes = [change for change in trace.changes if uses.is_only_written(change)]
    lines = [line for line in draws.lines if line.rpartition(":")[0] not in OWN_FILES]
    if lines:
        trace.drawn = ", ".join(dict.fromkeys(lines))
        untried = set(draws.untried) & set(lines)
        if untried and is_same:
            raise CaptureFailed(
                "Forward draws from Python's or NumPy's random numbers "
                f"({', '.join(sorted(untried))}), and nothing shows that what it computes never "
                "depends on them. A graph would hold the first draw for ever. What to do: draw with "
                "torch (torch.rand), which is drawn anew in every step, or draw in the data loader."
            )
        if not is_same:
            raise CaptureFailed(
                f"Forward draws from Python's or NumPy's random numbers ({trace.drawn}), and what it "
                "computes depends on them. A graph would hold the first draw for ever. What to do: "
                "draw with torch (torch.rand), which is drawn anew in every step, or augment in "
                "the data loader."
            )


def _refuse_state(wrapper: torch.nn.Module, changes: Sequence[Change], uses: Uses) -> None:
    found = holders(wrapper)
    for change in changes:
        own = vars(found[change.module])
        if any(change.attribute in own.get(t, ()) for t in ("_parameters", "_modules")):
            raise CaptureFailed(
                f"Forward replaces a parameter or submodule ({change}), and stages train those that "
                "the model was built with. What to do: write into the parameter in place, under "
                "torch.no_grad(), or build the module in __init__."
            )
        line = uses.carried_over(change)
        if line:
            raise CaptureFailed(
                f"Forward changes a plain attribute and reads at {line} what an earlier call left "
                f"in it ({change}). A graph holds tensor operators only, and would read the same in "
                "every step. What to do: keep it in a buffer (register_buffer) and change it with "
                "tensor operators (a loss that keeps state: as a submodule of the model, whose forward "
                "returns the loss). If it is a table that the first call makes, call the model once "
                "on a batch before."
            )


def _fingerprint(exported: ExportedProgram) -> str:
    """Return a digest of a graph, its regions and its constants."""
    digest = hashlib.blake2b()
    for module in exported.graph_module.modules():
        digest.update(str(getattr(module, "code", "")).encode())
    for name, constant in sorted(exported.constants.items()):
        data = constant.detach() if isinstance(constant, torch.Tensor) else constant
        is_real = isinstance(data, torch.Tensor) and not data.is_meta
        digest.update(f"{name} {data.tolist() if is_real else type(data)}".encode())
    return digest.hexdigest()


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
