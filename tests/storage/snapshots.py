"""Small snapshots for tests: two stages, several chunks each if asked for."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dagflow_storage import (
    ArraySpec,
    ShardRecord,
    Snapshot,
    Store,
    commit_snapshot,
    walk,
    write_shard,
)

SPECS = {
    "stage-0": [
        ArraySpec("a", "parameter", "float32", (40,)),
        ArraySpec("a.m", "optimizer", "float32", (40,)),
        ArraySpec("table", "parameter", "float32", (40,)),
    ],
    "stage-1": [
        ArraySpec("b", "parameter", "float32", (2, 2)),
        ArraySpec("n", "buffer", "int64", ()),
    ],
}
FROZEN = ("table",)


def value(spec: ArraySpec, step: int) -> np.ndarray[Any, Any]:
    return np.full(spec.shape, 7 if spec.name in FROZEN else step, dtype=spec.dtype)


def write(
    store: Store,
    step: int,
    shard: str,
    *,
    frozen: Collection[str] = (),
    earlier: Snapshot | None = None,
) -> ShardRecord:
    specs = {spec.name: spec for spec in SPECS[shard]}
    return write_shard(
        store,
        step,
        shard,
        SPECS[shard],
        lambda name: value(specs[name], step),
        frozen=frozen,
        earlier=earlier,
    )


def take(store: Store, step: int, meta: Mapping[str, Any] | None = None, **options: Any) -> None:
    records = [write(store, step, shard, **options) for shard in SPECS]
    assert commit_snapshot(store, step, records, meta or {})


def paths(store: Store, below: str = "") -> list[str]:
    return [found.path for found in walk(store, below)]


def file(store: Store, pattern: str) -> Path:
    """The only file of a folder store that matches."""
    (found,) = Path(store.url).glob(pattern)
    return found
