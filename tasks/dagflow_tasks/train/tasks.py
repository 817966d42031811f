"""The pieces of work: forward, backward, update and what goes with them.

Every function here is pure in its arguments and the store: run on any worker, with whatever is or
isn't in that worker's cache, and run again, it gives the same result to the bit. `update` moves
the cached state on in place, but recognises its own work when it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dagflow_tasks.errors import GarbageReceived
from dagflow_tasks.layout import copied, moved
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.operators import countable, has_gradients
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.train.cache import CACHE, SavedGraph
from dagflow_tasks.train.exchange import BUFFERS, buffers_after, send
from dagflow_tasks.train.gradient_sums import (
    SUMS,
    add_ahead,
    add_up,
    already_added,
    sums_before,
    with_sums,
)
from dagflow_tasks.train.received import (
    check_gradient,
    check_numbers,
    check_received,
    will_be_refused,
)
from dagflow_tasks.train.references import Microbatch, StageRef, StateRef
from dagflow_tasks.train.results import (
    BackwardResult,
    Decision,
    ForwardResult,
    GradientSums,
    StageResult,
    StepReport,
    Tensors,
    UpdateResult,
    forward_part,
)
from dagflow_tasks.train.state import StageState


def forward(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    halves: bool = False,
    weights: Sequence[Any] | None = None,
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
    weights : sequence, optional
        The second half of an earlier micro-batch's backward, to begin with, if it hasn't been done
        ahead: the arguments of `backward_weights` after `state`.
    """
    earlier = backward_weights(ref, state, *weights) if weights else None
    graph, buffers = _run(ref, state, microbatch, values, before, tied, halves)
    result = _forward_result(ref, state, microbatch, graph, buffers, earlier)
    if not will_be_refused(ref, result, microbatch):
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
    previous: StageResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
    halves: bool = False,
    ahead: bool = False,
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
        The result with the stage's gradient sums of the micro-batches before.
    scaling
        The previous step's decision, which holds the loss scale, in a run with loss scaling.
    halves : bool
        True leaves the parameters' gradients to `backward_weights`; `this` and `previous` are then
        not needed.
    ahead : bool
        Whether to begin with those as soon as this task has returned, before the task that asks for
        them is there. This hides its way from the scheduler, and others' results get their way.
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
    if ahead:
        add_ahead(ref, result.place)
    return result


def backward_weights(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    values: Sequence[Tensors | ForwardResult],
    gradients: Sequence[BackwardResult],
    this: StageResult,
    previous: StageResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
) -> BackwardResult:
    """Run the second half of a backward: add the parameters' gradients to those before.

    Takes what the first half left in the cache; if that is gone, the whole backward runs again,
    unless the sums have it already. Parameters are those of `backward`.
    """
    there = forward_part(this)
    result = already_added(ref, microbatch, there, previous)
    if result is None:
        graph = CACHE.take_graph(ref, microbatch.step, microbatch.index)
        if graph is None:
            CACHE.recomputed += 1
            graph, _ = _run(ref, state, microbatch, values, before, tied, False)
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
    previous: StageResult | None = None,
    before: StageResult | None = None,
    tied: Sequence[Tensors] = (),
    scaling: Decision | None = None,
    halves: bool = False,
    ahead: bool = False,
    weights: Sequence[Any] | None = None,
) -> BackwardResult:
    """Run the last stage on one micro-batch, there and back: nobody else is waited for between.

    Parameters are those of `forward` and `backward`.
    """
    earlier = backward_weights(ref, state, *weights) if weights else None
    graph, buffers = _run(ref, state, microbatch, values, before, tied, halves)
    there = _forward_result(ref, state, microbatch, graph, buffers, earlier)
    if halves:
        back = _first_half(ref, microbatch, graph, (), scaling)
    else:
        back = _backward(ref, microbatch, graph, (), there, previous, scaling)
    result = replace(back, forward=there)
    _send_backward(ref, result)
    if ahead:
        add_ahead(ref, result.place)
    return result


def _send_backward(ref: StageRef, result: BackwardResult) -> None:
    """Have the journal keep a backward's result.

    Raises
    ------
    GarbageReceived
        If its readers would refuse it. Said here, and not only there: this stage's next tasks, which
        go by what this one leaves behind, must not run, whoever comes first.
    """
    if not ref.journal:
        return
    step, index = result.place
    try:
        for name, gradient in result.gradients.items():
            what = f"The gradient of {name!r} by stage {ref.stage} in step {step} has NaN."
            check_numbers(ref, gradient, what, ref.stage)
    except GarbageReceived:
        if result.sums is None:
            CACHE.take_graph(ref, step, index)  # the first half counts as not done
        else:
            CACHE.drop(ref, SUMS)  # which hold it already
        raise
    facts: dict[str, Any] = {"non_finite": result.non_finite, "losses": result.losses}
    if result.forward is not None:
        loss = CACHE.executable(ref).program.loss
        assert loss is not None
        facts |= {"finite": result.forward.finite, "loss": float(result.forward.values[loss])}
    send(ref, "backward", result.place, result.gradients, facts)


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
        tensor = moved(given[item.value.name], executable.device)
        inputs[item.value.name] = (
            tensor.detach().requires_grad_() if item.differentiable else tensor
        )
    uses = _leaves(executable, state, {n: t for part in tied for n, t in part.items()})
    latest = buffers_after(ref, before) if before is not None else state.buffers
    buffers, written = _buffers(executable, state, latest)
    random = RandomAddress(ref.settings.seed, microbatch.step, microbatch.index)
    weights = WeightGradients(later=halves)
    known = dict(microbatch.numbers)
    numbers = {name: known[name] for name in program.numbers}
    values_of = {**inputs, **uses, **buffers, **numbers}
    outputs = executable.run(values_of, dict(microbatch.sizes), random, weights)
    return SavedGraph(inputs, uses, outputs, weights), written


def _forward_result(
    ref: StageRef,
    state: StateRef,
    microbatch: Microbatch,
    graph: SavedGraph,
    buffers: Tensors | None,
    earlier: BackwardResult | None,
) -> ForwardResult:
    boundary = _apart_from_weights(graph.outputs, CACHE.state(ref, state.step))
    loss = CACHE.executable(ref).program.loss
    if loss is not None and not microbatch.weight:
        # A mean over nothing is NaN; of a micro-batch without any target nothing counts.
        boundary[loss] = torch.zeros_like(boundary[loss])
    finite = all(
        bool(torch.isfinite(countable(tensor)).all())
        for tensor in boundary.values()
        if has_gradients(tensor.dtype)
    )
    place = (microbatch.step, microbatch.index)
    if ref.journal and loss is not None and not bool(torch.isfinite(boundary[loss])):
        # Before any gradient of it is added anywhere: whoever is to blame, the step can be repeated.
        what = f"The loss of step {place[0]}, micro-batch {place[1]}, is {float(boundary[loss])}."
        if ref.settings.precision != "fp16":
            raise GarbageReceived(what, ref.stage, True)
    if buffers is not None:
        CACHE.keep(ref, BUFFERS, place, buffers)
    return ForwardResult(boundary, buffers, finite, place, earlier)


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
    previous: StageResult | None,
    scaling: Decision | None,
) -> BackwardResult:
    """Run what is left of a backward, with all gradients of parameters added to the sums."""
    place = (microbatch.step, microbatch.index)
    sums = sums_before(ref, microbatch, previous)
    # Sums that hold this micro-batch already (the task runs again) are left alone.
    target = GradientSums(None) if sums.place == place else sums
    boundary: dict[str, torch.Tensor] = {}

    def run_autograd() -> None:
        boundary.update(_input_gradients(ref, microbatch, graph, gradients, scaling))

    add_up(graph, target, place, None if graph.halved else run_autograd)
    sums.place = place
    CACHE.keep(ref, SUMS, place, sums)
    return with_sums(ref, microbatch, there, previous, sums, boundary)


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
        name: copied(tensor) if tensor.untyped_storage().data_ptr() in weights else tensor.detach()
        for name, tensor in outputs.items()
    }


def _leaves(executable: Executable, state: StageState, tied: Tensors) -> dict[str, torch.Tensor]:
    """Make a leaf for each parameter use, in half precision where its operator would cast it."""
    dtype = executable.autocast_dtype
    leaves = {}
    # The program may write these, and a task may run again: all uses see one copy.
    copies = {name: copied(state.parameters[name]) for name in executable.written_parameters}
    for use in executable.program.parameters:
        if use.parameter in state.parameters:
            cast = (
                dtype is not None and use.value in executable.cast_uses and use.dtype == "float32"
            )
            tensor = (
                state.cast(use.parameter, dtype)
                if cast and dtype
                else copies.get(use.parameter, state.parameters[use.parameter])
            )
        else:
            tensor = moved(tied[use.parameter], executable.device)
        leaves[use.value] = tensor.detach().requires_grad_(use.trainable)
    return leaves


def _buffers(
    executable: Executable, state: StageState, latest: Tensors
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Return buffers by value, and copies of the mutated ones, which the program may write."""
    written = {name: copied(latest[name]) for name in executable.program.mutated_buffers}
    values = {
        use.value: written[use.buffer] if use.mutated else state.buffers[use.buffer]
        for use in executable.program.buffers
    }
    return values, written or None


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
    # Without a root nothing gets a gradient, here and in the stages before: 0 times NaN would be NaN.
    if program.loss is not None and loss_gradient and tensors[program.loss].requires_grad:
        roots.append(tensors[program.loss])
        seeds.append(torch.full_like(tensors[program.loss], loss_gradient))
    for name in wanted:
        if name in given and tensors[name].requires_grad:
            check_gradient(ref, given[name], tensors[name], name)
            roots.append(tensors[name])
            seeds.append(moved(given[name], executable.device))
    return roots, seeds


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
