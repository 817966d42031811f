"""A model's tokenizer: which files it is made of, how it is opened, and text to tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.models.foreign_code import reason
from dagflow_storage.place import fields

# By how their names begin or end: the vocabularies of all tokenizers of transformers, and what is
# beside them. Weights, code and texts for people aren't among them.
_BEGINNINGS = (
    "added_tokens",
    "byte_maps",
    "chat_template",
    "dict.txt",
    "emoji",
    "entity_vocab",
    "merges",
    "normalizer",
    "special_tokens",
    "target_vocab",
    "tekken",
    "tokenizer",
    "vocab",
    "word_",
)
_ENDINGS = (".bpe", ".codes", ".jinja", ".model", ".spm", ".tiktoken", ".tokenizer", ".vocab")
# transformers looks here for the tokenizer's class, and for templates.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_NO_VOCABULARY = ("special_tokens", "added_tokens", "chat_template", *_BESIDE)
_MOST_BYTES = 2**29
_TEMPLATES = "additional_chat_templates"
_PACKAGES = {
    ".model": ("sentencepiece", "google.protobuf", "tiktoken"),
    ".spm": ("sentencepiece", "google.protobuf"),
    ".tiktoken": ("tiktoken",),
    "tekken.json": ("mistral_common",),
}
_INSTALLED_AS = {"google.protobuf": "protobuf", "mistral_common": "mistral-common"}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files that a folder's tokenizer is made of, by their names; none if it has none."""
    found = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and (file.name.startswith(_BEGINNINGS) or file.name.endswith(_ENDINGS))
        and not file.name.endswith((".md", ".py"))
    }
    if all(name.startswith(_NO_VOCABULARY) or name.endswith(".jinja") for name in found):
        return {}
    found |= {name: folder / name for name in _BESIDE if (folder / name).is_file()}
    templates = sorted((folder / _TEMPLATES).glob("*.jinja"))
    found |= {f"{_TEMPLATES}/{file.name}": file for file in templates if file.is_file()}
    _check_files(folder, found)
    return found


def _check_files(folder: Path, files: Mapping[str, Path]) -> None:
    """Refuse what would be copied into the store, for all workers to read, and isn't the model's."""
    root = folder.resolve()
    # Hugging Face's cache keeps files apart: snapshots/REVISION/NAME links to ../../blobs/HASH.
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name, file in files.items():
        target = file.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise SettingsInvalid(
                f"{folder / name} is a link to {target}, outside of the model's folder: copy the file "
                "there if it is part of the model."
            )
    size = sum(file.stat().st_size for file in files.values())
    if size > _MOST_BYTES:
        raise SettingsInvalid(
            f"The tokenizer of {folder} has {size} bytes, more than {_MOST_BYTES}: {', '.join(files)}."
        )


def is_tokenizer(names: list[str]) -> bool:
    """Tell whether files of these names are a tokenizer."""
    return any(not name.startswith(_NO_VOCABULARY) for name in names)


def open_tokenizer(model: str, files: Mapping[str, bytes]) -> Any:
    """Return the tokenizer of transformers that files make.

    Raises
    ------
    SettingsInvalid
        If it can't be opened; says which packages it may lack.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        for name, data in files.items():
            place = Path(temporary, _inside(name, model))
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
        try:
            # Whatever it raises (transformers, tokenizers and sentencepiece have errors of all kinds)
            # means that there is no tokenizer.
            tokenizer = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of Rust code are no Exception
            raise SettingsInvalid(
                f"The tokenizer of {model} can't be opened: {reason(Path(temporary), error)}. "
                + _remedy(files)
            ) from error
    known = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if set(tokenizer.get_vocab()) <= known:
        raise SettingsInvalid(
            f"The tokenizer of {model} has no vocabulary: transformers made none of "
            f"{', '.join(sorted(files))}. {_remedy(files)}"
        )
    return tokenizer


def _inside(name: str, model: str) -> str:
    """Return the name of a tokenizer's file, unless it leads elsewhere: the store says it.

    >>> _inside("additional_chat_templates/tools.jinja", "model")
    'additional_chat_templates/tools.jinja'
    """
    try:
        file = fields.name(name.removeprefix(f"{_TEMPLATES}/"), "it")
    except ValueError:
        file = ""
    if not file or file.endswith(".py"):
        raise SettingsInvalid(
            f"The tokenizer of {model} can't be opened: {name!r} is no name of a tokenizer's file. "
            "Load the model again."
        )
    return name


def encode_text(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return a text's tokens, with what the tokenizer puts before it, once.

    A rendered chat template begins with that already (with ``<s>``, mostly).

    Raises
    ------
    BatchInvalid
        If the text holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BatchInvalid(
            f"The text isn't Unicode: its character {error.start} is {text[error.start]!r}, half of a "
            "surrogate pair."
        ) from None
    tokens: list[int] = list(tokenizer(text, **options)["input_ids"])
    specials = tuple(token for token in tokenizer.all_special_tokens if token)
    if not options.get("add_special_tokens", True) or not text.lstrip().startswith(specials):
        return tokens
    plain: list[int] = list(
        tokenizer(text, **{**options, "add_special_tokens": False})["input_ids"]
    )
    for count in range(1, len(tokens) - len(plain) + 1):
        if tokens[count : count + len(plain)] == plain:
            return tokens[count:] if plain[:count] == tokens[:count] else tokens
    return tokens


def _remedy(files: Mapping[str, bytes]) -> str:
    wanted = {
        package
        for ending, packages in _PACKAGES.items()
        if any(name.endswith(ending) for name in files)
        for package in packages
    }
    lacking = sorted(_INSTALLED_AS.get(p, p) for p in wanted if not _is_installed(p))
    if lacking:
        return f"It may lack a package: pip install {' '.join(lacking)}."
    return (
        "Save it with transformers' save_pretrained (a tokenizer.json), or take its files out of the "
        "folder: the model then takes token ids."
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent isn't there
        return False
