"""Gradients of a stage's parameters, added up over a step's micro-batches in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from dagflow_tasks.program.interpreter import AUTOCAST_DTYPES
from dagflow_tasks.program.stage_program import ParameterUse
from dagflow_tasks.train.arguments import BackwardArguments
from dagflow_tasks.train.cache import CACHE, SavedGraph, state_lost
from dagflow_tasks.train.references import StageRef
from dagflow_tasks.train.results import BackwardResult, GradientSums, Tensors

SUMS = "gradient sums"


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
    if not graph.finite:
        target.non_finite = (*target.non_finite, place[1])
    if graph.loss is not None:
        target.losses = (*target.losses, graph.loss)
    target.place = place


def sums_before(work: BackwardArguments) -> GradientSums:
    """Return the sums of the micro-batches before this one, or with it if it has been added.

    Raises
    ------
    StateLost
        If they were on another worker, or an earlier task failed while it was adding.
    """
    if work.previous is None:
        return GradientSums(None)
    before = work.previous.place
    sums: GradientSums = work.previous.sums or CACHE.recall(work.ref, SUMS, before)
    if sums.place not in (before, work.place):
        raise state_lost(work.ref, SUMS, before)
    return sums


def result_with(
    work: BackwardArguments, sums: GradientSums, gradients: Tensors | None = None
) -> BackwardResult:
    """Return the result of a task that has added its micro-batch; the cache remembers the sums."""
    CACHE.keep(work.ref, SUMS, work.place, sums)
    return BackwardResult(gradients or {}, sums, sums.non_finite, sums.losses, work.place)


def finished_sums(ref: StageRef, result: BackwardResult) -> Tensors:
    """Return a step's finished sums: the result's, or the cache's if dask has moved the result."""
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
