"""Tells whole snapshots from damaged ones, without decoding anything."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dagflow_storage.arrays.arrays import StoredArray, read_arrays
from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.place.listing import walk
from dagflow_storage.place.location import Store
from dagflow_storage.records.manifest import StoredObject, claimed_crc32c, computed_crc32c
from dagflow_storage.records.snapshots import (
    Snapshot,
    list_snapshots,
    manifest_path,
)

_NUM_READERS = 8
_NUM_NAMED = 3


@dataclass(frozen=True)
class Damage:
    """An object that isn't what was written: `path` from the store's root, and what is wrong."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


Check = Callable[[Snapshot], Sequence[Damage]]


def verify_snapshot(
    store: Store, step: int, on_object: Callable[[str], None] = lambda _: None
) -> list[Damage]:
    """What is wrong with the snapshot of `step`; reads every object of it, and decodes none.

    Parameters
    ----------
    on_object
        Called with the path of each object that was looked at.

    Raises
    ------
    NotFound
        If there is none.
    FormatTooNew
        If a newer dagflow wrote it.
    StoreUnreachable
        If an object couldn't be read, which says nothing about it.
    """
    try:
        snapshot = Snapshot.open(store, step)
    except DamagedData as error:
        return [Damage(manifest_path(step), str(error))]

    objects = snapshot.objects
    damages = []
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        looks = pool.map(lambda path: _look(store, path, objects[path]), objects)
        for path, damage in zip(objects, looks, strict=True):
            on_object(path)
            damages += [damage] if damage is not None else []
    return [*damages, *_verify_unlisted(store, snapshot)]


def glance_at_snapshot(store: Store, step: int) -> list[Damage]:
    """What is missing of the snapshot of `step`, or has another size; reads the manifest only.

    Raises
    ------
    NotFound, FormatTooNew, StoreUnreachable
        As for `verify_snapshot`.
    """
    try:
        snapshot = Snapshot.open(store, step)
    except DamagedData as error:
        return [Damage(manifest_path(step), str(error))]
    folders = {record.path for record in snapshot.shards}
    sizes = {item.path: item.size_bytes for f in folders for item in walk(store, f)}
    damages = []
    for path, stored in snapshot.objects.items():
        if path not in sizes:
            damages.append(_missing(path, stored))
        elif sizes[path] != stored.size_bytes:
            damages.append(_other_size(path, stored, sizes[path]))
    return damages


def newest_whole_snapshot(
    store: Store,
    *,
    thorough: bool = False,
    check: Check = lambda _: (),
    note: Callable[[str], None] = lambda _: None,
) -> int:
    """The newest step whose snapshot can be used.

    Parameters
    ----------
    thorough
        Read everything, so that changed bytes are noticed, too; for who has met some. Otherwise
        manifests and sizes are looked at, and reading the snapshot notices the rest.
    check
        What else is wrong with a snapshot, such as belonging to another model.
    note
        Told about each snapshot that is passed over.

    Raises
    ------
    NotFound
        If there is no snapshot at all.
    DamagedData
        If none is whole; says what is wrong with each.
    FormatTooNew
        If a newer dagflow wrote one of them: going on would undo its work.
    """
    steps = list_snapshots(store)
    if not steps:
        raise NotFound(f"{store!r} has no complete snapshot")
    problems = []
    for step in reversed(steps):
        found = verify_snapshot(store, step) if thorough else glance_at_snapshot(store, step)
        found = found or list(check(Snapshot.open(store, step)))
        if not found:
            return step
        problems.append(f"step {step}: {summary(found)}")
        note(f"The snapshot of step {step} can't be used ({summary(found)}).")
    raise DamagedData(f"no snapshot in {store!r} is whole; {'; '.join(problems)}")


def set_aside_newer(store: Store, step: int) -> list[int]:
    """Make snapshots after `step` nonexistent, so that these steps' may be written anew.

    Their manifests stay as ``manifest.damaged.json`` for whoever wants to look, until garbage is
    collected; their shards, too. Returns their steps.
    """
    newer = [found for found in list_snapshots(store) if found > step]
    for found in newer:
        path = manifest_path(found)
        store.write_bytes(path.replace(".json", ".damaged.json"), store.read_bytes(path))
        store.delete(path)
    return newer


def differences(snapshot: Snapshot, role: str, wanted: Mapping[str, str]) -> list[Damage]:
    """How a snapshot's arrays of `role` differ from those that a run has.

    Parameters
    ----------
    wanted
        ``float32[3, 4]`` by name.
    """
    found = {n: _shown(snapshot.arrays[role, n]) for n in snapshot.names(role)}
    path = manifest_path(snapshot.step)
    return [
        Damage(
            path,
            f"of another model: {role} {name!r} is {found.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} in this run",
        )
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def summary(damages: Sequence[Damage]) -> str:
    """The first few damages in one line."""
    named = "; ".join(str(damage) for damage in damages[:_NUM_NAMED])
    more = len(damages) - _NUM_NAMED
    return f"{named}; and {more} more" if more > 0 else named


def _look(store: Store, path: str, stored: StoredObject) -> Damage | None:
    try:
        data = store.read_bytes(path)
    except NotFound:
        return _missing(path, stored)
    if len(data) != stored.size_bytes:
        return _other_size(path, stored, len(data))
    # A chunk's own checksum must be the manifest's as well: one that is whole, but another
    # snapshot's, is damage.
    if computed_crc32c(path, data) != stored.crc32c or claimed_crc32c(path, data) != stored.crc32c:
        return Damage(path, f"its {len(data)} bytes aren't those that were written (CRC-32C)")
    return None


def _missing(path: str, stored: StoredObject) -> Damage:
    return Damage(path, f"missing, {stored.size_bytes} bytes were written")


def _other_size(path: str, stored: StoredObject, found_bytes: int) -> Damage:
    what = "truncated" if found_bytes < stored.size_bytes else "changed"
    return Damage(path, f"{what}, has {found_bytes} of {stored.size_bytes} bytes")


def _verify_unlisted(store: Store, snapshot: Snapshot) -> list[Damage]:
    """The shards whose objects an older dagflow didn't list must be decoded to know."""
    damages = []
    for record in snapshot.shards:
        if record.objects:
            continue
        for stored in record.arrays:
            try:
                read_arrays(store, record.path, [stored])
            except (DamagedData, NotFound) as error:
                damages.append(Damage(record.path, str(error)))
                break
    return damages


def _shown(stored: StoredArray) -> str:
    return f"{stored.dtype}{list(stored.shape)}"
