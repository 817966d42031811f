"""The pieces of work: forward, backward, update and what goes with them.

Every function here is pure in its arguments and the store: run on any worker, with whatever is or
isn't in that worker's cache, and run again, it gives the same result to the bit. `update` moves
the cached state on in place, but recognises its own work when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from dagflow_storage import ShardRecord
from dagflow_tasks.cache import CACHE, SavedGraph, state_lost
from dagflow_tasks.errors import GarbageReceived, StateLost, WeightsNotFinite
from dagflow_tasks.interpreter import AUTOCAST_DTYPES, Executable, RandomAddress
from dagflow_tasks.journal import JOURNAL, EntryKey, Sent
from dagflow_tasks.operators import evaluate_size
from dagflow_tasks.program import ParameterUse, ValueSpec
from dagflow_tasks.references import Microbatch, StageRef, StateRef
from dagflow_tasks.results import (
    BackwardResult,
    Decision,
    ForwardResult,
    GradientSums,
    StageResult,
    StepReport,
    TensorDict,
    Tensors,
    UpdateResult,
)
from dagflow_tasks.state import StageState, frozen_parameters, state_tensors, write_tensors
from dagflow_tasks.weight_gradients import WeightGradients

SUMS, BUFFERS = "gradient sums", "buffers"

# Loss scaling as torch.amp.GradScaler does it (its defaults).
INITIAL_LOSS_SCALE = 65536.0
_SCALE_GROWTH, _SCALE_BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000


def forward(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    halves: bool = False,
) -> ForwardResult:
    """Run a stage on one micro-batch and leave its autograd graph in the worker's cache.

    Parameters
    ----------
    ref, state, microbatch
        Which stage, with which weights, on which micro-batch.
    values
        The batch's tensors and other stages' boundary values, by name.
    before
        Result of the previous micro-batch's forward, in a stage with mutated buffers.
    tied
        Parameters that other stages own.
    halves : bool
        Whether the backward will come in two halves.
    """
    graph, buffers = _run(ref, state, microbatch, values, before, tied, halves)
    result = _forward_result(ref, state, microbatch, graph, buffers)
    if not _will_be_refused(ref, result, microbatch):
        CACHE.save_graph(ref, microbatch.step, microbatch.index, graph)
        send(ref, "forward", result.place, result.values, {"finite": result.finite})
    return result


def backward(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    gradients: Sequence[BackwardResult],
    this: StageResult | None,
    previous: BackwardResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
    halves: bool = False,
) -> BackwardResult:
    """Run a stage's backward on one micro-batch and add its parameters' gradients to those before.

    Uses the autograd graph that `forward` left in the cache, and recomputes it if it is gone.

    Parameters
    ----------
    values, before, tied
        As for `forward`: what a recomputation needs.
    gradients
        Backward results of the stages that hold gradients of this stage's boundary values.
    this
        The micro-batch's own forward result.
    previous
        The stage's backward result of the previous micro-batch.
    scaling
        The previous step's decision, which holds the loss scale, in a run with loss scaling.
    halves : bool
        True leaves the parameters' gradients to `backward_weights`; `this` and `previous` are then
        not needed.
    """
    graph = CACHE.take_graph(ref, microbatch.step, microbatch.index)
    if graph is None or (graph.halved and halves):
        CACHE.recomputed += 1
        graph, _ = _run(ref, state, microbatch, values, before, tied, halves)
    if halves:
        result = _first_half(ref, microbatch, graph, gradients, scaling)
    else:
        assert this is not None
        there = forward_part(this)
        result = _backward(ref, microbatch, graph, gradients, there, previous, scaling)
    _send_backward(ref, result)
    return result


def backward_weights(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    gradients: Sequence[BackwardResult],
    this: StageResult,
    previous: BackwardResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
) -> BackwardResult:
    """Run the second half of a backward: add the parameters' gradients to those before.

    Takes what the first half left in the cache; if that is gone, the whole backward runs again.
    Parameters are those of `backward`.
    """
    graph = CACHE.take_graph(ref, microbatch.step, microbatch.index)
    if graph is None:
        CACHE.recomputed += 1
        graph, _ = _run(ref, state, microbatch, values, before, tied, False)
    there = forward_part(this)
    whole = _backward(ref, microbatch, graph, gradients, there, previous, scaling)
    result = replace(whole, gradients={})
    facts = {"non_finite": result.non_finite, "losses": result.losses}
    send(ref, "weights", result.place, {}, facts)
    return result


def forward_backward(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    previous: BackwardResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
    halves: bool = False,
) -> BackwardResult:
    """Run the last stage on one micro-batch, there and back: nobody else is waited for between.

    Parameters are those of `forward` and `backward`.
    """
    graph, buffers = _run(ref, state, microbatch, values, before, tied, halves)
    there = _forward_result(ref, state, microbatch, graph, buffers)
    if halves:
        back = _first_half(ref, microbatch, graph, (), scaling)
    else:
        back = _backward(ref, microbatch, graph, (), there, previous, scaling)
    result = replace(back, forward=there)
    _send_backward(ref, result)
    return result


def send(
    ref: StageRef,
    kind: str,
    place: tuple[int, int],
    tensors: Tensors,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Have the journal keep what a task sends to other stages."""
    step, index = place
    JOURNAL.put(ref, step, EntryKey(kind, ref.stage, index), Sent(dict(tensors), facts or {}))


def _will_be_refused(ref: StageRef, result: ForwardResult, microbatch: Microbatch) -> bool:
    """Tell whether its readers will refuse a result.

    The journal mustn't keep it: whoever would have it disowned may be gone by then.
    """
    if not ref.journal:
        return False
    try:
        for output in CACHE.executable(ref).program.outputs:
            tensor = _check_form(ref, output.value, ref.stage, result.values, microbatch)
            if not result.finite:
                _check_numbers(ref, tensor, output.value.name, ref.stage)
    except GarbageReceived:
        return True
    return False


def _send_backward(ref: StageRef, result: BackwardResult) -> None:
    if not ref.journal:
        return
    try:
        for name, gradient in result.gradients.items():
            _check_numbers(ref, gradient, name, ref.stage)
    except GarbageReceived:
        # It will be refused; and what is in the sums is no better.
        with CACHE.lock:
            CACHE.states.pop(ref.key, None)
        return
    facts: dict[str, Any] = {"non_finite": result.non_finite, "losses": result.losses}
    if result.forward is not None:
        loss = CACHE.executable(ref).program.loss
        assert loss is not None
        facts |= {"finite": result.forward.finite, "loss": float(result.forward.values[loss])}
    send(ref, "backward", result.place, result.gradients, facts)


def forward_part(result: StageResult) -> ForwardResult:
    """Return the forward's result, whether or not the backward came with it."""
    if isinstance(result, ForwardResult):
        return result
    assert result.forward is not None
    return result.forward


def _run(
    ref: StageRef,
    state_ref: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    before: StageResult | None,
    tied: Sequence[Tensors],
    halves: bool,
) -> tuple[SavedGraph, Tensors | None]:
    """Run the program on leaves of its own, and return its autograd graph and mutated buffers."""
    executable = CACHE.executable(ref)
    program = executable.program
    state = CACHE.state(ref, state_ref.step)
    given: dict[str, torch.Tensor] = {}
    for part in values:
        given.update(part.values if isinstance(part, ForwardResult) else part)
    inputs = {}
    for item in program.inputs:
        if ref.journal and item.source is not None:
            check_received(ref, item.value, item.source, given, microbatch)
        tensor = given[item.value.name].to(executable.device)
        inputs[item.value.name] = (
            tensor.detach().requires_grad_() if item.differentiable else tensor
        )
    uses = _leaves(executable, state, {n: t for part in tied for n, t in part.items()})
    latest = _buffers_after(ref, before) if before is not None else state.buffers
    buffers, written = _buffers(executable, state, latest)
    random = RandomAddress(ref.settings.seed, microbatch.step, microbatch.index)
    weights = WeightGradients(later=halves)
    outputs = executable.run({**inputs, **uses, **buffers}, dict(microbatch.sizes), random, weights)
    return SavedGraph(inputs, uses, outputs, weights), written


def check_received(
    ref: StageRef,
    value: ValueSpec,
    source: int,
    given: Mapping[str, torch.Tensor],
    microbatch: Microbatch,
) -> None:
    """Refuse a boundary value that can't be right, so that it is computed again by somebody else.

    Raises
    ------
    GarbageReceived
        Naming the stage it came from.
    """
    tensor = _check_form(ref, value, source, given, microbatch)
    what = _sent_to(ref, source, microbatch)
    _check_numbers(ref, tensor, f"{what} NaN in {value.name!r}.", source)


def _check_form(
    ref: StageRef,
    value: ValueSpec,
    source: int,
    given: Mapping[str, torch.Tensor],
    microbatch: Microbatch,
) -> torch.Tensor:
    """Return a boundary value if it is there and has the form that the program says."""
    tensor = given.get(value.name)
    what = _sent_to(ref, source, microbatch)
    if tensor is None:
        raise GarbageReceived(f"{what} no {value.name!r}.", source)
    sizes = dict(microbatch.sizes)
    shape = tuple(evaluate_size(size, sizes) for size in value.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    # Under autocast values are in half precision that the program, captured without, has in fp32.
    other_dtype = dtype != value.dtype and ref.settings.precision == "fp32"
    if tuple(tensor.shape) != shape or other_dtype:
        raise GarbageReceived(
            f"{what} {value.name!r} as {dtype}{list(tensor.shape)} instead of "
            f"{value.dtype}{list(shape)}.",
            source,
        )
    return tensor


def _sent_to(ref: StageRef, source: int, microbatch: Microbatch) -> str:
    return (
        f"Stage {source} sent stage {ref.stage} in step {microbatch.step}, micro-batch "
        f"{microbatch.index},"
    )


def _check_numbers(ref: StageRef, tensor: torch.Tensor, message: str, source: int) -> None:
    # Infinities are no garbage (masks have them); under loss scaling, NaN isn't either.
    scaled = ref.settings.precision == "fp16"
    if tensor.is_floating_point() and not scaled and bool(torch.isnan(tensor).any()):
        raise GarbageReceived(message, source, True)


def _forward_result(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    graph: SavedGraph,
    buffers: Tensors | None,
) -> ForwardResult:
    boundary = _apart_from_weights(graph.outputs, CACHE.state(ref, state.step))
    finite = all(
        bool(torch.isfinite(tensor).all())
        for tensor in boundary.values()
        if tensor.is_floating_point()
    )
    place = (microbatch.step, microbatch.index)
    loss = CACHE.executable(ref).program.loss
    if ref.journal and loss is not None and not bool(torch.isfinite(boundary[loss])):
        # Before any gradient of it is added anywhere: whoever is to blame, the step can be repeated.
        what = f"The loss of step {place[0]}, micro-batch {place[1]}, is {float(boundary[loss])}."
        if ref.settings.precision != "fp16":
            raise GarbageReceived(what, ref.stage, True)
    if buffers is not None:
        CACHE.keep(ref, BUFFERS, place, buffers)
    return ForwardResult(boundary, buffers, finite, place)


def _first_half(
    ref: StageRef,
    microbatch: Microbatch,
    graph: SavedGraph,
    gradients: Sequence[BackwardResult],
    scaling: Decision | None,
) -> BackwardResult:
    place = (microbatch.step, microbatch.index)
    boundary = _input_gradients(ref, microbatch, graph, gradients, scaling)
    CACHE.save_graph(ref, *place, SavedGraph({}, graph.uses, {}, graph.weights, halved=True))
    return BackwardResult(boundary, place=place)


def _backward(
    ref: StageRef,
    microbatch: Microbatch,
    graph: SavedGraph,
    gradients: Sequence[BackwardResult],
    there: ForwardResult,
    previous: BackwardResult | None,
    scaling: Decision | None,
) -> BackwardResult:
    """Run what is left of a backward, with all gradients of parameters added to the sums.

    Autograd adds in place to a leaf's gradient, so that no second copy of all gradients is alive;
    half-precision ones are added to sums in float32.
    """
    place = (microbatch.step, microbatch.index)
    sums = _sums_before(ref, microbatch, previous)
    # Sums that hold this micro-batch already (the task runs again) are left alone.
    target = GradientSums(None) if sums.place == place else sums
    target.place = None
    for name, leaf in graph.uses.items():
        known = target.tensors.get(name)
        if known is not None and known.dtype == leaf.dtype:
            leaf.grad = known if leaf.grad is None else known.add_(leaf.grad)
    boundary: Tensors = {}
    if not graph.halved:
        boundary = _input_gradients(ref, microbatch, graph, gradients, scaling)
    graph.weights.finish()
    for name, leaf in graph.uses.items():
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            continue
        if gradient.dtype not in AUTOCAST_DTYPES.values():
            target.tensors[name] = gradient
        elif name in target.tensors:
            target.tensors[name].add_(gradient)
        else:
            target.tensors[name] = gradient.float()
    sums.place = place
    CACHE.keep(ref, SUMS, place, sums)
    non_finite, losses = (previous.non_finite, previous.losses) if previous else ((), ())
    if not there.finite:
        non_finite = (*non_finite, microbatch.index)
    loss = CACHE.executable(ref).program.loss
    if loss is not None:
        losses = (*losses, float(there.values[loss]))
    return BackwardResult(boundary, sums, non_finite, losses, place)


def _input_gradients(
    ref: StageRef,
    microbatch: Microbatch,
    graph: SavedGraph,
    gradients: Sequence[BackwardResult],
    scaling: Decision | None,
) -> dict[str, torch.Tensor]:
    """Run autograd, and return the gradients of the boundary inputs."""
    scale = scaling.loss_scale if scaling is not None else 1.0
    roots, seeds = _roots(ref, CACHE.executable(ref), graph, gradients, microbatch.weight * scale)
    boundary: dict[str, torch.Tensor] = {}
    for name, leaf in graph.inputs.items():
        if leaf.requires_grad:
            # Taken before autograd lays it out like the leaf: a later sum over it would otherwise run
            # in another order than without the cut.
            leaf.register_hook(partial(boundary.__setitem__, name))  # type: ignore[no-untyped-call]
    if roots:
        torch.autograd.backward(roots, seeds)
    return boundary


def _apart_from_weights(outputs: Tensors, state: StageState) -> dict[str, torch.Tensor]:
    """Detach a stage's outputs; copy views of weights, which `update` changes in place."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in state.parameters.values()}
    return {
        name: tensor.detach().clone()
        if tensor.untyped_storage().data_ptr() in weights
        else tensor.detach()
        for name, tensor in outputs.items()
    }


def _leaves(executable: Executable, state: StageState, tied: Tensors) -> dict[str, torch.Tensor]:
    """Make a leaf for each parameter use, in half precision where its operator would cast it."""
    dtype = executable.autocast_dtype
    leaves = {}
    for use in executable.program.parameters:
        if use.parameter in state.parameters:
            cast = (
                dtype is not None and use.value in executable.cast_uses and use.dtype == "float32"
            )
            tensor = (
                state.cast(use.parameter, dtype)
                if cast and dtype
                else state.parameters[use.parameter]
            )
        else:
            tensor = tied[use.parameter].to(executable.device)
        leaves[use.value] = tensor.detach().requires_grad_(use.trainable)
    return leaves


def _buffers(
    executable: Executable, state: StageState, latest: Tensors
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Return buffers by value, and copies of the mutated ones, which the program may write."""
    written = {name: latest[name].clone() for name in executable.program.mutated_buffers}
    values = {
        use.value: written[use.buffer] if use.mutated else state.buffers[use.buffer]
        for use in executable.program.buffers
    }
    return values, written or None


def _check_gradient(ref: StageRef, gradient: torch.Tensor, value: torch.Tensor, name: str) -> None:
    if not ref.journal:
        return
    program = CACHE.executable(ref).program
    source = next(
        (s for s in program.gradient_sources if name in program.gradients_from(s)), ref.stage
    )
    if gradient.shape != value.shape:
        raise GarbageReceived(
            f"Stage {source} sent stage {ref.stage} a gradient of {name!r} with shape "
            f"{list(gradient.shape)} instead of {list(value.shape)}.",
            source,
        )
    message = f"Stage {source} sent stage {ref.stage} a gradient of {name!r} with NaN."
    _check_numbers(ref, gradient, message, source)


def _roots(
    ref: StageRef,
    executable: Executable,
    graph: SavedGraph,
    results: Sequence[BackwardResult],
    loss_gradient: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pair the tensors that gradients flow into with those gradients.

    A boundary input that a later stage reads, too, is a root itself: its gradient so far comes
    first in the sum, as it would without the cut.
    """
    program = executable.program
    given = {name: gradient for result in results for name, gradient in result.gradients.items()}
    wanted = [output.value.name for output in program.outputs]
    wanted += [item.value.name for item in program.inputs if item.gradient_from is not None]
    tensors = {**graph.inputs, **graph.outputs}
    roots, seeds = [], []
    if program.loss is not None and tensors[program.loss].requires_grad:
        roots.append(tensors[program.loss])
        seeds.append(torch.full_like(tensors[program.loss], loss_gradient))
    for name in wanted:
        if name in given and tensors[name].requires_grad:
            _check_gradient(ref, given[name], tensors[name], name)
            roots.append(tensors[name])
            seeds.append(given[name].to(executable.device))
    return roots, seeds


def _sums_before(
    ref: StageRef, microbatch: Microbatch, previous: BackwardResult | None
) -> GradientSums:
    """Return the sums of the micro-batches before this one, or with it if it has been added.

    Raises
    ------
    StateLost
        If they were on another worker, or an earlier task failed while it was adding.
    """
    if previous is None:
        return GradientSums(None)
    sums: GradientSums = previous.sums or CACHE.recall(ref, SUMS, previous.place)
    if sums.place not in (previous.place, (microbatch.step, microbatch.index)):
        raise state_lost(ref, SUMS, previous.place)
    return sums


def _sums(ref: StageRef, result: BackwardResult) -> Tensors:
    """Return the finished sums of a step, from the cache if the result has been on a journey."""
    sums: GradientSums = result.sums or CACHE.recall(ref, SUMS, result.place)
    if sums.place != result.place:
        raise state_lost(ref, SUMS, result.place)
    return sums.tensors


def _buffers_after(ref: StageRef, result: StageResult) -> Tensors:
    """Return a result's buffers, from the cache if this copy of it has been on a journey."""
    there = forward_part(result)
    return there.buffers if there.buffers is not None else CACHE.recall(ref, BUFFERS, there.place)


def total_gradients(
    uses: Iterable[ParameterUse], sums: Sequence[Tensors]
) -> dict[str, torch.Tensor]:
    """Add up the gradients of each parameter's uses, last use first, as autograd does.

    Parameters
    ----------
    uses
        All uses of the stage's own parameters, wherever they are, in the model's order.
    sums
        Gradient sums by use, from this stage and from those it lends parameters to.
    """
    by_use = {name: gradient for part in sums for name, gradient in part.items()}
    totals: dict[str, torch.Tensor] = {}
    for use in sorted(uses, key=lambda use: use_index(use.value), reverse=True):
        gradient = by_use.get(use.value)
        if gradient is not None:
            name = use.parameter
            gradient = gradient.to(totals[name].device) if name in totals else gradient
            totals[name] = totals[name] + gradient if name in totals else gradient
    return totals


def use_index(value: str) -> int:
    """Return the position of a use among those of its parameter: 2 for ``p.wte.weight#2``."""
    return int(value.partition("#")[2] or 0)


def _own_gradients(
    ref: StageRef, gradients: BackwardResult, borrowed: Sequence[Tensors]
) -> dict[str, torch.Tensor]:
    program = CACHE.executable(ref).program
    owned = {use.parameter: use for use in program.owned_parameters if use.trainable}
    uses = [use for use in program.parameters if use.parameter in owned]
    for part in borrowed:
        for value in part:
            parameter = value.removeprefix("p.").partition("#")[0]
            uses.append(ParameterUse(value, parameter, "", (), True, ref.stage))
    return total_gradients(uses, [_sums(ref, gradients), *borrowed])


def update(
    ref: StageRef,
    state: StateRef,
    gradients: BackwardResult,
    learning_rate_factor: float,
    borrowed: Sequence[Tensors] = (),
    last: StageResult | None = None,
    decision: Decision | None = None,
) -> UpdateResult:
    """Take one optimizer step on a stage's parameters.

    Parameters
    ----------
    gradients
        Backward result of the step's last micro-batch.
    learning_rate_factor : float
        The schedule's factor for this step.
    borrowed
        Gradients of this stage's parameters from stages that borrow them, by use.
    last
        Forward result of the last micro-batch, in a stage with mutated buffers.
    decision
        Clipping and loss scaling, if the run has either.

    Returns
    -------
    UpdateResult
        Refers to the state after the step; run again, the same.
    """
    facts = {
        "non_finite": gradients.non_finite,
        "decision": decision.to_json() if decision is not None else None,
    }
    with CACHE.lock:
        cached = CACHE.states.get(ref.key)
        if cached is not None and cached.step == state.step + 1:
            return _updated(ref, state, gradients)
    current = CACHE.state(ref, state.step)
    try:
        if decision is None or decision.apply:
            _step(current, _own_gradients(ref, gradients, borrowed), learning_rate_factor, decision)
    except BaseException:
        with CACHE.lock:
            CACHE.states.pop(ref.key, None)  # half-updated: better none
        raise
    if last is not None:
        current.buffers.update(_buffers_after(ref, last))
    CACHE.drop(ref, SUMS)
    CACHE.drop(ref, BUFFERS)
    current.casts.clear()
    current.step += 1
    send(ref, "update", (state.step, 0), {}, facts)
    JOURNAL.end_step(ref, state.step)
    return _updated(ref, state, gradients)


def _updated(ref: StageRef, state: StateRef, gradients: BackwardResult) -> UpdateResult:
    stats = JOURNAL.stats() if ref.journal else None
    return UpdateResult(StateRef(state.step + 1), ref.stage, gradients.non_finite, stats)


def _step(
    state: StageState,
    gradients: Mapping[str, torch.Tensor],
    learning_rate_factor: float,
    decision: Decision | None,
) -> None:
    if state.optimizer is None:
        return
    coefficient = decision.coefficient if decision is not None else 1.0
    for name, parameter in state.parameters.items():
        gradient = gradients.get(name)
        if gradient is not None and coefficient != 1.0:
            gradient = gradient * coefficient
        parameter.grad = gradient if gradient is None else gradient.to(parameter.dtype)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate_factor
    state.optimizer.step()
    for parameter in state.parameters.values():
        parameter.grad = None


def gradient_norms(
    ref: StageRef, gradients: BackwardResult, borrowed: Sequence[Tensors] = ()
) -> Tensors:
    """Return the 2-norm of each parameter's gradient, by name."""
    totals = _own_gradients(ref, gradients, borrowed)
    return TensorDict(
        {name: torch.linalg.vector_norm(total).cpu() for name, total in totals.items()}
    )


def decide(
    norms: Sequence[Tensors],
    order: Sequence[str],
    clip_norm: float | None,
    before: Decision,
    scaled: bool,
) -> Decision:
    """Decide on clipping and on the loss scale from all gradients' norms.

    The global norm is taken over the parameters in the model's order, so that it doesn't depend on
    the cut; clipping is `torch.nn.utils.clip_grad_norm_`'s, scaling `torch.amp.GradScaler`'s.
    """
    by_name = {name: norm for part in norms for name, norm in part.items()}
    ordered = [by_name[name] for name in order if name in by_name]
    total = torch.linalg.vector_norm(torch.stack(ordered)) if ordered else torch.zeros(())
    scale = before.loss_scale
    if scaled and not torch.isfinite(total):
        return Decision(float("inf"), 1.0, False, scale * _SCALE_BACKOFF, 0)
    total = total / scale
    coefficient = 1.0
    if clip_norm is not None:
        coefficient = float(torch.clamp(clip_norm / (total + 1e-6), max=1.0))
    good = before.good_steps + 1
    grown = scaled and good >= _GROWTH_INTERVAL
    next_scale = scale * _SCALE_GROWTH if grown else scale
    return Decision(float(total), coefficient / scale, True, next_scale, 0 if grown else good)


def select_values(result: ForwardResult, names: Sequence[str]) -> ForwardResult:
    """Keep the boundary values that one reader needs, so that no more travels."""
    return ForwardResult({name: result.values[name] for name in names}, finite=result.finite)


def select_gradients(result: BackwardResult, names: Sequence[str]) -> BackwardResult:
    """Keep the gradients that one stage needs, so that no more travels."""
    present = {name: g for name, g in result.gradients.items() if name in names}
    return BackwardResult(present)


def lend_parameters(
    ref: StageRef, state: StateRef, names: Sequence[str], borrower: int = -1
) -> Tensors:
    """Return copies of parameters that another stage uses, too (tied weights)."""
    # Copies: `update` moves the cached weights on in place, and a result must not move with them.
    parameters = CACHE.state(ref, state.step).parameters
    lent = TensorDict({name: parameters[name].detach().clone() for name in names})
    send(ref, "lend", (state.step, borrower), lent)
    return lent


def return_gradients(
    ref: StageRef, gradients: BackwardResult, uses: Sequence[str], owner: int = -1
) -> Tensors:
    """Return the gradients of borrowed parameters to their owner, by use."""
    sums = _sums(ref, gradients)
    returned = TensorDict({use: sums[use] for use in uses if use in sums})
    send(ref, "return", (gradients.place[0], owner), returned)
    return returned


COPY = "copy for a snapshot"


def copy_state(ref: StageRef, state: StateRef) -> None:
    """Copy a stage's state, to be written by `save_copy` while `update` moves the state on.

    Raises
    ------
    WeightsNotFinite
        If a gradient has made a parameter infinite or NaN: a snapshot must be one to go back to.
    """
    frozen = frozen_parameters(CACHE.executable(ref).program)
    copies = {
        (role, name): tensor if name in frozen else tensor.clone()
        for (role, name), tensor in _tensors_to_save(ref, state).items()
    }
    CACHE.keep(ref, COPY, (state.step, 0), copies)


def save_copy(ref: StageRef, state: StateRef) -> ShardRecord:
    """Write what `copy_state` has copied to the run's store, as one shard of a snapshot.

    Raises
    ------
    StateLost
        If the copy was on another worker.
    """
    try:
        copies = CACHE.recall(ref, COPY, (state.step, 0))
    except StateLost:
        copy_state(ref, state)
        copies = CACHE.recall(ref, COPY, (state.step, 0))
    record = _save(ref, state, copies)
    CACHE.drop(ref, COPY)
    return record


def save_state(ref: StageRef, state: StateRef) -> ShardRecord:
    """Write a stage's state as it lies, without a copy: nothing may move it on meanwhile.

    Raises
    ------
    WeightsNotFinite
        As `copy_state` does.
    """
    return _save(ref, state, _tensors_to_save(ref, state))


def _tensors_to_save(ref: StageRef, state: StateRef) -> dict[tuple[str, str], torch.Tensor]:
    current = CACHE.state(ref, state.step)
    for name, parameter in current.parameters.items():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise WeightsNotFinite(
                f"After step {state.step} the parameter {name!r} of stage {ref.stage} isn't finite. "
                "The weights of the last snapshot are good. Lower the learning rate or clip gradients "
                "(clip_grad_norm=1.0); then train again with the same store."
            )
    tensors = state_tensors(CACHE.executable(ref).program, current)
    return {where: tensor.detach() for where, tensor in tensors.items()}


def _save(
    ref: StageRef, state: StateRef, tensors: Mapping[tuple[str, str], torch.Tensor]
) -> ShardRecord:
    frozen = frozen_parameters(CACHE.executable(ref).program)
    return write_tensors(ref.store, state.step, f"stage-{ref.stage}", tensors, frozen)


def report(
    step: int,
    weights: Sequence[float],
    last: BackwardResult,
    updates: Sequence[UpdateResult],
    decision: Decision | None,
) -> StepReport:
    """Gather what the driver wants to know of a step.

    Parameters
    ----------
    weights
        The micro-batches' weights.
    last
        Result of the last micro-batch's backward in the stage that computes the loss.
    """
    loss = sum(weight * value for weight, value in zip(weights, last.losses, strict=True))
    non_finite = {u.stage: u.non_finite for u in updates if u.non_finite}
    journal = {u.stage: u.journal for u in updates if u.journal is not None}
    return StepReport(step, loss, last.losses, decision, non_finite, journal)


def tensors_of(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name a batch's tensors as programs do."""
    return {f"in.{name}": tensor for name, tensor in values.items()}


@dataclass(frozen=True)
class ResultSlot:
    """Stands for another task's result in the layout of a call."""

    index: int


@cache
def result_slot(index: int) -> ResultSlot:
    """Return the slot of an index, the same object each time: graphs hold very many."""
    return ResultSlot(index)


def call(function: Callable[..., Any], layout: tuple[Any, ...], *results: Any) -> Any:
    """Call a function with other tasks' results in their places.

    Results that no slot asks for are those of tasks that only had to be done before.
    """

    filled = [_filled(argument, results) for argument in layout]
    if not filled or type(filled[0]) is not StageRef:
        return function(*filled)
    with CACHE.stage_lock(filled[0]):
        return function(*filled)


def _filled(argument: Any, results: tuple[Any, ...]) -> Any:
    # Not a function inside `call`: one that calls itself is a reference cycle, and would keep the
    # results, gradients as large as the weights among them, until the garbage collector comes by.
    if type(argument) is ResultSlot:
        return results[argument.index]
    if type(argument) is tuple:
        return tuple(_filled(item, results) for item in argument)
    return argument
