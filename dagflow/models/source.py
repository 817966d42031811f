"""Where a model that is loaded comes from: a folder as transformers writes it, or a module.

Of a folder nothing is made up: a tensor that the model wants and no file has is an error by name,
where transformers would draw random numbers for it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dagflow.errors import SettingsInvalid
from dagflow.models.defaults import CONFIGURATION_LIMITS
from dagflow.models.foreign_code import reason, refuse_kernels
from dagflow.models.weight_files import WeightFiles, empty_weights
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import load_json

_INDEX = "model.safetensors.index.json"
_MOST_NAMES = 5
_LAYERS = re.compile(r"(num|n)(_hidden|_encoder|_decoder)?_layers?|(encoder|decoder)_layers")
_MOST_SIZE = 2**48
_FEW = 1000  # layers, of models whose layers share their tensors


@dataclass(frozen=True)
class Source:
    """A model to be loaded; nothing of it is changed.

    Attributes
    ----------
    model : torch.nn.Module
        Its parameters may be on the meta device.
    read : callable
        Returns a parameter's, or a stored buffer's, values by its name in the model.
    eager : callable
        Returns the model with its weights in memory, in float32, as transformers runs it.
    notes : tuple of str
        What somebody who compares with the files may wonder about.
    """

    name: str
    model: Any
    read: Callable[[str], torch.Tensor]
    eager: Callable[[], Any]
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def of_module(model: torch.nn.Module) -> Source:
    """Return a model of transformers that is in memory.

    Raises
    ------
    SettingsInvalid
        If it has no weights.
    """
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise SettingsInvalid(
            f"{len(empty)} of the model's tensors are on the meta device and have no value, "
            f"{empty[0]!r} the first: load the folder that holds them."
        )
    read = dict(model.state_dict(keep_vars=True)).__getitem__
    return Source(type(model).__name__.lower(), model, read, lambda: _in_float32(model))


def of_folder(folder: Path, dtype: torch.dtype) -> Source:
    """Return the model that a folder holds, built in a dtype and without memory for its weights.

    Raises
    ------
    SettingsInvalid
        If the folder isn't complete, naming what is missing, or holds no model that can be served.
    """
    if not (folder / "config.json").is_file():
        raise SettingsInvalid(
            f"{folder} is no model folder: it has no config.json. Expected a folder as transformers' "
            "save_pretrained writes it."
        )
    files = WeightFiles(folder)
    config = _config(folder, len(files.names()))
    model = _empty_model(folder, config, dtype)
    state = dict(model.state_dict(keep_vars=True))
    notes = _settle_ties(model, files, folder)
    stored_as = _stored_as(model, files.names())
    if stored_as.keys() != state.keys() or _is_converted(model, files.names()):
        return _converted(folder)
    unknown = _leftovers(model, files.names() - state.keys())
    if unknown:
        notes.append(_tell_leftovers(folder, model, unknown))
    return Source(
        folder.resolve().name,
        model,
        lambda name: files.read(stored_as[name]),
        lambda: _pretrained(folder)[0],
        folder,
        tuple(notes),
    )


def _in_float32(model: torch.nn.Module) -> torch.nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    floating = [t for t in tensors if t.is_floating_point()]
    if all(t.dtype == torch.float32 for t in floating) and all(t.is_cpu for t in tensors):
        return model
    return copy.deepcopy(model).cpu().float()


def _config(folder: Path, num_tensors: int) -> Any:
    from transformers import AutoConfig

    refuse_kernels(folder)
    try:
        said = load_json(folder / "config.json", CONFIGURATION_LIMITS, finite=False)
        _check_sizes(fields.members(said, "it"), num_tensors)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever is in the file, and whatever transformers says of it
        raise SettingsInvalid(
            f"{folder / 'config.json'} can't be read: {reason(folder, error)}."
        ) from error


def _check_sizes(config: Mapping[str, Any], num_tensors: int) -> None:
    """Raise ValueError for a model that nobody could build: its layers are made one by one."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, num_tensors)
        elif type(value) is int and abs(value) > _MOST_SIZE:
            raise ValueError(f"{key} is {fields.shown(value)}, more than any model has")
        elif type(value) is int and _LAYERS.fullmatch(key) and value > max(num_tensors, _FEW):
            raise ValueError(f"{key} is {value}, and the files hold {num_tensors} tensors")


def _empty_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with empty_weights():
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # as for the configuration
        raise SettingsInvalid(
            f"{folder} holds no causal language model that transformers can build: "
            f"{reason(folder, error)}."
        ) from error


def _stored_as(model: Any, names: set[str]) -> dict[str, str]:
    """Return under which name each of the model's tensors is in the files, where it is.

    A tied tensor has several names, and files mostly hold one of them.
    """
    state = model.state_dict(keep_vars=True)
    found = {id(tensor): name for name, tensor in reversed(state.items()) if name in names}
    return {
        name: name if name in names else found[id(tensor)]
        for name, tensor in state.items()
        if name in names or id(tensor) in found
    }


def _settle_ties(model: Any, files: WeightFiles, folder: Path) -> list[str]:
    """Tie what transformers ties: not what the files hold twice with different values.

    Returns what is to be known of it.
    """
    names, ties = files.names(), dict(getattr(model, "all_tied_weights_keys", None) or {})
    notes = []
    for target, origin in ties.items():
        if {target, origin} <= names and not files.agree(target, origin):
            parent, _, last = target.rpartition(".")
            module = model.get_submodule(parent)
            empty = torch.empty_like(getattr(module, last))
            setattr(module, last, torch.nn.Parameter(empty))
            del model.all_tied_weights_keys[target]
            notes.append(_tell_untied(folder, target, origin))
    if not ties:
        notes += _equal_but_untied(model, files)
    return notes


def _tell_untied(folder: Path, target: str, origin: str) -> str:
    note = (
        f"{folder / 'config.json'} ties {target} to {origin}, and the files hold both, with "
        "different values: both are used as they are, as transformers does. Set "
        "tie_word_embeddings to false there if that is right, or take the wrong one out of the files."
    )
    warnings.warn(note, stacklevel=2)
    return note


def _equal_but_untied(model: Any, files: WeightFiles) -> list[str]:
    """Note a head that equals the embeddings, and isn't tied to them."""
    modules = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(getattr(end, "weight", None) is None for end in ends):
        return []
    names = [f"{modules[id(end)]}.weight" for end in ends]
    if ends[0].weight is ends[1].weight or not set(names) <= files.names():
        return []
    if not files.agree(*names):
        return []
    return [
        f"{names[0]} and {names[1]} are equal, and config.json doesn't tie them: both are stored, as "
        "transformers keeps both."
    ]


def _is_converted(model: Any, names: set[str]) -> bool:
    """Tell whether transformers renames, joins or splits tensors of these names as it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    return getattr(model.config, "quantization_config", None) is not None or any(
        transform.rename_source_key(name) != (name, None)
        for transform in transforms
        for name in names
    )


def _leftovers(model: Any, unknown: set[str]) -> list[str]:
    """Return tensors that the model has no place for, but those that it knows to be of no use."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")  # every layer had its own once
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return sorted(n for n in unknown if not any(re.search(p, n) for p in patterns))


def _tell_leftovers(folder: Path, model: Any, unknown: list[str]) -> str:
    note = (
        f"{folder} holds {len(unknown)} tensors that {type(model).__name__} has no place for, and that "
        f"are left out, as transformers does: {_some(unknown)}. If they matter, config.json is that of "
        "another model."
    )
    warnings.warn(note, stacklevel=2)
    return note


def _converted(folder: Path) -> Source:
    """Return a model whose files have another layout: transformers converts them, in memory."""
    model, info = _pretrained(folder)
    _check_loaded(folder, model, info)
    notes = []
    unknown = sorted(info["unexpected_keys"])
    if unknown:
        notes.append(_tell_leftovers(folder, model, unknown))
    if getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if None not in ends and ends[0].weight is not ends[1].weight:
            modules = {id(module): name for name, module in model.named_modules()}
            first, last = (f"{modules[id(end)]}.weight" for end in ends)
            notes.append(_tell_untied(folder, last, first))
    state = dict(model.state_dict(keep_vars=True))
    return Source(
        folder.resolve().name, model, state.__getitem__, lambda: model, folder, tuple(notes)
    )


def _check_loaded(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that transformers had to make up in part, or keeps in a form of its own."""
    made_up = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if made_up:
        raise SettingsInvalid(
            f"{folder} lacks {len(made_up)} of the tensors that {type(model).__name__} wants: "
            f"{_some(made_up)}. transformers would go on with random numbers; fetch the files again, or "
            "the config.json that belongs to them."
        )
    for name, tensor in model.named_parameters():
        if (
            not tensor.is_floating_point()
            or tensor.dtype.itemsize < 2
            or type(tensor.data) is not (torch.Tensor)
        ):
            raise SettingsInvalid(
                f"{folder} is quantised: {name!r} is {tensor.dtype}, and can't be captured. Load it "
                "with transformers, dequantise it (model.dequantize()), save_pretrained that, and load "
                "it here with weights='int8' or 'int4'."
            )


def _pretrained(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """Return the model as transformers loads it in float32, and what that says of missing tensors."""
    from transformers import AutoModelForCausalLM

    config = _config(folder, len(WeightFiles(folder).names()))
    kind: Any = AutoModelForCausalLM
    place: Path | None = folder
    given: dict[str, Any] = {"use_safetensors": True}
    if (folder / _INDEX).is_file():
        # transformers prefers a model.safetensors that lies beside the index; the index decides.
        config.transformers_weights = _INDEX
    elif not (folder / "model.safetensors").is_file():
        files = WeightFiles(folder)  # under names that transformers doesn't look for
        kind, place = type(_empty_model(folder, config, torch.float32)), None
        given = {"state_dict": {name: files.read(name) for name in files.names()}}
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                place,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                **given,
            )
    except Exception as error:  # as for the configuration
        raise SettingsInvalid(
            f"transformers can't load {folder}: {type(error).__name__}: {error}"
        ) from error
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights
    return model, info


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the screen: what matters of them is told."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(repr(name) for name in names[:_MOST_NAMES]) + more
