"""Where a run's first weights come from, and how its last ones are read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dagflow.errors import SettingsInvalid
from dagflow.graph.dag import OperatorDag
from dagflow.models.weight_files import WeightFiles
from dagflow_storage import DamagedData, NotFound, ShardRecord, Snapshot, Store, list_snapshots
from dagflow_tasks.program.nodes import dtype_of
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.train.state import BUFFER, PARAMETER, read_tensors, stream_tensors

_UNUSED = "unused"


def buffer_reader(
    model: torch.nn.Module, state_dict: str | Path | None
) -> Callable[[str], torch.Tensor | None]:
    """Return what reads a buffer's first value by name; None for one that has none."""

    def read(name: str) -> torch.Tensor | None:
        files = WeightFiles(state_dict) if state_dict is not None else None
        if files is not None and name in files.names():
            return files.read(name)
        buffer = dict(model.named_buffers()).get(name)
        return None if buffer is None or buffer.is_meta else buffer.detach().clone()

    return read


def initial_shard(
    store: Store, dag: OperatorDag, model: torch.nn.Module, state_dict: str | Path | None
) -> ShardRecord:
    """Write a model's parameters and buffers as the snapshot of step 0, one tensor at a time.

    Raises
    ------
    SettingsInvalid
        If a parameter has no value: it is on the meta device, and no file holds it.
    """
    given = _reader(dag, model, state_dict)

    def read(role: str, name: str) -> torch.Tensor:
        tensor, dtype = given(name)
        return tensor.to(dtype)

    items: list[tuple[str, str, torch.dtype, tuple[int, ...]]] = [
        (PARAMETER, p.name, dtype_of(p.dtype), p.shape) for p in dag.parameters
    ]
    items += [(BUFFER, name, b.dtype, tuple(b.shape)) for name, b in model.named_buffers()]
    frozen = {p.name for p in dag.parameters if not p.trainable}
    return stream_tensors(store, 0, "initial", items, read, frozen)


def _reader(
    dag: OperatorDag, model: torch.nn.Module, state_dict: str | Path | None
) -> Callable[[str], tuple[torch.Tensor, torch.dtype]]:
    """Return what reads a tensor by name, as it is stored, and tells the dtype that the model wants."""
    files = WeightFiles(state_dict) if state_dict is not None else None
    names = {p.name: (p.name, *p.aliases) for p in dag.parameters}
    given = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stored = files.names() if files is not None else set()

    def found(name: str) -> str | None:
        return next((n for n in names.get(name, (name,)) if n in stored), None)

    missing = [n for n, tensor in given.items() if tensor.is_meta and found(n) is None]
    if missing:
        raise SettingsInvalid(
            f"{len(missing)} of the model's tensors are on the meta device and have no value, "
            f"{missing[0]!r} the first. "
            + (
                f"{state_dict} holds none under that name."
                if files is not None
                else "Pass state_dict='model.safetensors', or build the model on the CPU."
            )
        )

    def read(name: str) -> tuple[torch.Tensor, torch.dtype]:
        source = found(name)
        if files is None or source is None:
            return given[name], given[name].dtype
        tensor = files.read(source)
        if tuple(tensor.shape) != tuple(given[name].shape):
            raise SettingsInvalid(
                f"{state_dict} has {name!r} with shape {list(tensor.shape)}; the model wants "
                f"{list(given[name].shape)}."
            )
        return tensor, given[name].dtype

    return read


def initial_weights(
    dag: OperatorDag, model: torch.nn.Module, state_dict: str | Path | None
) -> str | None:
    """Return a fingerprint of the parameters that a run begins with; None if they have no values."""
    try:
        return _fingerprint(dag, _reader(dag, model, state_dict))
    except SettingsInvalid:
        return None  # whoever needs them will say so; a run that is resumed doesn't


def trained_weights(dag: OperatorDag, snapshot: Snapshot) -> str | None:
    """Return the fingerprint that a model has with a snapshot's parameters; None of another model's."""
    if not {p.name for p in dag.parameters} <= set(snapshot.names(PARAMETER)):
        return None

    def read(name: str) -> tuple[torch.Tensor, torch.dtype]:
        tensor = read_tensors(snapshot, PARAMETER, [name])[name]
        return tensor, tensor.dtype

    return _fingerprint(dag, read)


def _fingerprint(dag: OperatorDag, read: Callable[[str], tuple[torch.Tensor, torch.dtype]]) -> str:
    """Return a checksum of a DAG's parameters, which are read by name.

    Of each parameter as many elements as `_sample` takes, since a file of many gigabytes is read
    for this whenever a run is resumed. Buffers don't count: a forward pass changes some.
    """
    checksum = 0
    for parameter in sorted(dag.parameters, key=lambda p: p.name):
        tensor, dtype = read(parameter.name)
        described = f"{parameter.name} {dtype} {list(tensor.shape)}"
        checksum = zlib.crc32(described.encode(), checksum)
        sample = _sample(tensor.detach()).to(dtype).cpu().contiguous()
        checksum = zlib.crc32(sample.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements of a tensor, flat, or 64 blocks of 1024 evenly spread over a large one."""
    flat, blocks, size = tensor.reshape(-1), 64, 1024
    if flat.numel() <= blocks * size:
        return flat
    starts = [(flat.numel() - size) * block // (blocks - 1) for block in range(blocks)]
    return torch.cat([flat[start : start + size] for start in starts])


class Leftovers:
    """Tensors that no stage owns, because the loss doesn't need them; they stay as they were."""

    def __init__(self, store: Store, step: int, programs: Sequence[StageProgram]) -> None:
        owned = {(PARAMETER, use.parameter) for p in programs for use in p.owned_parameters}
        owned |= {(BUFFER, use.buffer) for p in programs for use in p.buffers}
        self._store = store
        self._snapshot = Snapshot.open(store, step)
        self._wanted = [
            (role, name)
            for role in (PARAMETER, BUFFER)
            for name in self._snapshot.names(role)
            if (role, name) not in owned
        ]

    def write(self, step: int) -> list[ShardRecord]:
        """Write them as a shard of a step's snapshot, if there are any.

        Once: later snapshots refer to that. They don't refer to where they lay before, beside weights
        that have changed since and would have to be kept with them.
        """
        if not self._wanted:
            return []
        arrays = self._snapshot.arrays
        forms = [(*key, dtype_of(arrays[key].dtype), arrays[key].shape) for key in self._wanted]
        frozen = {name for _, name in self._wanted} if self._is_written() else set()
        return [stream_tensors(self._store, step, _UNUSED, forms, self._read, frozen)]

    def _is_written(self) -> bool:
        """Tell whether the newest snapshot has them as a shard of their own."""
        steps = list_snapshots(self._store)
        try:
            shards = Snapshot.open(self._store, steps[-1]).shards if steps else ()
        except (NotFound, DamagedData):
            return False
        known = {(a.role, a.name) for s in shards if s.shard == _UNUSED for a in s.arrays}
        return known.issuperset(self._wanted)

    def _read(self, role: str, name: str) -> torch.Tensor:
        return read_tensors(self._snapshot, role, [name])[name]


def read_state_dict(store: Store, step: int, aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return a snapshot's parameters and buffers by name, tied names included.

    Parameters
    ----------
    aliases
        First name by further name of each tied parameter.
    """
    snapshot = Snapshot.open(store, step)
    found: dict[str, torch.Tensor] = {}
    for role in (PARAMETER, BUFFER):
        found.update(read_tensors(snapshot, role, snapshot.names(role)))
    return {**found, **{alias: found[name] for alias, name in aliases.items() if name in found}}
