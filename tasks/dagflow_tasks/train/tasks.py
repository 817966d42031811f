"""A stage's work on one micro-batch: forward (``F``), input and weight gradients (``I``, ``W``).

``B`` is both gradients at once. Every function is pure in its arguments and the store: run on any
worker, with whatever is or isn't in that worker's cache, and run again, it gives the same result to
the bit. Sums of gradients are added to in place, and say which micro-batch they have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite

import torch

from dagflow_tasks.errors import GarbageReceived
from dagflow_tasks.layout import copied, moved
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.operators import countable, has_gradients
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.train.arguments import BackwardArguments, ForwardArguments
from dagflow_tasks.train.cache import CACHE, SavedGraph
from dagflow_tasks.train.exchange import BUFFERS, buffers_after, send
from dagflow_tasks.train.gradient_sums import SUMS, add_up, result_with, sums_before
from dagflow_tasks.train.received import (
    check_gradient,
    check_numbers,
    check_received,
    will_be_refused,
)
from dagflow_tasks.train.results import (
    BackwardResult,
    Decision,
    ForwardResult,
    GradientSums,
    StepReport,
    Tensors,
    UpdateResult,
)
from dagflow_tasks.train.state import StageState


def forward(work: ForwardArguments) -> ForwardResult:
    """Run a stage on one micro-batch (``F``) and leave its autograd graph in the worker's cache."""
    graph, result = _run(work)
    if result.buffers is not None:
        CACHE.keep(work.ref, BUFFERS, result.place, result.buffers)
    if not will_be_refused(work.ref, result, work.microbatch, graph.finite):
        CACHE.save_graph(work.ref, *work.place, graph)
        send(work.ref, "forward", result.place, result.values)
    return result


def backward(work: BackwardArguments) -> BackwardResult:
    """Run a stage's backward on one micro-batch: ``I`` in a stage with halved backwards, else ``B``.

    ``I`` returns the gradients of the stage's inputs and leaves those of its parameters to
    `weight_gradients`. ``B`` does both. The autograd graph is the one that `forward` left in the
    cache; if it is gone, the forward runs again.
    """
    graph = CACHE.take_graph(work.ref, *work.place)
    if graph is None or graph.halved:
        graph = _run_again(work)
    return _backward(work, graph)


def weight_gradients(work: BackwardArguments) -> BackwardResult:
    """Add a micro-batch's gradients of the parameters to the sums (``W``).

    Does what ``I`` does first if that isn't done here. Sums that hold the micro-batch already, as the
    task runs again, are left alone.
    """
    sums = sums_before(work)
    if sums.place != work.place:
        graph = CACHE.take_graph(work.ref, *work.place)
        if graph is None or not graph.halved:
            graph, _ = _input_gradients_only(work, graph or _run_again(work))
        add_up(graph, sums, work.place)
    result = result_with(work, sums)
    facts = {"non_finite": result.non_finite, "losses": result.losses}
    send(work.ref, "weights", result.place, {}, facts)
    return result


def forward_backward(work: BackwardArguments) -> BackwardResult:
    """Run the last stage on one micro-batch, forward and `backward` at once.

    Between the two nobody else would be waited for.
    """
    graph, there = _run(work)
    if there.buffers is not None:
        CACHE.keep(work.ref, BUFFERS, there.place, there.buffers)
    return replace(_backward(work, graph), buffers=there.buffers)


def _run_again(work: ForwardArguments) -> SavedGraph:
    """Run a forward again whose graph is gone."""
    CACHE.recomputed += 1
    return _run(work)[0]


def _run(work: ForwardArguments) -> tuple[SavedGraph, ForwardResult]:
    """Run the program on leaves of its own; return its autograd graph and what others get of it.

    Raises
    ------
    GarbageReceived
        If a value from another stage can't be right, or the loss isn't finite.
    """
    ref, microbatch = work.ref, work.microbatch
    executable = CACHE.executable(ref)
    program = executable.program
    state = CACHE.state(ref, microbatch.step)
    given: dict[str, torch.Tensor] = {}
    for part in work.values:
        given.update(part.values if isinstance(part, ForwardResult) else part)
    inputs = {}
    for item in program.inputs:
        if ref.journal and item.source is not None:
            check_received(ref, item.value, item.source, given, microbatch)
        tensor = moved(given[item.value.name], executable.device)
        inputs[item.value.name] = (
            tensor.detach().requires_grad_() if item.differentiable else tensor
        )
    uses = _leaves(executable, state, {n: t for part in work.tied for n, t in part.items()})
    latest = buffers_after(ref, work.before) if work.before is not None else state.buffers
    buffers, written = _buffers(executable, state, latest)
    random = RandomAddress(ref.settings.seed, microbatch.step, microbatch.index)
    weights = WeightGradients(later=work.halved)
    known = dict(microbatch.numbers)
    numbers = {name: known[name] for name in program.numbers}
    values_of = {**inputs, **uses, **buffers, **numbers}
    outputs = executable.run(values_of, dict(microbatch.sizes), random, weights)
    values = _apart_from_weights(outputs, state)
    loss = _loss(work, program.loss, values) if program.loss is not None else None
    finite = all(
        bool(torch.isfinite(countable(tensor)).all())
        for tensor in values.values()
        if has_gradients(tensor.dtype)
    )
    graph = SavedGraph(inputs, uses, outputs, weights, finite=finite, loss=loss)
    return graph, ForwardResult(values, written, work.place)


def _loss(work: ForwardArguments, name: str, values: dict[str, torch.Tensor]) -> float:
    """Return a micro-batch's loss, and put 0 into its place where nothing of it counts."""
    if not work.microbatch.weight:
        # A mean over nothing is NaN; of a micro-batch without any target nothing counts.
        values[name] = torch.zeros_like(values[name])
    loss = float(values[name])
    if work.ref.journal and not isfinite(loss) and work.ref.settings.precision != "fp16":
        # Before any gradient of it is added anywhere: whoever is to blame, the step can be repeated.
        raise GarbageReceived(f"The loss of {work.label('F')} is {loss}.", work.ref.stage, True)
    return loss


def _backward(work: BackwardArguments, graph: SavedGraph) -> BackwardResult:
    """Run ``I`` or ``B`` with a forward's graph."""
    if not work.halved:
        return _backward_at_once(work, graph)
    halved, result = _input_gradients_only(work, graph)
    CACHE.save_graph(work.ref, *work.place, halved)
    return result


def _input_gradients_only(
    work: BackwardArguments, graph: SavedGraph
) -> tuple[SavedGraph, BackwardResult]:
    """Run ``I``; return what is left for ``W``, and the result."""
    result = BackwardResult(_input_gradients(work, graph)(), place=work.place)
    _check_and_send(work, result)
    return replace(graph, inputs={}, outputs={}, halved=True), result


def _backward_at_once(work: BackwardArguments, graph: SavedGraph) -> BackwardResult:
    """Run ``B``."""
    run = _input_gradients(work, graph)
    gradients: dict[str, torch.Tensor] = {}
    sums = sums_before(work)
    # Sums that hold this micro-batch already (the task runs again) are left alone.
    target = GradientSums(None) if sums.place == work.place else sums
    add_up(graph, target, work.place, lambda: gradients.update(run()))
    result = result_with(work, sums, gradients)
    try:
        _check_and_send(work, result)
    except GarbageReceived:
        CACHE.drop(work.ref, SUMS)  # which hold it already
        raise
    return result


def _check_and_send(work: BackwardArguments, result: BackwardResult) -> None:
    """Have the journal keep a result with gradients of the stage's inputs.

    Raises
    ------
    GarbageReceived
        If its readers would refuse it. Said here, and not only there: this stage's next tasks, which
        go by what this one leaves behind, must not run, whoever comes first.
    """
    ref = work.ref
    if not ref.journal:
        return
    label = work.label("I" if work.halved else "B")
    for name, gradient in result.gradients.items():
        check_numbers(ref, gradient, f"The gradient of {name!r} by {label} has NaN.", ref.stage)
    facts = {"non_finite": result.non_finite, "losses": result.losses}
    send(ref, "backward", result.place, result.gradients, facts)


def _input_gradients(
    work: BackwardArguments, graph: SavedGraph
) -> Callable[[], dict[str, torch.Tensor]]:
    """Return what runs autograd and returns the gradients of the stage's inputs, by name.

    Raises
    ------
    GarbageReceived
        If a gradient from another stage can't be right: before anything has been added anywhere.
    """
    roots, seeds = _roots(work, graph)

    def run() -> dict[str, torch.Tensor]:
        gradients: dict[str, torch.Tensor] = {}
        for name, leaf in graph.inputs.items():
            if leaf.requires_grad:
                # Taken before autograd lays it out like the leaf: a later sum over it would otherwise
                # run in another order than without the cut.
                leaf.register_hook(partial(gradients.__setitem__, name))  # type: ignore[no-untyped-call]
        if roots:
            torch.autograd.backward(roots, seeds)
        return gradients

    return run


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
    work: BackwardArguments, graph: SavedGraph
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pair the tensors that gradients flow into with those gradients.

    A boundary input that a later stage reads, too, is a root itself: its gradient so far comes
    first in the sum, as it would without the cut.
    """
    executable = CACHE.executable(work.ref)
    program = executable.program
    scale = work.scaling.loss_scale if work.scaling is not None else 1.0
    loss_gradient = work.microbatch.weight * scale
    given = {
        name: gradient for result in work.gradients for name, gradient in result.gradients.items()
    }
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
            check_gradient(work, given[name], tensors[name], name)
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
