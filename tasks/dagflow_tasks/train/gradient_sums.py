"""Gradients of a stage's parameters, added up over a step's micro-batches in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from dagflow_tasks.program.interpreter import AUTOCAST_DTYPES
from dagflow_tasks.program.stage_program import ParameterUse
from dagflow_tasks.train.cache import CACHE, SavedGraph, state_lost
from dagflow_tasks.train.references import Microbatch, StageRef
from dagflow_tasks.train.results import (
    BackwardResult,
    ForwardResult,
    GradientSums,
    StageResult,
    Tensors,
    sums_part,
)

SUMS = "gradient sums"


def add_ahead(ref: StageRef, place: tuple[int, int]) -> None:
    """Have a worker add a half done micro-batch's gradients as soon as the task at hand is done."""
    if CACHE.run_next is not None:
        CACHE.run_next(partial(_add_ahead, ref, place))


def _add_ahead(ref: StageRef, place: tuple[int, int]) -> None:
    """Do the work of `backward_weights` before it is asked for, if all that it takes is here.

    The sums then have the micro-batch, which `backward_weights` sees. The cache goes on to know them
    by the micro-batch before: that changes when `backward_weights` has told the journal.
    """
    step, index = place
    with CACHE.stage_lock(ref):
        before, sums = CACHE.newest(ref, SUMS)
        if index > 0 and (before != (step, index - 1) or sums.place != before):
            return
        graph = CACHE.take_graph(ref, step, index)
        if graph is None:
            return
        if index == 0:
            # There are no sums yet. What is made here waits with the graph.
            graph.weights.finish()
            CACHE.save_graph(ref, step, index, graph)
            return
        try:
            add_up(graph, sums, place)
        except Exception as error:
            sums.trouble = error


def add_up(
    graph: SavedGraph,
    target: GradientSums,
    place: tuple[int, int],
    run_autograd: Callable[[], None] | None = None,
) -> None:
    """Add a micro-batch's gradients to sums: what autograd finds, if it is still to run, and the rest.

    Autograd adds in place to a leaf's gradient, so that no second copy of all gradients is alive;
    half-precision ones are added to sums in float32.
    """
    target.place = None
    for name, leaf in graph.uses.items():
        known = target.tensors.get(name)
        if known is not None and known.dtype == leaf.dtype:
            leaf.grad = known if leaf.grad is None else known.add_(leaf.grad)
    if run_autograd is not None:
        run_autograd()
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
    target.place = place


def already_added(
    ref: StageRef, microbatch: Microbatch, there: ForwardResult, previous: StageResult | None
) -> BackwardResult | None:
    """Return the result of a second half if its gradients are in the sums already."""
    sums, place = sums_before(ref, microbatch, previous), (microbatch.step, microbatch.index)
    if sums.place != place:
        return None
    CACHE.keep(ref, SUMS, place, sums)
    return with_sums(ref, microbatch, there, previous, sums, {})


def with_sums(
    ref: StageRef,
    microbatch: Microbatch,
    there: ForwardResult,
    previous: StageResult | None,
    sums: GradientSums,
    boundary: Tensors,
) -> BackwardResult:
    """Return a backward's result, with what is known of all micro-batches so far."""
    non_finite: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    if previous is not None:
        so_far = sums_part(previous)
        non_finite, losses = so_far.non_finite, so_far.losses
    if not there.finite:
        non_finite = (*non_finite, microbatch.index)
    loss = CACHE.executable(ref).program.loss
    if loss is not None:
        losses = (*losses, float(there.values[loss]))
    place = (microbatch.step, microbatch.index)
    return BackwardResult(boundary, sums, non_finite, losses, place)


def sums_before(
    ref: StageRef, microbatch: Microbatch, previous: StageResult | None
) -> GradientSums:
    """Return the sums of the micro-batches before this one, or with it if it has been added.

    Raises
    ------
    StateLost
        If they were on another worker, or an earlier task failed while it was adding.
    """
    if previous is None:
        return GradientSums(None)
    so_far = sums_part(previous)
    sums: GradientSums = so_far.sums or CACHE.recall(ref, SUMS, so_far.place)
    if sums.trouble is not None:
        raise sums.trouble
    if sums.place not in (so_far.place, (microbatch.step, microbatch.index)):
        raise state_lost(ref, SUMS, so_far.place)
    return sums


def finished_sums(ref: StageRef, result: BackwardResult) -> Tensors:
    """Return the finished sums of a step, from the cache if the result has been on a journey."""
    sums: GradientSums = result.sums or CACHE.recall(ref, SUMS, result.place)
    if sums.place != result.place:
        raise state_lost(ref, SUMS, result.place)
    return sums.tensors


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


def own_gradients(
    ref: StageRef, gradients: BackwardResult, borrowed: Sequence[Tensors]
) -> dict[str, torch.Tensor]:
    """Return a step's gradients of the parameters that a stage owns, by name."""
    program = CACHE.executable(ref).program
    owned = {use.parameter: use for use in program.owned_parameters if use.trainable}
    uses = [use for use in program.parameters if use.parameter in owned]
    for part in borrowed:
        for value in part:
            parameter = value.removeprefix("p.").partition("#")[0]
            uses.append(ParameterUse(value, parameter, "", (), True, ref.stage))
    return total_gradients(uses, [finished_sums(ref, gradients), *borrowed])
