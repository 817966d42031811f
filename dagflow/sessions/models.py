"""Language models in the store: weights by content, a captured decoder, a tokenizer.

::

    weights/3f9a....json             where a group of tensors lies (a layer's, mostly)
    weights/3f9a....-<random>/       its arrays
    models/<name>/model.json         written last: configuration and groups
    models/<name>/decoder.json       the operator DAG
    models/<name>/tokenizer/...      as they were found

Groups are named by a hash of what they hold: importing the same weights again writes nothing, and
fine-tunes share what they haven't changed.
"""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.graph.dag import OperatorDag
from dagflow.graph.decoder import capture_decoder, without_head
from dagflow.graph.quantisation import QUANTISERS, quantised, scale_name
from dagflow.run.weights import WeightFiles, empty_weights
from dagflow_storage import ArraySpec, NotFound, Store, StoredArray, read_arrays, write_arrays
from dagflow_tasks.operators import dtype_of
from dagflow_tasks.program import StageProgram
from dagflow_tasks.state import from_array, to_array

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


@dataclass(frozen=True)
class ModelRef:
    """A model in a store."""

    store: Store
    name: str


@dataclass(frozen=True)
class Model:
    """A language model that can be run on a swarm; `load` returns one.

    Attributes
    ----------
    ref : ModelRef
    description : mapping
        What the store says of it.
    has_head : bool
        Without its head a model returns hidden states where it would return logits.
    """

    ref: ModelRef
    description: Mapping[str, Any]
    has_head: bool = True

    @classmethod
    def open(cls, store: Store, name: str) -> Model:
        """Return a model that was loaded before.

        Raises
        ------
        NotFound
            If the store has none of this name.
        """
        text = store.read_bytes(f"models/{name}/model.json")
        return cls(ModelRef(store, name), json.loads(text))

    @cached_property
    def dag(self) -> OperatorDag:
        text = self.ref.store.read_bytes(f"models/{self.ref.name}/decoder.json")
        dag = OperatorDag.from_json(text.decode("utf-8"))
        return dag if self.has_head else without_head(dag)

    def without_head(self) -> Model:
        """Return the same model, with hidden states (after the last norm) for results."""
        return replace(self, has_head=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration, as transformers has it."""
        found: Mapping[str, Any] = self.description["config"]
        return found

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model was made for."""
        found = self.description["max_tokens"]
        return int(found) if found else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.description["end_tokens"])

    @property
    def has_tokenizer(self) -> bool:
        return bool(self._tokenizer_files)

    @cached_property
    def _tokenizer_files(self) -> list[str]:
        return self.ref.store.list(f"models/{self.ref.name}/tokenizer")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers.

        Raises
        ------
        SettingsInvalid
            If the model has none.
        """
        if not self.has_tokenizer:
            raise SettingsInvalid(
                f"The model {self.ref.name!r} has no tokenizer: its folder had none. Pass prompts as "
                "token ids, or load it from a folder with tokenizer.json."
            )
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as temporary:
            for name in self._tokenizer_files:
                data = self.ref.store.read_bytes(f"models/{self.ref.name}/tokenizer/{name}")
                Path(temporary, name).write_bytes(data)
            return AutoTokenizer.from_pretrained(temporary)

    def encode(self, text: str | Sequence[int] | torch.Tensor) -> tuple[int, ...]:
        """Return a text's token ids; ids themselves are checked.

        Raises
        ------
        BatchInvalid
            If an id isn't in the vocabulary.
        """
        if isinstance(text, str):
            return tuple(self.tokenizer(text)["input_ids"]) if text else ()
        tokens = tuple(int(token) for token in text)
        wrong = self.first_unknown(tokens)
        if wrong is not None:
            raise BatchInvalid(
                f"The prompt holds token {wrong}; the vocabulary has {self.config['vocab_size']}."
            )
        return tokens

    def first_unknown(self, tokens: Iterable[int]) -> int | None:
        """Return the first token that isn't in the vocabulary."""
        size = int(self.config.get("vocab_size") or 0)
        return next((token for token in tokens if not 0 <= token < (size or token + 1)), None)


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
        model, read, folder = source, dict(source.state_dict(keep_vars=True)).__getitem__, None
        name = type(source).__name__.lower()
    else:
        folder = Path(source)
        model, read = _from_folder(folder)
        name = folder.resolve().name
    return _bring_in(place, name, model, read, folder, weights)


def _from_folder(folder: Path) -> tuple[torch.nn.Module, Callable[[str], torch.Tensor]]:
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
    files = WeightFiles(folder)
    wanted = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if wanted - files.names() - tied:
        # Stored in another layout than the model has: let transformers convert it.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, dict(model.state_dict(keep_vars=True)).__getitem__
    kept = {n: t for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta}
    return model, lambda name: kept[name] if name in kept else files.read(name)


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


def _bring_in(
    store: Store,
    name: str,
    model: torch.nn.Module,
    read: Callable[[str], torch.Tensor],
    folder: Path | None,
    weights: str,
) -> Model:
    dtype = DTYPES[weights]
    before = next(model.parameters()).dtype
    model.to(dtype)
    try:
        dag = capture_decoder(model)
    finally:
        model.to(before)
    full = {p.name: tuple(p.shape) for p in dag.parameters}
    full |= {b.name: tuple(b.shape) for b in dag.buffers}
    quantiser = QUANTISERS.get(weights)
    in_few_bits: dict[str, tuple[str, int]] = {}
    if quantiser is not None:
        dag, chosen = quantised(dag, quantiser)
        in_few_bits = {name: (name, 0) for name in chosen}
        in_few_bits |= {scale_name(name): (name, 1) for name in chosen}
    tensors: dict[str, tuple[int, ...]] = {p.name: tuple(p.shape) for p in dag.parameters}
    tensors |= {b.name: tuple(b.shape) for b in dag.buffers}
    dtypes = {p.name: p.dtype for p in dag.parameters} | {b.name: b.dtype for b in dag.buffers}
    buffers = dict(model.named_buffers())

    def original(tensor: str) -> torch.Tensor:
        value = buffers[tensor] if tensor in buffers else read(tensor)
        if tuple(value.shape) != full[tensor]:
            raise SettingsInvalid(
                f"{folder or name} has {tensor!r} with shape {list(value.shape)}; the model wants "
                f"{list(full[tensor])}."
            )
        return value.detach()

    def found(tensor: str) -> torch.Tensor:
        if quantiser is not None and tensor in in_few_bits:
            source, which = in_few_bits[tensor]
            return quantiser.quantise(original(source))[which]
        return original(tensor).to(dtype_of(dtypes[tensor]))

    groups = [_write_group(store, group, found) for group in _groups(tensors)]
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = end if end is not None else text_config.eos_token_id
    fingerprint = blake2b(json.dumps(groups).encode(), digest_size=4).hexdigest()
    name = f"{name}-{weights}-{fingerprint}"
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "max_tokens": getattr(text_config, "max_position_embeddings", None)
        or getattr(text_config, "n_positions", None),
        "end_tokens": [] if end is None else list(end) if isinstance(end, list) else [end],
        "groups": groups,
    }
    store.write_bytes(f"models/{name}/decoder.json", dag.to_json().encode())
    if folder is not None:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name.startswith(_TOKENIZER_FILES):
                store.write_bytes(f"models/{name}/tokenizer/{file.name}", file.read_bytes())
    store.write_bytes(f"models/{name}/model.json", json.dumps(description).encode())
    return Model(ModelRef(store, name), description)


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Group tensors by layer: workers read whole layers, and fine-tunes change some of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        found.setdefault(match[0] if match else "", []).append(name)
    return list(found.values())


def _write_group(
    store: Store, names: Sequence[str], read: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    """Write tensors unless the store has them already; return where they are."""
    digest = blake2b(digest_size=16)
    specs = []
    for name in names:
        tensor = read(name)
        spec = ArraySpec(
            name, "weight", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        )
        specs.append(spec)
        digest.update(f"{name} {spec.dtype} {spec.shape}".encode())
        digest.update(to_array(tensor).reshape(-1).view("uint8").data)
    index = f"weights/{digest.hexdigest()}.json"
    try:
        known: dict[str, Any] = json.loads(store.read_bytes(index))
        return known
    except NotFound:
        pass
    path = f"weights/{digest.hexdigest()}-{uuid.uuid4().hex[:8]}"
    arrays = write_arrays(store, path, specs, lambda name: to_array(read(name)))
    store.flush(path)
    group = {"path": path, "arrays": [array.to_json() for array in arrays]}
    store.write_bytes(index, json.dumps(group).encode())
    return group


def read_weights(
    ref: ModelRef, program: StageProgram, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read what a stage uses, its own or not: parameters and buffers by name."""
    wanted = {use.parameter for use in program.parameters} | {u.buffer for u in program.buffers}
    found: dict[str, torch.Tensor] = {}
    for group in Model.open(ref.store, ref.name).description["groups"]:
        arrays = [StoredArray.from_json(a) for a in group["arrays"]]
        here = [array for array in arrays if array.name in wanted]
        if here:
            dtypes = {array.name: array.dtype for array in here}
            for name, array in read_arrays(ref.store, group["path"], here).items():
                found[name] = from_array(array, dtypes[name]).to(device)
    return found
