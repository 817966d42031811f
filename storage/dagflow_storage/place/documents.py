"""JSON documents in a store, each with the version of its format."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from dagflow_storage.errors import DamagedData, FormatTooNew
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import parse_json
from dagflow_storage.place.location import Store

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


def encode_document(format_version: int, content: Mapping[str, Any]) -> bytes:
    """The bytes to put; readable by people, the version first."""
    document = {"format_version": format_version, **content}
    return json.dumps(document, indent=1).encode()


def read_document(store: Store, path: str, newest_format: int) -> dict[str, Any]:
    """The document at `path`.

    Raises
    ------
    NotFound
        If there is none.
    DamagedData
        If it is no JSON object with a version.
    FormatTooNew
        If it is newer than `newest_format`.
    """
    data = store.read_bytes(path)
    with sound(f"{path} in {store!r} ({len(data)} bytes) is no document of dagflow"):
        document = fields.members(parse_json(data, finite=False), "it", "format_version")
        found = fields.integer(document["format_version"], "format_version")
    if found > newest_format:
        raise FormatTooNew(
            f"{path} in {store!r} has format version {found}, this dagflow reads versions up "
            f"to {newest_format}: upgrade dagflow"
        )
    return dict(document)


@contextmanager
def sound(otherwise: str) -> Iterator[None]:
    """Raise `DamagedData` for what the block's checks of something stored find wrong with it."""
    try:
        yield
    except ValueError as error:
        raise DamagedData(f"{otherwise}: {error}") from error
