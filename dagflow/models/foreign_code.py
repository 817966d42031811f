"""Code that a model's folder brings along, or names, is never run; this says so in words.

transformers would run it where it is allowed to (`trust_remote_code`), and asks on the terminal where
nobody has said: every call of ours says no. A folder with ``auto_map`` is then loaded as the
architecture of transformers that its ``model_type`` names, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dagflow.errors import SettingsInvalid
from dagflow.models.defaults import CONFIGURATION_LIMITS
from dagflow_storage.place.bounded_json import load_json

_FILES = ("config.json", "tokenizer_config.json")
# Of a configuration and those inside it: names of functions of transformers, or of repositories with
# compiled code, which transformers fetches and loads.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def refuse_kernels(folder: Path) -> None:
    """Refuse a configuration that asks for somebody's compiled code.

    Raises
    ------
    SettingsInvalid
    """
    for name, value in _settings(_read(folder / "config.json")):
        if name in _KERNELS and isinstance(value, str) and "/" in value:
            raise SettingsInvalid(
                f"{folder / 'config.json'} asks for {name} {value!r}, which is code from elsewhere, "
                "and dagflow runs none. Take it out: the model is then computed with transformers' own."
            )


def reason(folder: Path, error: BaseException) -> str:
    """Say why transformers couldn't load something from a folder."""
    brought = {
        str(code)
        for file in _FILES
        for name, value in _settings(_read(folder / file))
        if name == "auto_map"
        for code in _names(value)
    }
    if not brought:
        return f"{type(error).__name__}: {error}"
    return (
        f"it wants code of its own ({', '.join(sorted(brought))}), and dagflow runs no code that comes "
        "with a model. Models of architectures that are part of transformers load without it"
    )


def _read(file: Path) -> Any:
    try:
        return load_json(file, CONFIGURATION_LIMITS, finite=False)
    except (OSError, ValueError):
        return {}  # whoever needs the file says so


def _settings(found: Any) -> Iterator[tuple[str, Any]]:
    """Yield all names and values of a configuration, those of its parts included."""
    waiting = [found]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _names(found: Any) -> Iterator[Any]:
    """Yield the classes that an ``auto_map`` names: one, a pair, or by the name of a class.

    >>> list(_names({"AutoConfig": "code.Config", "AutoTokenizer": ["code.Slow", None]}))
    ['code.Config', 'code.Slow']
    """
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        for part in found:
            yield from _names(part)
    elif found is not None:
        yield found
