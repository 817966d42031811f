"""Groups of tensors in the store, named by what they hold."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from typing import Any

import torch

from dagflow_storage import ArraySpec, NotFound, Store, StoredArray, write_arrays
from dagflow_storage.arrays.arrays import check_places
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import parse_json
from dagflow_tasks.train.state import to_array

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def groups_of(names: Iterable[str]) -> list[list[str]]:
    """Group tensors by layer: workers read whole layers, and fine-tunes change some of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        found.setdefault(match[0] if match else "", []).append(name)
    return list(found.values())


def write_groups(
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
    # One that is damaged, or says something else of these tensors, is written anew.
    with suppress(NotFound, ValueError):
        known = parse_json(store.read_bytes(index))
        _, arrays = checked_group(known)
        if [ArraySpec(a.name, a.role, a.dtype, a.shape) for a in arrays] == specs:
            return dict(known)
    path = f"weights/{digest}-{uuid.uuid4().hex[:8]}"
    arrays = write_arrays(store, path, specs, lambda name: to_array(read(name)))
    store.flush(path)
    group = {"path": path, "arrays": [array.to_json() for array in arrays]}
    store.write_bytes(index, json.dumps(group).encode())
    return group


def checked_group(group: Any) -> tuple[str, list[StoredArray]]:
    """Return where a group of tensors lies, and its arrays; raises ValueError if it isn't one."""
    given = fields.members(group, "a group", "path", "arrays")
    arrays = [StoredArray.from_json(array) for array in fields.items(given["arrays"], "arrays")]
    check_places(arrays)
    return fields.path(given["path"], "a group's path"), arrays


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
