"""Takes a run's weights out of its store: as safetensors, a Hugging Face folder, or for torch."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dagflow.errors import NotFound, SettingsInvalid
from dagflow.runs.listing import open_store
from dagflow_storage import RunDirectory, Snapshot, Store, list_snapshots
from dagflow_storage.place import fields
from dagflow_storage.place.documents import sound
from dagflow_tasks.train.state import BUFFER, PARAMETER, read_tensors

Format = Literal["safetensors", "hf", "torch"]
TIED_NAMES, STATE_DICT_NAMES = "tied_names", "state_dict_names"
# Small tensors share chunks, so they are read together; more would only take memory.
_BATCH_BYTES = 64 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
_SAFETENSORS_DTYPES = {
    "float64": ("F64", 8),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    path : Path
    step : int
    num_tensors : int
    note : str | None
        What the store didn't know.
    """

    path: Path
    step: int
    num_tensors: int
    note: str | None = None


@dataclass(frozen=True)
class _Weights:
    """A snapshot's tensors under the names that the model's state_dict has.

    Attributes
    ----------
    sources : mapping
        Role and stored name, by name.
    """

    snapshot: Snapshot
    sources: Mapping[str, tuple[str, str]]

    def num_bytes(self, name: str) -> int:
        stored = self.snapshot.arrays[self.sources[name]]
        return stored.num_elements * _safetensors_dtype(name, stored.dtype)[1]

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield names and arrays, in order, with memory for `_BATCH_BYTES`."""
        for batch in self._batches(names):
            found = {}
            for role in (PARAMETER, BUFFER):
                stored = {self.sources[n][1] for n in batch if self.sources[n][0] == role}
                for name, array in self.snapshot.read(role, stored).items():
                    found[(role, name)] = array
            for name in batch:
                yield name, found[self.sources[name]]

    def _batches(self, names: Sequence[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for name in names:
            if batch and size + self.num_bytes(name) > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(name)
            size += self.num_bytes(name)
        if batch:
            yield batch


def model_facts(state_dict_names: Sequence[str], tied_names: Mapping[str, str]) -> dict[str, Any]:
    """Return what a run must remember of its model so that its weights can be exported.

    Parameters
    ----------
    state_dict_names
        The keys of the model's own state_dict.
    tied_names
        First name by further name of each tied parameter.
    """
    return {STATE_DICT_NAMES: list(state_dict_names), TIED_NAMES: dict(tied_names)}


def export(
    url: str,
    to: str | Path,
    *,
    format: Format,
    step: int | None = None,
    config: str | Path | None = None,
    on_tensor: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the weights of a step to a file, or, for "hf", to a folder.

    It appears complete or not at all. safetensors files are written with memory for a few
    tensors; torch's need memory for all.

    Parameters
    ----------
    step
        Its snapshot must exist; the newest by default.
    config
        For "hf": a folder with the model's ``config.json``; its files are copied, weights left out.

    Raises
    ------
    NotFound
        If there is no run, or no such snapshot.
    DamagedData
        If the snapshot is damaged.
    SettingsInvalid
        If `to` exists, or `config` is missing or holds no ``config.json``.
    """
    store = open_store(url)
    weights, note = _weights(store, step)
    target = Path(to)
    if target.exists():
        raise SettingsInvalid(f"{target} exists already; export doesn't overwrite: name another.")
    files = _config_files(config) if format == "hf" else []
    with _complete_or_nothing(target) as unfinished:
        if format == "hf":
            unfinished.mkdir()
            for file in files:
                shutil.copy2(file, unfinished / file.name)
            _write_safetensors(unfinished / "model.safetensors", weights, on_tensor)
        elif format == "safetensors":
            _write_safetensors(unfinished, weights, on_tensor)
        else:
            _write_torch(unfinished, weights, on_tensor)
    return Exported(target, weights.snapshot.step, len(weights.sources), note)


def num_tensors(url: str, step: int | None) -> int:
    """Return how many tensors `export` will write."""
    return len(_weights(open_store(url), step)[0].sources)


def _weights(store: Store, step: int | None) -> tuple[_Weights, str | None]:
    run = RunDirectory(store)
    if not run.exists():
        raise NotFound(f"{store} holds no run of dagflow: there is no run.json.")
    steps = list_snapshots(store)
    if step is None:
        if not steps:
            raise NotFound(f"{store} has no complete snapshot.")
        step = steps[-1]
    snapshot = Snapshot.open(store, step)
    stored = {name: (role, name) for role in (PARAMETER, BUFFER) for name in snapshot.names(role)}
    facts = run.facts()
    with sound(f"run.json in {store!r} is damaged"):
        fields.items(facts.get(STATE_DICT_NAMES, []), STATE_DICT_NAMES)
        fields.members(facts.get(TIED_NAMES, {}), TIED_NAMES)
        for name in (*facts.get(STATE_DICT_NAMES, []), *facts.get(TIED_NAMES, {}).values()):
            fields.text(name, "a name of the state dict")
    if STATE_DICT_NAMES not in facts:
        note = (
            "An older dagflow made this run, and it doesn't say which names are tied: every "
            "parameter and buffer was exported under its first name."
        )
        return _Weights(snapshot, stored), note
    stored |= {
        alias: stored[first]
        for alias, first in facts.get(TIED_NAMES, {}).items()
        if first in stored
    }
    missing = [name for name in facts[STATE_DICT_NAMES] if name not in stored]
    if missing:
        raise NotFound(
            f"The snapshot of step {step} in {store} lacks {len(missing)} of the model's "
            f"tensors, {missing[0]!r} the first: is it of another model? `dagflow runs verify` says."
        )
    return _Weights(snapshot, {name: stored[name] for name in facts[STATE_DICT_NAMES]}), None


@contextmanager
def _complete_or_nothing(target: Path) -> Iterator[Path]:
    """Yield a path beside the target; what was written there gets the target's name at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def _config_files(config: str | Path | None) -> list[Path]:
    if config is None:
        raise SettingsInvalid(
            "A Hugging Face folder needs the model's configuration: pass --config FOLDER, one that "
            "holds its config.json (and tokenizer)."
        )
    folder = Path(config)
    if not (folder / "config.json").is_file():
        raise SettingsInvalid(f"There is no config.json in {folder}, which --config names.")
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json")
    ]


def _write_torch(path: Path, weights: _Weights, on_tensor: Callable[[str], None]) -> None:
    # By stored name first, so that tied names are one tensor in the file as well.
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    for role in (PARAMETER, BUFFER):
        names = {name for found, name in weights.sources.values() if found == role}
        for name, tensor in read_tensors(weights.snapshot, role, names).items():
            tensors[(role, name)] = tensor
    for name in weights.sources:
        on_tensor(name)
    torch.save({name: tensors[source] for name, source in weights.sources.items()}, path)


def _write_safetensors(path: Path, weights: _Weights, on_tensor: Callable[[str], None]) -> None:
    """Write a safetensors file tensor by tensor; the library's own function wants all at once.

    References
    ----------
    The format: 8 bytes with the header's length, a JSON header, the tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest elements first, so that each tensor is aligned.
    names = sorted(weights.sources, key=lambda name: (-_item_bytes(weights, name), name))
    for name in names:
        stored = weights.snapshot.arrays[weights.sources[name]]
        start, end = end, end + weights.num_bytes(name)
        code, _ = _safetensors_dtype(name, stored.dtype)
        header[name] = {"dtype": code, "shape": list(stored.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, array in weights.read(names):
            file.write(array.tobytes())
            on_tensor(name)
        file.flush()
        os.fsync(file.fileno())


def _item_bytes(weights: _Weights, name: str) -> int:
    return _safetensors_dtype(name, weights.snapshot.arrays[weights.sources[name]].dtype)[1]


def _safetensors_dtype(name: str, dtype: str) -> tuple[str, int]:
    if dtype not in _SAFETENSORS_DTYPES:
        raise SettingsInvalid(
            f"{name!r} is {dtype}, which safetensors files can't hold; use --format torch."
        )
    return _SAFETENSORS_DTYPES[dtype]
