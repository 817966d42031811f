"""Arguments that the functions for training and for serving share, looked at before anything runs."""

from __future__ import annotations

from operator import index
from pathlib import Path
from typing import Any

from distributed import Client

from dagflow.errors import SettingsInvalid
from dagflow_storage import Store


def check_client(client: Any) -> None:
    """Refuse what names no cluster.

    Raises
    ------
    SettingsInvalid
    """
    if client is not None and not isinstance(client, (Client, str)):
        raise SettingsInvalid(
            "client= is a distributed.Client, or a scheduler's address like 'tcp://10.0.0.1:8786'; "
            f"found {shown(client)}."
        )


def open_store(store: Any) -> Store:
    """Return the store at a folder or URL.

    Raises
    ------
    SettingsInvalid
    """
    if not isinstance(store, (str, Path)) or not str(store).strip():
        raise SettingsInvalid(
            f"store= is a folder, or a URL like 's3://bucket/run'; found {shown(store)}."
        )
    try:
        return Store(str(store))
    except ValueError as error:
        raise SettingsInvalid(
            f"store= is a folder, or a URL like 's3://bucket/run': {error}."
        ) from error


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, Python's or NumPy's."""
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return a value for a message: itself if it is short, and what it is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = "." * 41
    kind = f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    return f"{text} ({kind})" if len(text) <= 40 else kind
