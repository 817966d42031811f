"""Where a run's first weights come from, and how its last ones are read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dagflow.errors import ProgramInvalid, SettingsInvalid
from dagflow.graph.dag import OperatorDag
from dagflow_storage import (
    DamagedData,
    NotFound,
    ShardRecord,
    Snapshot,
    Store,
    fields,
    list_snapshots,
)
from dagflow_storage.bounded_json import load_json
from dagflow_tasks.operators import dtype_of
from dagflow_tasks.program import StageProgram
from dagflow_tasks.state import BUFFER, PARAMETER, read_tensors, stream_tensors


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build models without memory for their parameters; buffers stay real.

    >>> with empty_weights():
    ...     model = torch.nn.Linear(100_000, 100_000)
    >>> model.weight.is_meta
    True
    """
    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    # Initialisers write to what torch.empty returned before it is registered; on the meta device
    # both cost nothing.
    torch.nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


class _EmptyOnMeta(torch.overrides.TorchFunctionMode):
    """Let `torch.empty`, which parameters are made of, allocate on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") in (None, "cpu", torch.device("cpu")):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class WeightFiles:
    """Tensors in safetensors files, read one at a time.

    Of a folder, the index says which files count; without one ``model.safetensors`` alone does, where
    it is, and otherwise all are read. Other files beside them (another format, an older save) hold
    nothing of the model.

    Parameters
    ----------
    path
        A file, or a folder with one or several ``*.safetensors``.

    Raises
    ------
    SettingsInvalid
        If files or tensors that the index names are missing, a file can't be read, or two of them hold
        the same tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / _INDEX
        named = _read_index(index) if index.is_file() else {}
        self._file_of: dict[str, Path] = {}
        for file in _files_that_count(self.path, named):
            for name in self._names_in(file):
                known = self._file_of.setdefault(name, file)
                if known != file and name not in named:
                    raise SettingsInvalid(
                        f"Both {known} and {file.name} hold {name!r}, and no {_INDEX} says which one "
                        "counts: leave the files in the folder that belong to one model."
                    )
        self._follow(named)

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        with _opened(self._file_of[name]) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            dtype_of(str(tensor.dtype).removeprefix("torch."))
            return tensor

    def agree(self, one: str, other: str) -> bool:
        """Tell whether two tensors are the same; most that aren't differ in their first rows."""
        with _opened(self._file_of[one]) as first, _opened(self._file_of[other]) as second:
            if first.get_slice(one).get_shape() != second.get_slice(other).get_shape():
                return False
            if not torch.equal(first.get_slice(one)[:1], second.get_slice(other)[:1]):
                return False
        return torch.equal(self.read(one), self.read(other))

    @staticmethod
    def _names_in(file: Path) -> list[str]:
        with _opened(file) as opened:
            return list(opened.keys())

    def _follow(self, named: Mapping[str, str]) -> None:
        """Take tensors from where the index says that they are."""
        inside: dict[str, set[str]] = {}
        for name, file_name in named.items():
            file = self.path / file_name
            if file_name not in inside:
                inside[file_name] = set(self._names_in(file))
            if name not in inside[file_name]:
                raise SettingsInvalid(
                    f"{file} doesn't hold {name!r}, which {_INDEX} says it does: fetch both again; "
                    "they are of different models, or one is incomplete."
                )
            self._file_of[name] = file


_INDEX = "model.safetensors.index.json"
_UNUSED = "unused"


def _read_index(index: Path) -> dict[str, str]:
    """Return in which file each tensor is."""
    try:
        document = fields.members(load_json(index), "it", "weight_map")
        found = fields.members(document["weight_map"], "weight_map")
        # Files of the folder and of no other: a name may not lead out of it.
        named = {name: fields.name(file, f"the file of {name!r}") for name, file in found.items()}
    except (ValueError, OSError) as error:
        raise SettingsInvalid(
            f"{index} is damaged, so nobody knows where the weights are ({type(error).__name__}: "
            f"{error}): fetch it again."
        ) from error
    wanted = sorted(set(named.values()))
    missing = [name for name in wanted if not (index.parent / name).is_file()]
    if missing:
        raise SettingsInvalid(
            f"{index.parent} lacks {len(missing)} of its {len(wanted)} files: {', '.join(missing[:5])}. "
            + _remedy(index, len(missing) == len(wanted))
        )
    return named


def _remedy(index: Path, lacks_all: bool) -> str:
    if lacks_all and (index.parent / "model.safetensors").is_file():
        # As after save_pretrained into a folder that held a larger model before.
        return f"There is a model.safetensors: if that is the model, remove {index.name}."
    return "Fetch them, and load again: what is stored already isn't stored twice."


def _files_that_count(path: Path, named: Mapping[str, str]) -> list[Path]:
    if named:
        return [path / name for name in sorted(set(named.values()))]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        others = sorted(f.name for f in path.glob("*.bin")) if path.is_dir() else []
        raise SettingsInvalid(
            f"Weights come from a .safetensors file or a folder with some; found none at {path}."
            + (
                f" It has {others[0]}: load it with transformers, and save_pretrained it."
                if others
                else ""
            )
        )
    return files


# Besides the library's own error: a header of the right form with wrong types, a dtype that torch
# lacks, or that no operator computes with.
_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    ProgramInvalid,
)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except _UNREADABLE as error:
        raise SettingsInvalid(
            f"{file} can't be read: it is truncated or damaged ({error}). Fetch it again."
        ) from error


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
