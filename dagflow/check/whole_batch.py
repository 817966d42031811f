"""Checks that a batch's loss is what its micro-batches' losses add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dagflow.check.agreement import (
    NUM_NUDGES,
    ROUNDING,
    TIMES_OWN_NOISE,
    TURN_OFF,
    awake,
    no_bare_errors,
    parameters_of,
    percent,
)
from dagflow.check.draws import ExpectedDraws, has_draws
from dagflow.check.eager import Eager, nudged
from dagflow.check.uncut import Sizes, Uncut
from dagflow.errors import BatchInvalid, ResultsDiffer
from dagflow.graph.batch import flatten_batch, without_columns
from dagflow.graph.capture import TRACING
from dagflow.graph.dag import OperatorDag
from dagflow.graph.loss import LossFunction
from dagflow.graph.signature import match_batch
from dagflow_tasks.errors import TaskFailed
from dagflow_tasks.train.exchange import tensors_of
from dagflow_tasks.train.references import Microbatch


@no_bare_errors()
def check_microbatches(
    dag: OperatorDag,
    split: OperatorDag,
    model: torch.nn.Module,
    batch: Any,
    parts: Sequence[Mapping[str, torch.Tensor]],
    microbatches: Sequence[Microbatch],
    loss: LossFunction | None = None,
) -> tuple[float, float]:
    """Compare a batch's loss with the weighted sum of its micro-batches' losses.

    Dropout and other random numbers are off, and batch normalisation takes its running statistics:
    what is compared is the loss. The statistics of micro-batches are their own in any case, as
    wherever gradients are accumulated.

    Parameters
    ----------
    dag, split
        What was captured, and what is to be run on micro-batches.
    batch
        The whole batch, as the user's data yields it.
    parts, microbatches
        Tensors by value name, and sizes and weights, of the micro-batches.

    Returns
    -------
    batch_loss, sum_of_losses

    Raises
    ------
    ResultsDiffer
    """
    uncut = Uncut(split, parameters_of(model) | awake(model), dict(model.named_buffers()))
    losses = []
    try:
        for part, microbatch in zip(parts, microbatches, strict=True):
            if microbatch.weight:
                uncut.numbers = dict(microbatch.numbers)
                loss_of_part = _calm_loss(uncut, dag, part, dict(microbatch.sizes))
                losses.append(microbatch.weight * loss_of_part)
        batch_loss = _batch_loss(dag, model, loss, batch, None)
    except TaskFailed as error:
        raise ResultsDiffer(f"The captured graph fails on the first batch: {error}") from error
    added = math.fsum(losses)
    size = max(abs(batch_loss), math.fsum(map(abs, losses)))
    off = abs(batch_loss - added)
    if not off > ROUNDING * size:
        return batch_loss, added
    nudges = [_batch_loss(dag, model, loss, batch, nudge) for nudge in range(NUM_NUDGES)]
    noise = max(abs(other - batch_loss) for other in nudges)
    if off <= TIMES_OWN_NOISE * noise + ROUNDING * size:
        return batch_loss, added
    raise ResultsDiffer(
        f"The loss of the first batch is {batch_loss:.6g}, but its {len(parts)} micro-batches' losses "
        f"add up to {added:.6g}, {percent(off, abs(batch_loss))} off: training would follow another "
        "loss than the model's. Does the loss compare rows with each other (contrastive losses, "
        "triplets, correlations over the batch), or divide by a number of its own? What to do: train "
        "with num_microbatches=1, or make the loss a sum or a mean over rows or targets. "
        f"{TURN_OFF}"
    )


def _batch_loss(
    dag: OperatorDag,
    model: torch.nn.Module,
    loss: LossFunction | None,
    batch: Any,
    nudge: int | None,
) -> float:
    """Return a whole batch's loss, by the graph or, if that takes fewer rows only, by the model."""
    batch = without_columns(batch, dag.dropped_columns)
    tensors, constants = flatten_batch(batch)
    changed = awake(model)
    try:
        sizes = dict(match_batch(dag, tensors, constants, "the check"))
    except BatchInvalid:
        eager = Eager(model, loss, batch, changed, draws=False)
        with TRACING, _calm(dag):
            ((outcome, _),) = eager.outcomes(
                [(list(tensors.values()), None)], nudge=nudge, grad=False
            )
            return float(outcome["loss", ""])
    parameters = parameters_of(model) | changed
    if nudge is not None:
        parameters = _nudged(parameters, nudge)
    uncut = Uncut(dag, parameters, dict(model.named_buffers()))
    return _calm_loss(uncut, dag, tensors_of(tensors), sizes)


def _calm_loss(
    uncut: Uncut, dag: OperatorDag, tensors: Mapping[str, torch.Tensor], sizes: Sizes
) -> float:
    uncut.begin()
    with _calm(dag):
        return uncut.loss(tensors, sizes)


def _calm(dag: OperatorDag) -> AbstractContextManager[Any]:
    """Switch off what makes a row's result depend on other rows; costs more than small operators."""
    if has_draws(dag.nodes) or any("batch_norm" in node.op for node in dag.nodes):
        return ExpectedDraws()  # type: ignore[no-untyped-call]
    return nullcontext()


def _nudged(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    return {
        name: nudged(tensor.detach(), seed) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
