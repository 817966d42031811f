"""`dagflow.load`: a language model comes into a store, one layer at a time."""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import torch

from dagflow.errors import SettingsInvalid
from dagflow.graph.dag import Buffer, OperatorDag, Parameter
from dagflow.graph.decoder import capture_decoder
from dagflow.graph.quantisation import QUANTISERS, Quantiser, quantised, scale_name
from dagflow.run.weights import WeightFiles, empty_weights
from dagflow.sessions.models import Model, ModelRef
from dagflow_storage import ArraySpec, NotFound, Store, write_arrays
from dagflow_tasks.operators import dtype_of
from dagflow_tasks.state import to_array

FORMAT, FORMAT_VERSION = "dagflow-model", 1
# What is computed with: next to quantised weights, what torch's kernels for them are fast in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16} | dict.fromkeys(QUANTISERS, torch.bfloat16)
_LAYER = re.compile(r"^.*?\.\d+(?=\.)")
_TOKENIZER_FILES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
)


def load(
    source: str | Path | torch.nn.Module, *, store: str | Path = "models", weights: str = "fp32"
) -> Model:
    """Bring a causal language model into a store, from where workers read their stages' weights.

    Nobody holds the whole model: it is captured without weights, and these go through one group of
    tensors at a time.

    Parameters
    ----------
    source
        A Hugging Face folder (``config.json``, ``*.safetensors``), or a model of transformers.
    store
        Folder or fsspec URL.
    weights : {"fp32", "bf16", "int8", "int4"}
        In which precision they are stored and computed with. Quantised, the weights of the layers'
        linear operators take a byte each (a scale for every output channel), or half of one (a scale
        for every 32 inputs), in the store, on the wire and in workers' memory; everything else is
        bfloat16.

    Raises
    ------
    SettingsInvalid
        If the folder isn't complete, naming what is missing, or nothing in it can be quantised.
    CaptureFailed
    """
    if weights not in DTYPES:
        raise SettingsInvalid(f"weights is one of {', '.join(DTYPES)}; found {weights!r}.")
    place = Store(str(store))
    place.probe()
    if isinstance(source, torch.nn.Module):
        read = dict(source.state_dict(keep_vars=True)).__getitem__
        return _bring_in(place, _Source(type(source).__name__.lower(), source, read), weights)
    return _bring_in(place, _from_folder(Path(source)), weights)


@dataclass(frozen=True)
class _Source:
    """Where a model comes from; nothing of it is changed.

    Attributes
    ----------
    model : torch.nn.Module
        Its parameters may be on the meta device.
    read : callable
        Returns a parameter's, or a stored buffer's, values.
    """

    name: str
    model: torch.nn.Module
    read: Callable[[str], torch.Tensor]
    folder: Path | None = None


def _from_folder(folder: Path) -> _Source:
    if not (folder / "config.json").is_file():
        raise SettingsInvalid(
            f"{folder} is no model folder: it has no config.json. Expected a folder as transformers' "
            "save_pretrained writes it."
        )
    _check_shards(folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SettingsInvalid(f"{folder / 'config.json'} can't be read: {error}") from error
    with empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    name = folder.resolve().name
    files = WeightFiles(folder)
    wanted = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if wanted - files.names() - tied:
        # Stored in another layout than the model has: let transformers convert it.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return _Source(name, model, dict(model.state_dict(keep_vars=True)).__getitem__, folder)
    kept = {n: t for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta}
    return _Source(name, model, lambda n: kept[n] if n in kept else files.read(n), folder)


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise SettingsInvalid(
            f"{folder} lacks {len(missing)} of its {len(wanted)} files: {', '.join(missing[:5])}. "
            "Fetch them, and load again: what is stored already isn't stored twice."
        )


def _bring_in(store: Store, source: _Source, weights: str) -> Model:
    captured = capture_decoder(_outline(source.model, DTYPES[weights]))
    conversion = _Conversion(source, captured, QUANTISERS.get(weights))
    groups = _write_groups(store, _groups(conversion.names), conversion.read)
    fingerprint = blake2b(json.dumps(groups).encode(), digest_size=4).hexdigest()
    name = f"{source.name}-{weights}-{fingerprint}"
    description = {**_describe(source.model), "weights": weights, "groups": groups}
    store.write_bytes(f"models/{name}/decoder.json", conversion.dag.to_json().encode())
    for file in sorted(source.folder.iterdir()) if source.folder is not None else ():
        if file.is_file() and file.name.startswith(_TOKENIZER_FILES):
            store.write_bytes(f"models/{name}/tokenizer/{file.name}", file.read_bytes())
    store.write_bytes(f"models/{name}/model.json", json.dumps(description).encode())
    return Model(ModelRef(store, name), description)


def _outline(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return a copy whose parameters take no memory and have a dtype; ties are kept.

    Stored buffers get the dtype as well. Those that a model computes when it is built (rotary
    frequencies) keep theirs, as they do where transformers loads in half precision: in bfloat16 they
    would turn token 1000 by a radian or two too far.
    """

    def wanted(tensor: torch.Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    kept = set(model.state_dict(keep_vars=True))
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, dtype=wanted(parameter), device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if name in kept:
            memo[id(buffer)] = buffer.to(wanted(buffer), copy=True)
    return copy.deepcopy(model, memo)


class _Conversion:
    """What is stored of a model, and how it follows from the original.

    Parameters
    ----------
    source : _Source
    captured : OperatorDag
        In the dtype that is computed with.
    quantiser : Quantiser or None

    Attributes
    ----------
    dag : OperatorDag
        The captured one, reading quantised weights.
    """

    def __init__(self, source: _Source, captured: OperatorDag, quantiser: Quantiser | None) -> None:
        self.dag = captured
        self._source = source
        self._buffers = dict(source.model.named_buffers())
        self._shapes = {t.name: tuple(t.shape) for t in _tensors(captured)}
        self._quantiser = quantiser
        self._quantised: dict[str, tuple[str, int]] = {}
        if quantiser is not None:
            self.dag, chosen = quantised(captured, quantiser)
            self._quantised = {name: (name, 0) for name in chosen}
            self._quantised |= {scale_name(name): (name, 1) for name in chosen}
        self._dtypes = {t.name: dtype_of(t.dtype) for t in _tensors(self.dag)}

    @property
    def names(self) -> list[str]:
        """All that is stored."""
        return list(self._dtypes)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored."""
        if self._quantiser is not None and name in self._quantised:
            weight, which = self._quantised[name]
            return self._quantiser.quantise(self._original(weight))[which]
        return self._original(name).to(self._dtypes[name])

    def _original(self, name: str) -> torch.Tensor:
        value = self._buffers[name] if name in self._buffers else self._source.read(name)
        if tuple(value.shape) != self._shapes[name]:
            raise SettingsInvalid(
                f"{self._source.folder or self._source.name} has {name!r} with shape "
                f"{list(value.shape)}; the model wants {list(self._shapes[name])}."
            )
        return value.detach()


def _tensors(dag: OperatorDag) -> list[Parameter | Buffer]:
    return [*dag.parameters, *dag.buffers]


def _describe(model: Any) -> dict[str, Any]:
    """Return what is to be known of a model besides its weights."""
    text_config = model.config.get_text_config(decoder=True)
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = end if end is not None else text_config.eos_token_id
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "max_tokens": getattr(text_config, "max_position_embeddings", None)
        or getattr(text_config, "n_positions", None),
        "end_tokens": [] if end is None else list(end) if isinstance(end, list) else [end],
    }


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Group tensors by layer: workers read whole layers, and fine-tunes change some of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        found.setdefault(match[0] if match else "", []).append(name)
    return list(found.values())


def _write_groups(
    store: Store, groups: Sequence[Sequence[str]], read: Callable[[str], torch.Tensor]
) -> list[dict[str, Any]]:
    """Write groups of tensors unless the store has them; return where they are.

    Two at a time: while one is hashed, or waits for the disk to sync, the other is written.
    """
    with ThreadPoolExecutor(2, "dagflow-import") as pool:
        return list(pool.map(lambda names: _write_group(store, names, read), groups))


def _write_group(
    store: Store, names: Sequence[str], read: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    digest, specs = _contents(names, read)
    index = f"weights/{digest}.json"
    try:
        known: dict[str, Any] = json.loads(store.read_bytes(index))
        return known
    except NotFound:
        pass
    path = f"weights/{digest}-{uuid.uuid4().hex[:8]}"
    arrays = write_arrays(store, path, specs, lambda name: to_array(read(name)))
    store.flush(path)
    group = {"path": path, "arrays": [array.to_json() for array in arrays]}
    store.write_bytes(index, json.dumps(group).encode())
    return group


def _contents(
    names: Sequence[str], read: Callable[[str], torch.Tensor]
) -> tuple[str, list[ArraySpec]]:
    """Return a hash of tensors, and what they are."""
    digest = sha256()  # which processors have instructions for, and which no other hash beats then
    specs = []
    for name in names:
        tensor = read(name)
        spec = ArraySpec(
            name, "weight", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        )
        specs.append(spec)
        digest.update(f"{name} {spec.dtype} {spec.shape}".encode())
        digest.update(to_array(tensor).reshape(-1).view("uint8").data)
    return digest.hexdigest()[:32], specs
