"""Snapshots: the whole state of a run after one step, complete or nonexistent.

::

    snapshots/step-00000012/stage-0-3f9a.../float32/...    one folder a written shard
    snapshots/step-00000012/manifest.json                  written last

Nothing is overwritten: a shard that is written twice lies there twice, and the manifest names
one of the two.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagflow_storage.arrays import ArraySpec, StoredArray, read_arrays, write_arrays
from dagflow_storage.documents import JSON, encode_document, read_document
from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.flat import AnyArray
from dagflow_storage.location import Store

SNAPSHOT_FORMAT = 1
_FOLDER = "snapshots"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class ShardRecord:
    """One worker's part of a snapshot, written but not committed: what the manifest needs."""

    shard: str
    path: str
    arrays: tuple[StoredArray, ...]

    def to_json(self) -> dict[str, Any]:
        """As it goes into the manifest."""
        arrays = [stored.to_json() for stored in self.arrays]
        return {"shard": self.shard, "path": self.path, "arrays": arrays}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ShardRecord":
        """As it comes out of the manifest."""
        arrays = tuple(StoredArray.from_json(stored) for stored in data["arrays"])
        return cls(shard=data["shard"], path=data["path"], arrays=arrays)


def write_shard(
    store: Store,
    step: int,
    shard: str,
    specs: Sequence[ArraySpec],
    read: Callable[[str], AnyArray],
) -> ShardRecord:
    """Write one shard of the snapshot of `step`; it counts once a manifest names it.

    Safe to run twice, also at once: each call writes under a path of its own, and either
    record may be committed. Durable when it returns.

    Parameters
    ----------
    specs, read
        As for `write_arrays`.
    """
    path = f"{_step_folder(step)}/{shard}-{uuid.uuid4().hex}"
    index = write_arrays(store, path, specs, read)
    # On disk before any manifest can say so.
    store.flush(path)
    return ShardRecord(shard, path, tuple(index))


def commit_snapshot(
    store: Store, step: int, shards: Sequence[ShardRecord], meta: Mapping[str, JSON]
) -> None:
    """Make the snapshot of `step` exist.

    Safe to run twice: the first manifest of a step wins, and a later call returns quietly.

    Raises
    ------
    ValueError
        If two shards hold an array of the same role and name.
    """
    _locate(shards)
    content = {
        "step": step,
        "meta": dict(meta),
        "shards": [record.to_json() for record in shards],
    }
    # Manifest last: a snapshot without one does not exist, so a worker that dies above this
    # line leaves garbage, never a lie.
    if not store.create_bytes(_manifest_path(step), encode_document(SNAPSHOT_FORMAT, content)):
        Snapshot.open(store, step)


def list_snapshots(store: Store) -> list[int]:
    """The steps that have a complete snapshot, ascending."""
    return [step for step in _step_folders(store) if store.exists(_manifest_path(step))]


def delete_old_snapshots(store: Store, keep: int) -> None:
    """Delete all but the newest `keep` complete snapshots, and unfinished ones older than those.

    Unfinished ones that are newer are left alone: somebody may be writing them.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, at least 1 snapshot must be kept")
    kept = list_snapshots(store)[-keep:]
    for step in _step_folders(store):
        if kept and step < kept[0]:
            delete_snapshot(store, step)


def delete_snapshot(store: Store, step: int) -> None:
    """Delete the snapshot of `step`, so that it may be written anew; absent is fine."""
    # Manifest first: from here on the snapshot does not exist, however far the rest gets.
    store.delete(_manifest_path(step))
    store.delete(_step_folder(step))


class Snapshot:
    """A complete snapshot; get one from `Snapshot.open`.

    Attributes
    ----------
    step
        The number of optimizer steps it contains.
    meta
        What was committed beside the arrays.
    shards
        The shards that make it up.
    arrays
        Every array, by (role, name).
    """

    def __init__(
        self, store: Store, step: int, meta: dict[str, Any], shards: Sequence[ShardRecord]
    ) -> None:
        self.step = step
        self.meta = meta
        self.shards = tuple(shards)
        self.arrays = {key: stored for key, (_, stored) in _locate(shards).items()}
        self._store = store

    @classmethod
    def open(cls, store: Store, step: int) -> "Snapshot":
        """The snapshot of `step`.

        Raises
        ------
        NotFound
            If there is none, naming those there are.
        DamagedData, FormatTooNew
            If its manifest is no good, or too new.
        """
        path = _manifest_path(step)
        try:
            manifest = read_document(store, path, SNAPSHOT_FORMAT)
        except NotFound as error:
            complete = list_snapshots(store)
            raise NotFound(
                f"{store!r} has no complete snapshot of step {step}; complete are: {complete}"
            ) from error
        try:
            shards = [ShardRecord.from_json(record) for record in manifest["shards"]]
            found_step, meta = int(manifest["step"]), dict(manifest["meta"])
            snapshot = cls(store, found_step, meta, shards)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedData(f"{path} in {store!r} is no manifest: {error!r}") from error
        if found_step != step:
            raise DamagedData(f"{path} in {store!r} is the manifest of step {found_step}")
        return snapshot

    @property
    def roles(self) -> list[str]:
        """The roles that arrays have, sorted."""
        return sorted({role for role, _ in self.arrays})

    def names(self, role: str) -> list[str]:
        """The names of the arrays with `role`, in the order they were written."""
        return [name for found_role, name in self.arrays if found_role == role]

    def read(self, role: str, names: Iterable[str]) -> dict[str, AnyArray]:
        """The arrays of `role` with these names; fetches only the chunks they lie in.

        Raises
        ------
        NotFound
            If the snapshot has no such array.
        DamagedData
            If a chunk is damaged or missing; naming it. Another snapshot may be whole.
        """
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if (role, name) not in self.arrays]
        if missing:
            raise NotFound(
                f"the snapshot of step {self.step} in {self._store!r} has no {role} named "
                f"{', '.join(missing)}"
            )
        chosen = {(role, name) for name in wanted}
        found: dict[str, AnyArray] = {}
        for record in self.shards:
            index = [s for s in record.arrays if (s.role, s.name) in chosen]
            found.update(read_arrays(self._store, record.path, index))
        return {name: found[name] for name in wanted}


def _locate(shards: Sequence[ShardRecord]) -> dict[tuple[str, str], tuple[str, StoredArray]]:
    located: dict[tuple[str, str], tuple[str, StoredArray]] = {}
    for record in shards:
        for stored in record.arrays:
            key = (stored.role, stored.name)
            if key in located:
                raise ValueError(
                    f"{stored.role} {stored.name!r} is in two shards, {located[key][0]!r} and "
                    f"{record.shard!r}: one must be left out"
                )
            located[key] = (record.shard, stored)
    return located


def _step_folder(step: int) -> str:
    if step < 0:
        raise ValueError(f"step is {step}, must be at least 0")
    return f"{_FOLDER}/step-{step:08d}"


def _manifest_path(step: int) -> str:
    return f"{_step_folder(step)}/manifest.json"


def _step_folders(store: Store) -> list[int]:
    matches = (_STEP_FOLDER.fullmatch(name) for name in store.list(_FOLDER))
    return sorted(int(match[1]) for match in matches if match)
