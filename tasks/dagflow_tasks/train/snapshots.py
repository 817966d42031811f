"""Writing a stage's state to the run's store, as its shard of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dagflow_storage import ShardRecord
from dagflow_tasks.errors import WeightsNotFinite
from dagflow_tasks.program.operators import countable, has_gradients
from dagflow_tasks.train.cache import CACHE, COPY
from dagflow_tasks.train.references import StageRef, StateRef
from dagflow_tasks.train.state import frozen_parameters, state_tensors, write_tensors


def copy_state(ref: StageRef, state: StateRef) -> None:
    """Copy a stage's state, to be written by `save_copy` while `update` moves the state on.

    Raises
    ------
    WeightsNotFinite
        If a gradient has made a parameter infinite or NaN: a snapshot must be one to go back to.
    """
    CACHE.keep(ref, COPY, (state.step, 0), _copied(ref, state))


def save_copy(ref: StageRef, state: StateRef) -> ShardRecord:
    """Write what `copy_state` has copied to the run's store, as one shard of a snapshot.

    If the copy is gone (the stage was rebuilt since), the state is copied now.

    Raises
    ------
    StateLost
        If the stage has moved on meanwhile, or is on another worker.
    """
    copies = CACHE.take(ref, COPY, (state.step, 0))
    if copies is None:
        # Nobody else keeps `update` from moving the state on under this.
        with CACHE.stage_lock(ref):
            copies = _copied(ref, state)
    return _save(ref, state, copies)


def save_state(ref: StageRef, state: StateRef) -> ShardRecord:
    """Write a stage's state as it lies, without a copy: nothing may move it on meanwhile.

    Raises
    ------
    WeightsNotFinite
        As `copy_state` does.
    """
    return _save(ref, state, _tensors_to_save(ref, state))


def _copied(ref: StageRef, state: StateRef) -> dict[tuple[str, str], torch.Tensor]:
    frozen = frozen_parameters(CACHE.executable(ref).program)
    return {
        (role, name): tensor if name in frozen else tensor.clone()
        for (role, name), tensor in _tensors_to_save(ref, state).items()
    }


def _tensors_to_save(ref: StageRef, state: StateRef) -> dict[tuple[str, str], torch.Tensor]:
    current = CACHE.state(ref, state.step)
    for name, parameter in current.parameters.items():
        if has_gradients(parameter.dtype) and not bool(torch.isfinite(countable(parameter)).all()):
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
