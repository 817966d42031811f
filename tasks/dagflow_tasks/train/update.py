"""The end of a step on a stage: the gradients' norm, what is decided by it, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.arguments import UpdateArguments
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.exchange import BUFFERS, buffers_after, send
from dagflow_tasks.train.gradient_sums import SUMS, own_gradients
from dagflow_tasks.train.optimizer import Schedule
from dagflow_tasks.train.references import StageRef, StateRef
from dagflow_tasks.train.results import BackwardResult, Decision, Tensors, UpdateResult
from dagflow_tasks.train.state import StageState
from dagflow_tasks.train.worker_journal import JOURNAL

# Loss scaling as torch.amp.GradScaler does it (its defaults), see `Decision.initial`.
_SCALE_GROWTH, _SCALE_BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000


def update(work: UpdateArguments) -> UpdateResult:
    """Take one optimizer step on a stage's parameters (``U``); run again, it returns the same."""
    ref, step, decision = work.ref, work.step, work.decision
    cached = CACHE.states.get(ref.key)
    if cached is None or cached.step != step + 1:
        _move_on(work)
    non_finite = work.gradients.non_finite
    facts = {
        "non_finite": non_finite,
        "decision": decision.to_json() if decision is not None else None,
    }
    # Also when it runs again: the first time may have ended right before this.
    send(ref, "update", work.place, {}, facts)
    JOURNAL.end_step(ref, step)
    stats = JOURNAL.stats(ref.run_id) if ref.journal else None
    return UpdateResult(StateRef(step + 1), ref.stage, non_finite, stats)


def _move_on(work: UpdateArguments) -> None:
    """Do the work of `update` on the cached state; what fails halfway leaves no state behind."""
    ref, decision = work.ref, work.decision
    current = CACHE.state(ref, work.step)
    # Whatever may be lost is looked for before the first weight changes.
    totals = own_gradients(ref, work.gradients, work.borrowed)
    buffers = buffers_after(ref, work.last) if work.last is not None else {}
    try:
        CACHE.executable(ref).write_parameters(current.parameters, current.buffers)
        if decision is None or decision.apply:
            factor = learning_rate_factor(work.learning_rate, work.step, decision)
            _step(current, totals, factor, decision)
        current.buffers.update(buffers)
        current.casts.clear()
        current.step += 1
    except BaseException:
        with CACHE.lock:
            CACHE.states.pop(ref.key, None)  # half-updated: better none
        raise
    CACHE.drop(ref, SUMS)
    CACHE.drop(ref, BUFFERS)


def learning_rate_factor(
    learning_rate: float | Schedule, step: int, decision: Decision | None
) -> float:
    """Return a step's factor. As in a torch loop, a skipped update doesn't move the schedule on."""
    if not isinstance(learning_rate, Schedule):
        return learning_rate
    if decision is None:
        return learning_rate.factor(step)
    return learning_rate.factor(step - decision.skipped + (0 if decision.apply else 1))


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
    totals = own_gradients(ref, gradients, borrowed)
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
        return Decision(float("inf"), 1.0, False, scale * _SCALE_BACKOFF, 0, before.skipped + 1)
    total = total / scale
    coefficient = 1.0
    if clip_norm is not None:
        coefficient = float(torch.clamp(clip_norm / (total + 1e-6), max=1.0))
    good = before.good_steps + 1
    grown = scaled and good >= _GROWTH_INTERVAL
    next_scale = scale * _SCALE_GROWTH if grown else scale
    good = 0 if grown else good
    return Decision(float(total), coefficient / scale, True, next_scale, good, before.skipped)
