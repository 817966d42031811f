"""What a model's generation_config.json says of its answers, where a request says nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dagflow.errors import SettingsInvalid
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import JsonLimits, load_json

_FILE = "generation_config.json"
# The largest configurations list every module of a quantised model.
CONFIGURATION_LIMITS = JsonLimits(num_bytes=16 * 2**20, num_values=500_000)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What transformers samples with where the file doesn't say (GenerationConfig's own defaults).
_WHEN_SAMPLING = {"temperature": 1.0, "top_k": 50}
_OF_THE_FILE = ("_from_model_config", "transformers_version")
# They change no answer of ours, or are applied, or say how answers are computed and not which.
_WITHOUT_EFFECT = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "is_assistant",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "trust_remote_code",
    "use_cache",
    *_SAMPLING,
}


def read_generation(model: Any, folder: Path | None) -> dict[str, Any]:
    """Return what a model's generation configuration sets, without what it leaves open.

    That is the folder's generation_config.json; without it, and for a module, what transformers makes
    of the model's own configuration.

    Raises
    ------
    SettingsInvalid
        If the file can't be read.
    """
    from transformers import GenerationConfig

    found = getattr(model, "generation_config", None)
    if folder is not None and (folder / _FILE).is_file():
        try:
            fields.members(load_json(folder / _FILE, CONFIGURATION_LIMITS), "it")
            found = GenerationConfig.from_pretrained(folder)
        # What transformers raises depends on what is wrong, and on its version.
        except Exception as error:
            raise SettingsInvalid(
                f"{folder / _FILE} can't be read: {error}. Mend it, or remove it: answers then end "
                "and are chosen as config.json says."
            ) from error
    elif folder is not None:
        found = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    if found is None:
        return {}
    given = json.loads(found.to_json_string(use_diff=True))
    try:
        _ids(given.get("eos_token_id"))
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingsInvalid(
            f"The model's generation configuration has no tokens for eos_token_id, but "
            f"{fields.shown(given['eos_token_id'])}: mend {_FILE} or config.json."
        ) from error
    return {n: v for n, v in given.items() if v is not None and n not in _OF_THE_FILE}


def end_tokens(generation: Mapping[str, Any], config: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those of the configuration, and the tokenizer's."""
    said = generation.get("eos_token_id")
    said = said if said is not None else getattr(config, "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None)
    return list(dict.fromkeys([*_ids(said), *_ids(own)]))


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `Sampling` that apply unless a call says otherwise, as in `generate`.

    >>> sampling_defaults({"do_sample": True, "top_p": 0.9})
    {'temperature': 1.0, 'top_k': 50, 'top_p': 0.9}
    >>> sampling_defaults({"temperature": 0.6, "repetition_penalty": 1.1})
    {'repetition_penalty': 1.1}
    """
    said = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample"):
        return {**_WHEN_SAMPLING, **said}
    said.pop("temperature", None)  # transformers is greedy then
    return said


def served_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that apply to requests by HTTP that say nothing of them.

    Those requests are sampled at temperature 1 unless they say otherwise, whatever ``do_sample``
    says, as by OpenAI; what the file names comes in place of that, as in vLLM.
    """
    return {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}


def not_applied(generation: Mapping[str, Any]) -> list[str]:
    """Return a note on what the file asks for and isn't done."""
    names = sorted(name for name in generation.keys() - _WITHOUT_EFFECT if generation[name])
    if not names:
        return []
    asked = ", ".join(f"{name}={generation[name]!r}" for name in names)
    return [
        f"{_FILE} asks for {asked}, which isn't applied: pass what you want of it with each call."
    ]


def shown(options: Mapping[str, Any]) -> str:
    """Return options as a reader likes them.

    >>> shown({"temperature": 0.6, "top_p": 0.9})
    'temperature 0.6, top_p 0.9'
    """
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _ids(said: Any) -> Iterable[int]:
    if said is None:
        return ()
    return [int(token) for token in said] if isinstance(said, list | tuple) else [int(said)]
