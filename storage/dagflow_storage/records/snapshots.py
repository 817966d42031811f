"""Snapshots: the whole state of a run after one step, complete or nonexistent.

::

    snapshots/step-00000012/stage-0-3f9a.../float32/...    one folder a written shard
    snapshots/step-00000012/stage-0-3f9a...-frozen/...     its frozen arrays, written once
    snapshots/step-00000012/manifest.json                  written last

Nothing is overwritten: a shard that is written twice lies there twice, and the manifest names
one of the two. A later manifest may name a frozen folder again.
"""

import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from dagflow_storage.arrays.arrays import ArraySpec, StoredArray, read_arrays, write_arrays
from dagflow_storage.arrays.flat import AnyArray
from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.place.documents import JSON
from dagflow_storage.place.location import Store
from dagflow_storage.records.manifest import (
    Manifest,
    ShardRecord,
    StoredObject,
    borrowed,
    read_manifest,
)
from dagflow_storage.records.recording import RecordingStore

SNAPSHOTS_FOLDER = "snapshots"
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")


def write_shard(
    store: Store,
    step: int,
    shard: str,
    specs: Sequence[ArraySpec],
    read: Callable[[str], AnyArray],
    *,
    frozen: Collection[str] = (),
    earlier: "Snapshot | None" = None,
) -> ShardRecord:
    """Write one shard of the snapshot of `step`; it counts once a manifest names it.

    Safe to run twice, also at once: each call writes under a path of its own, and either
    record may be committed. Durable when it returns.

    Parameters
    ----------
    specs, read
        As for `write_arrays`.
    frozen
        Names of arrays that don't change during the run. They are written beside the others, so
        that later snapshots can refer to them.
    earlier
        A committed snapshot of this run. A frozen array that it holds, with the same role, dtype
        and shape, is referred to and not asked for; nobody looks whether it has changed.
    """
    path = f"{step_folder(step)}/{shard}-{uuid.uuid4().hex}"
    kept = _kept(specs, frozen, earlier)
    new = [spec for spec in specs if spec.name not in kept]
    changing = [spec for spec in new if spec.name not in frozen]
    resting = [spec for spec in new if spec.name in frozen]
    record = _write_part(store, path, shard, changing, read)
    parts = [_write_part(store, f"{path}-frozen", shard, resting, read)] if resting else []
    if earlier is not None:
        parts += _references(shard, set(kept.values()), earlier)
    return ShardRecord(shard, path, record.arrays, record.objects, tuple(parts))


def _write_part(
    store: Store,
    path: str,
    shard: str,
    specs: Sequence[ArraySpec],
    read: Callable[[str], AnyArray],
) -> ShardRecord:
    recorder = RecordingStore(store)
    index = write_arrays(recorder, path, specs, read)
    # On disk before any manifest can say so.
    store.flush(path)
    return ShardRecord(shard, path, tuple(index), recorder.written_below(path))


def _kept(
    specs: Sequence[ArraySpec], frozen: Collection[str], earlier: "Snapshot | None"
) -> dict[str, tuple[str, str]]:
    """The frozen arrays that `earlier` holds: (role, name) by name."""
    if earlier is None:
        return {}
    kept = {}
    for spec in specs:
        stored = earlier.arrays.get((spec.role, spec.name))
        same = stored is not None and (stored.dtype, stored.shape) == (spec.dtype, spec.shape)
        if same and spec.name in frozen:
            kept[spec.name] = (spec.role, spec.name)
    return kept


def _references(
    shard: str, kept: Collection[tuple[str, str]], earlier: "Snapshot"
) -> list[ShardRecord]:
    """Records that name arrays where an earlier snapshot has them."""
    found = []
    for record in earlier.shards:
        arrays = tuple(s for s in record.arrays if (s.role, s.name) in kept)
        labels = {stored.array for stored in arrays}
        objects = tuple(o for o in record.objects if o.path.partition("/")[0] in labels)
        if arrays:
            found.append(ShardRecord(shard, record.path, arrays, objects))
    return found


def commit_snapshot(
    store: Store, step: int, shards: Sequence[ShardRecord], meta: Mapping[str, JSON]
) -> bool:
    """Make the snapshot of `step` exist.

    Safe to run twice: the first manifest of a step wins, and a later call returns quietly.

    Returns
    -------
    bool
        Whether it is these shards that the snapshot consists of. False for who came later; a
        lost answer to the put isn't mistaken for that.

    Raises
    ------
    ValueError
        If two shards hold an array of the same role and name.
    NotFound
        If something that the manifest would name was deleted meanwhile: the snapshot must be
        written again, or left out.
    """
    records = tuple(part for record in shards for part in record.flattened())
    _locate(records)
    _check_presence(store, step, records)
    manifest = Manifest(step, dict(meta), records, nonce=uuid.uuid4().hex)
    # Manifest last: a snapshot without one does not exist, so a worker that dies above this
    # line leaves garbage, never a lie.
    if store.create_bytes(manifest_path(step), manifest.encode()):
        return True
    return Snapshot.open(store, step).nonce == manifest.nonce


def list_snapshots(store: Store) -> list[int]:
    """The steps that have a complete snapshot, ascending."""
    return [step for step in list_step_folders(store) if store.exists(manifest_path(step))]


def delete_snapshot(store: Store, step: int, spare: Collection[str] | None = None) -> None:
    """Delete the snapshot of `step`, so that it may be written anew; absent is fine.

    Parameters
    ----------
    spare
        Folders that other manifests name, which stay; by default the manifests are read.
    """
    if spare is None:
        spare = folders_in_use(store, but=step)
    # Manifest first: from here on the snapshot does not exist, however far the rest gets.
    store.delete(manifest_path(step))
    _delete_but(store, step_folder(step), spare)


def folders_in_use(store: Store, but: int | None = None) -> set[str]:
    """The folders of all arrays that readable manifests name, except those of one step.

    A manifest that can't be read is passed over: neither can what it refers to.
    """
    found: set[str] = set()
    for step in list_snapshots(store):
        if step == but:
            continue
        try:
            found |= Snapshot.open(store, step).array_folders
        except (DamagedData, NotFound):
            continue
    return found


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
    nonce
        A random number from who committed it; empty if that was an older dagflow.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.step = manifest.step
        self.meta = manifest.meta
        self.shards = manifest.shards
        self.nonce = manifest.nonce
        self.arrays = {key: stored for key, (_, stored) in _locate(manifest.shards).items()}
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
        path = manifest_path(step)
        try:
            manifest = read_manifest(store, path)
            snapshot = cls(store, manifest)
        except NotFound as error:
            complete = list_snapshots(store)
            raise NotFound(
                f"{store!r} has no complete snapshot of step {step}; complete are: {complete}"
            ) from error
        except ValueError as error:
            raise DamagedData(f"{path} in {store!r} is no manifest: {error}") from error
        if manifest.step != step:
            raise DamagedData(f"{path} in {store!r} is the manifest of step {manifest.step}")
        return snapshot

    @property
    def array_folders(self) -> set[str]:
        """The folders, from the store's root, that its arrays lie in."""
        return {folder for record in self.shards for folder in record.array_folders}

    @property
    def objects(self) -> dict[str, StoredObject]:
        """Every object that it consists of, by path from the store's root, without the manifest.

        Those of a snapshot that an older dagflow wrote aren't known.
        """
        return {
            f"{record.path}/{stored.path}": stored
            for record in self.shards
            for stored in record.objects
        }

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


def _check_presence(store: Store, step: int, records: Sequence[ShardRecord]) -> None:
    """Notice shards that retention or a garbage collector took for abandoned."""
    there = {f"{step_folder(step)}/{name}" for name in store.list(step_folder(step))}
    lent = borrowed(records, step_folder(step))
    # Some stores list what is new after a while only: what isn't listed is looked for.
    own = [record.path for record in records if record not in lent]
    gone = [path for path in own if path not in there and not store.exists(path)]
    for record in lent:
        folders = sorted(record.array_folders)
        gone += [folder for folder in folders if not store.exists(f"{folder}/zarr.json")]
    if gone:
        raise NotFound(
            f"the snapshot of step {step} in {store!r} can't be committed: {gone[0]} was deleted "
            "after it was written; write the shard again, and without earlier="
        )


def _delete_but(store: Store, path: str, spare: Collection[str]) -> None:
    if path in spare:
        return
    if not any(folder.startswith(f"{path}/") for folder in spare):
        store.delete(path)
        return
    for name in store.list(path):
        _delete_but(store, f"{path}/{name}", spare)


def step_folder(step: int) -> str:
    """Where the snapshot of `step` lies."""
    if step < 0:
        raise ValueError(f"step is {step}, must be at least 0")
    return f"{SNAPSHOTS_FOLDER}/step-{step:08d}"


def manifest_path(step: int) -> str:
    """Where the manifest of `step` lies."""
    return f"{step_folder(step)}/manifest.json"


def list_step_folders(store: Store) -> list[int]:
    """The steps of which there is a snapshot, or the beginning of one, ascending."""
    matches = (_STEP_FOLDER.fullmatch(name) for name in store.list(SNAPSHOTS_FOLDER))
    return sorted(int(match[1]) for match in matches if match)
