"""`dagflow.load`: a language model comes into a store, one layer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dagflow.arguments import open_store, shown
from dagflow.errors import SettingsInvalid
from dagflow.graph.dag import Buffer, OperatorDag, Parameter
from dagflow.graph.decoder import capture_decoder
from dagflow.graph.quantisation import QUANTISERS, Quantiser, quantised, scale_name
from dagflow.models.checking import check_capture
from dagflow.models.defaults import end_tokens, not_applied, read_generation
from dagflow.models.groups import groups_of, write_groups
from dagflow.models.model import Model, ModelRef
from dagflow.models.source import Source, of_folder, of_module
from dagflow.models.tokenizing import open_tokenizer, tokenizer_files
from dagflow_storage import Store
from dagflow_tasks.program.nodes import dtype_of

FORMAT, FORMAT_VERSION = "dagflow-model", 1
# What is computed with: next to quantised weights, what torch's kernels for them are fast in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16} | dict.fromkeys(QUANTISERS, torch.bfloat16)
# Of config.json: they say where a model was, and change nothing that it computes.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def load(
    source: str | Path | torch.nn.Module,
    *,
    store: str | Path = "models",
    weights: str = "fp32",
    check: bool = True,
) -> Model:
    """Bring a causal language model into a store, from where workers read their stages' weights.

    Nobody holds the whole model: it is captured without weights, and these go through one group of
    tensors at a time. Before anything is written, what was captured is compared with the model as
    transformers runs it, over a prefill and token by token (see `dagflow.models.checking`).

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
    check : bool
        False leaves the comparison out.

    Raises
    ------
    SettingsInvalid
        If the folder isn't complete, naming what is missing, or nothing in it can be quantised.
    CaptureFailed
    ResultsDiffer
        If what was captured computes something else than the model by itself.
    """
    if weights not in DTYPES:
        raise SettingsInvalid(f"weights is one of {', '.join(DTYPES)}; found {weights!r}.")
    if not isinstance(source, (torch.nn.Module, str, Path)):
        raise SettingsInvalid(
            f"A model is a Hugging Face folder or a model of transformers; found {shown(source)}."
        )
    place = open_store(store)
    place.probe()
    if isinstance(source, torch.nn.Module):
        found = of_module(source)
    else:
        found = of_folder(Path(source), DTYPES[weights])
    return _bring_in(place, found, weights, check)


def _bring_in(store: Store, source: Source, weights: str, check: bool) -> Model:
    generation = read_generation(source.model, source.folder)
    files = tokenizer_files(source.folder) if source.folder is not None else {}
    contents = {name: file.read_bytes() for name, file in files.items()}
    tokenizer = open_tokenizer(source.name, contents) if contents else None
    captured = capture_decoder(_outline(source.model, DTYPES[weights]))
    conversion = _Conversion(source, captured, QUANTISERS.get(weights))
    checked = None
    if check:
        checked = check_capture(source, captured, conversion.original, DTYPES[weights])
    text_config = source.model.config.get_text_config(decoder=True)
    description = {
        **_describe(source.model),
        "weights": weights,
        "groups": write_groups(store, groups_of(conversion.names), conversion.read),
        "generation": generation,
        "end_tokens": end_tokens(generation, text_config, tokenizer),
        "tokenizer_files": list(files),
        "notes": [*source.notes, *not_applied(generation)],
        "check": checked,
    }
    dag = conversion.dag.to_json().encode()
    name = f"{source.name}-{weights}-{_fingerprint(description, dag, contents)}"
    store.write_bytes(f"models/{name}/decoder.json", dag)
    for file, data in contents.items():
        store.write_bytes(f"models/{name}/tokenizer/{file}", data)
    store.write_bytes(f"models/{name}/model.json", json.dumps(description).encode())
    model = Model(ModelRef(store, name), description)
    if tokenizer is not None:
        vars(model)["tokenizer"] = tokenizer  # large ones take a second to open
    return model


def _fingerprint(description: Mapping[str, Any], dag: bytes, tokenizer: Mapping[str, bytes]) -> str:
    """Return a hash of all that decides a model's answers."""
    digest = blake2b(digest_size=4)
    config = {n: v for n, v in description["config"].items() if n not in _NOT_OF_THE_MODEL}
    # A group's path begins with a hash of what it holds, and ends at random.
    groups = [group["path"].rpartition("-")[0] for group in description["groups"]]
    for part in (config, description["generation"], groups, _computed(dag)):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for file, data in sorted(tokenizer.items()):
        digest.update(f"{file} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _computed(dag: bytes) -> Any:
    """Return an operator DAG without where its operators are written, and by which torch."""
    body = json.loads(dag)
    del body["torch"]
    for node in body["nodes"]:
        del node["info"]
    return body


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
    source : Source
    captured : OperatorDag
        In the dtype that is computed with.
    quantiser : Quantiser or None

    Attributes
    ----------
    dag : OperatorDag
        The captured one, reading quantised weights.
    """

    def __init__(self, source: Source, captured: OperatorDag, quantiser: Quantiser | None) -> None:
        self.dag = captured
        self._source = source
        stored = source.model.state_dict(keep_vars=True).keys()
        # Buffers that a model computes when it is built; no file holds them.
        self._computed = {n: b for n, b in source.model.named_buffers() if n not in stored}
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
            return self._quantiser.quantise(self.original(weight))[which]
        return self.original(name).to(self._dtypes[name])

    def original(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer as the model has it."""
        value = self._computed[name] if name in self._computed else self._source.read(name)
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
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "max_tokens": getattr(text_config, "max_position_embeddings", None)
        or getattr(text_config, "n_positions", None),
    }
