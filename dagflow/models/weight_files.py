"""Weights in safetensors files, and models that are built before they have any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dagflow.errors import ProgramInvalid, SettingsInvalid
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import load_json
from dagflow_tasks.program.nodes import dtype_of


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
