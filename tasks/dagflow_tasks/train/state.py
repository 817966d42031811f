"""A stage's weights, buffers and optimizer on a worker, and the way to and from the store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dagflow_storage import (
    ALIGNMENT_BYTES,
    ArraySpec,
    DamagedData,
    NotFound,
    ShardRecord,
    Snapshot,
    Store,
    list_snapshots,
    write_shard,
)
from dagflow_storage.place.documents import sound
from dagflow_tasks.errors import ProgramInvalid, StateLost
from dagflow_tasks.layout import with_strides
from dagflow_tasks.program.nodes import dtype_of
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.train.optimizer import restore_slots, slots
from dagflow_tasks.train.references import StageRef

PARAMETER, BUFFER, OPTIMIZER = "parameter", "buffer", "optimizer"


@dataclass
class StageState:
    """The state of one stage after `step` optimizer steps; `update` moves it on in place."""

    step: int
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer | None
    casts: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def cast(self, parameter: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a parameter in another dtype, cast once a step."""
        key = (parameter, dtype)
        if key not in self.casts:
            self.casts[key] = self.parameters[parameter].detach().to(dtype)
        return self.casts[key]


def load_state(ref: StageRef, program: StageProgram, step: int, device: torch.device) -> StageState:
    """Read a stage's state of one step from the run's snapshots, whatever plan wrote them.

    Raises
    ------
    StateLost
        If there is no snapshot of that step.
    """
    try:
        snapshot = Snapshot.open(ref.store, step)
    except NotFound as error:
        raise StateLost(
            f"The weights of stage {ref.stage} after step {step} were on a worker that is gone, "
            f"and the store has no snapshot of that step. {error}"
        ) from error
    held = {use.parameter: use for use in program.held_parameters}
    for (role, name), shape in {
        **{(PARAMETER, use.parameter): use.shape for use in held.values()},
        **{(BUFFER, use.buffer): use.shape for use in program.buffers},
    }.items():
        stored = snapshot.arrays.get((role, name))
        if stored is not None and stored.shape != shape:
            raise DamagedData(
                f"the snapshot of step {step} has the {role} {name!r} with shape "
                f"{list(stored.shape)}; stage {ref.stage} wants {list(shape)}"
            )
    parameters = {
        name: with_strides(tensor.to(device), held[name].strides).requires_grad_(
            held[name].trainable
        )
        for name, tensor in read_tensors(snapshot, PARAMETER, held).items()
    }
    uses = {use.buffer: use for use in program.buffers}
    buffers = {
        name: with_strides(tensor.to(device), uses[name].strides)
        for name, tensor in read_tensors(snapshot, BUFFER, uses).items()
    }
    return StageState(step, parameters, buffers, _optimizer(ref, snapshot, parameters))


def _optimizer(
    ref: StageRef, snapshot: Snapshot, parameters: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer | None:
    trainable = {name: t for name, t in parameters.items() if t.requires_grad}
    if not trainable:
        return None
    optimizer = ref.settings.optimizer.build(trainable)
    stored = [n for n in snapshot.names(OPTIMIZER) if n.rpartition(":")[0] in trainable]
    restore_slots(optimizer, trainable, read_tensors(snapshot, OPTIMIZER, stored))
    return optimizer


def state_tensors(program: StageProgram, state: StageState) -> dict[tuple[str, str], torch.Tensor]:
    """Return what a snapshot holds of a stage, by (role, name)."""
    owned_buffers = [use.buffer for use in program.buffers if use.owner == program.stage]
    tensors: dict[tuple[str, str], torch.Tensor] = {
        (PARAMETER, use.parameter): state.parameters[use.parameter]
        for use in program.owned_parameters
    }
    tensors |= {(BUFFER, name): state.buffers[name] for name in dict.fromkeys(owned_buffers)}
    if state.optimizer is not None:
        names = {id(tensor): name for name, tensor in state.parameters.items()}
        tensors |= {(OPTIMIZER, n): t for n, t in slots(state.optimizer, names).items()}
    return tensors


def frozen_parameters(program: StageProgram) -> set[str]:
    """Return the parameters that a stage owns and training leaves as they are."""
    return {use.parameter for use in program.owned_parameters if not use.trainable}


def write_tensors(
    store: Store,
    step: int,
    shard: str,
    tensors: Mapping[tuple[str, str], torch.Tensor],
    frozen: Collection[str] = (),
) -> ShardRecord:
    """Write tensors by (role, name) as one shard of a snapshot.

    Parameters
    ----------
    frozen
        Names of those that don't change during the run; written once, referred to afterwards.
    """
    return stream_tensors(
        store,
        step,
        shard,
        [(role, name, t.dtype, tuple(t.shape)) for (role, name), t in tensors.items()],
        lambda role, name: tensors[(role, name)],
        frozen,
    )


def stream_tensors(
    store: Store,
    step: int,
    shard: str,
    items: Iterable[tuple[str, str, torch.dtype, tuple[int, ...]]],
    read: Callable[[str, str], torch.Tensor],
    frozen: Collection[str] = (),
) -> ShardRecord:
    """Write tensors as one shard, asking for one at a time, so that memory holds only one."""
    # Within a shard the store tells arrays apart by name alone, so names carry their role, too.
    specs = [
        ArraySpec(name, role, str(dtype).removeprefix("torch."), shape)
        for role, name, dtype, shape in items
    ]
    roles = {spec.name: spec.role for spec in specs}
    committed = list_snapshots(store) if frozen else []
    return write_shard(
        store,
        step,
        shard,
        specs,
        lambda name: to_array(read(roles[name], name)),
        frozen=frozen,
        earlier=Snapshot.open(store, committed[-1]) if committed else None,
    )


def read_tensors(snapshot: Snapshot, role: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read tensors of one role; each has memory of its own."""
    wanted = list(names)
    return {
        name: from_array(array, snapshot.arrays[(role, name)].dtype)
        for name, array in snapshot.read(role, wanted).items()
    }


def to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the tensor as NumPy sees it; what NumPy lacks, bfloat16 say, as integers of its size."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not _known_to_numpy(tensor.dtype):
        tensor = tensor.view(_INTEGERS[tensor.itemsize])
    return tensor.numpy()


# Stand-ins by size in bytes: float8, bfloat16, complex32.
_INTEGERS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def _known_to_numpy(dtype: torch.dtype) -> bool:
    has_other_form = dtype in (torch.bfloat16, torch.complex32)
    return not has_other_form and not (dtype.is_floating_point and dtype.itemsize == 1)


def from_array(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """Return the tensor that `to_array` was given, in memory that is aligned like torch's own.

    NumPy aligns to 16 bytes, torch to 64, and kernels may round differently on what isn't aligned to
    their vectors: a stage that was rebuilt must not.

    Raises
    ------
    DamagedData
        If the array can't be one of that dtype.
    """
    with sound(f"an array of {array.dtype} is said to be {dtype[:80]!r}"):
        wanted = _dtype_of_array(array, dtype)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        tensor = tensor.clone()
    return tensor if _known_to_numpy(wanted) else tensor.view(wanted)


def _dtype_of_array(array: np.ndarray[Any, Any], name: str) -> torch.dtype:
    """Return the dtype that an array holds by name; ValueError if it can't."""
    try:
        wanted = dtype_of(name)
    except ProgramInvalid as error:
        raise ValueError(str(error)) from error
    stand_in = wanted if _known_to_numpy(wanted) else _INTEGERS[wanted.itemsize]
    if array.dtype.name != str(stand_in).removeprefix("torch."):
        raise ValueError(f"that is stored as {stand_in}")
    # Kernels count on 0 and 1: with others they may write past the end.
    if wanted == torch.bool and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("its bytes are neither 0 nor 1")
    return wanted
