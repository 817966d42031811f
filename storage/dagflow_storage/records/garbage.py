"""Finds and deletes what a run left behind and nobody needs any more.

Needed is what a manifest names, the journal from the second-newest snapshot on, and the
programs of the plans that these were made with. Ledger and leases are never touched, nor is
anything whose place isn't known.
"""

import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.place.listing import FoundObject, remove_empty_folders, walk
from dagflow_storage.place.location import Store
from dagflow_storage.records.snapshots import (
    SNAPSHOTS_FOLDER,
    Snapshot,
    list_snapshots,
    manifest_path,
    step_folder,
)

GRACE_SECONDS = 3600.0
NUM_SNAPSHOTS_TO_REPLAY_FROM = 2
_MARKER = ".dagflow-marker-"
_LEFTOVER = re.compile(
    r".*\.(unfinished|partial)|\.dagflow-(probe|marker)-[0-9a-f]+|manifest\.damaged\.json"
)
_KNOWN_FOLDERS = ("snapshots", "programs", "journal", "metrics", "events")
_SHARD = re.compile(r"(snapshots/step-([0-9]{8,18})/[^/]+)(/.+)?")
_JOURNAL_STEP = re.compile(r"(journal/([^/]+)/step-([0-9]{8,18}))/.+")
_PLAN = re.compile(r"(programs/([^/]+))/.+")


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: one path, with all that lies below it.

    `modified_seconds` is when the youngest part was written, by the store's clock; None if the
    store doesn't say.
    """

    path: str
    why: str
    size_bytes: int
    num_objects: int
    modified_seconds: float | None
    step: int | None = None


@dataclass(frozen=True)
class Needs:
    """What must stay.

    Attributes
    ----------
    folders
        Folders of arrays that manifests name, and the manifests.
    first_journal_step
        The first step whose journal is needed; None for all of it.
    plans
        Plans whose programs are needed, besides those with a journal.
    """

    folders: frozenset[str] = frozenset()
    first_journal_step: int | None = None
    plans: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Settled:
    """What can't be anybody's work in progress, told by the store's own clock alone.

    Attributes
    ----------
    newest_step
        The newest committed snapshot's step; what belongs to a later one is being written.
    newest_manifest_seconds
        When its manifest was written; what was written since may be committed next.
    now_seconds
        When a marker was written just now.
    grace_seconds
        How much older than the marker a thing must be.
    """

    newest_step: int | None
    newest_manifest_seconds: float | None
    now_seconds: float | None
    grace_seconds: float

    def includes(self, garbage: Garbage) -> bool:
        """Whether nobody can be at work on it."""
        if self.newest_step is None or self.newest_manifest_seconds is None:
            return False
        if self.now_seconds is None or garbage.modified_seconds is None:
            return False
        if garbage.step is not None and garbage.step > self.newest_step:
            return False
        limit = min(self.newest_manifest_seconds, self.now_seconds - self.grace_seconds)
        return garbage.modified_seconds < limit


@dataclass(frozen=True)
class GarbageReport:
    """What a collection found.

    Attributes
    ----------
    garbage
        What was deleted, or would be.
    spared
        What nobody needs, but somebody may still be at work on.
    notes
        What couldn't be looked through, and why.
    """

    garbage: tuple[Garbage, ...] = ()
    spared: tuple[Garbage, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def size_bytes(self) -> int:
        """Bytes of what was deleted, or would be."""
        return sum(found.size_bytes for found in self.garbage)


def collect_garbage(
    store: Store,
    *,
    nobody_writes: Callable[[], bool] = lambda: False,
    plans_in_use: Collection[str] = (),
    grace_seconds: float = GRACE_SECONDS,
    dry_run: bool = False,
    on_delete: Callable[[Garbage], None] = lambda _: None,
) -> GarbageReport:
    """Delete what no manifest and no journal needs. Safe while a run writes.

    While somebody may be writing, only what is older than the newest manifest goes, and older
    than `grace_seconds`, and of no later step. These times are compared with each other and with
    a marker that is put now: all are the store's, so it doesn't matter what our clock says.

    Parameters
    ----------
    nobody_writes
        Asked after everything was listed: whether nobody holds the run's lease. If so, whatever
        isn't needed goes, however young: a writer who starts later writes under new paths.
    plans_in_use
        Names of plans whose programs stay, besides those that are needed.
    dry_run
        Delete nothing, and only tell.
    on_delete
        Called after each deletion.

    Raises
    ------
    FormatTooNew
        If a newer dagflow wrote here: this one can't know what is needed.
    """
    # This order is what makes it safe: whatever is committed between listing and reading is seen
    # as needed, and what is written after the listing isn't known here at all.
    found, now_seconds = _list_with_time(store)
    idle = nobody_writes()
    manifests, notes = _read_manifests(store)
    journal_from = first_journal_step(list(manifests))
    needs = Needs(
        folders=frozenset(_needed_folders(manifests)),
        first_journal_step=journal_from,
        plans=frozenset({*plans_in_use, *_plans(manifests)}),
    )
    garbage = find_garbage(found, needs, but_snapshots=bool(notes))
    settled = _settled(manifests, found, now_seconds, grace_seconds)
    doomed = [item for item in garbage if idle or settled.includes(item)]
    report = GarbageReport(
        tuple(doomed), tuple(item for item in garbage if item not in doomed), tuple(notes)
    )
    if not dry_run:
        for item in doomed:
            store.delete(item.path)
            on_delete(item)
        _remove_empty(store, doomed, everywhere=idle)
    return report


def first_journal_step(snapshot_steps: Iterable[int]) -> int | None:
    """The first step whose journal may be replayed: the second-newest snapshot's."""
    newest = sorted(snapshot_steps)[-NUM_SNAPSHOTS_TO_REPLAY_FROM:]
    return newest[0] if newest else None


def find_garbage(
    found: Sequence[FoundObject], needs: Needs, *, but_snapshots: bool = False
) -> list[Garbage]:
    """What isn't needed, of everything that lies in a store; a pure function.

    Parameters
    ----------
    but_snapshots
        Leave out what lies with the snapshots.
    """
    leftovers = [item for item in found if _is_leftover(item.path)]
    rest = [item for item in found if not _is_leftover(item.path)]
    garbage = [_garbage([item], item.path, "left behind") for item in leftovers]
    garbage += _unneeded_journal(rest, needs)
    garbage += _unneeded_programs(rest, needs)
    garbage += _unneeded_shards(rest, needs)
    if but_snapshots:
        garbage = [g for g in garbage if not g.path.startswith(f"{SNAPSHOTS_FOLDER}/")]
    return sorted(garbage, key=lambda item: item.path)


def _is_leftover(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    known = not folder or folder.partition("/")[0] in _KNOWN_FOLDERS
    return known and _LEFTOVER.fullmatch(name) is not None


def _unneeded_shards(found: Sequence[FoundObject], needs: Needs) -> list[Garbage]:
    shards: dict[tuple[str, int], list[FoundObject]] = defaultdict(list)
    for item in found:
        if match := _SHARD.fullmatch(item.path):
            shards[match[1], int(match[2])].append(item)
    garbage = []
    for (path, step), members in shards.items():
        if path in needs.folders:
            continue
        if not any(folder.startswith(f"{path}/") for folder in needs.folders):
            garbage.append(_garbage(members, path, "no manifest names it", step))
            continue
        garbage += _unneeded_parts(path, step, members, needs)
    return garbage


def _unneeded_parts(
    path: str, step: int, members: Sequence[FoundObject], needs: Needs
) -> list[Garbage]:
    """The arrays of a shard that no manifest names, while one names others of the same shard."""
    parts: dict[str, list[FoundObject]] = defaultdict(list)
    for item in members:
        label, _, below = item.path.removeprefix(f"{path}/").partition("/")
        if below:
            parts[f"{path}/{label}"].append(item)
    # The whole shard's age counts: its writer goes from one array to the next.
    age = _youngest(members)
    return [
        _garbage(items, folder, "no manifest names it", step, age)
        for folder, items in parts.items()
        if folder not in needs.folders
    ]


def _unneeded_journal(found: Sequence[FoundObject], needs: Needs) -> list[Garbage]:
    if needs.first_journal_step is None:
        return []
    steps: dict[tuple[str, int], list[FoundObject]] = defaultdict(list)
    for item in found:
        if match := _JOURNAL_STEP.fullmatch(item.path):
            steps[match[1], int(match[3])].append(item)
    return [
        _garbage(members, path, "older than the second-newest snapshot", step)
        for (path, step), members in steps.items()
        if step < needs.first_journal_step
    ]


def _unneeded_programs(found: Sequence[FoundObject], needs: Needs) -> list[Garbage]:
    plans: dict[tuple[str, str], list[FoundObject]] = defaultdict(list)
    needed = set(needs.plans)
    for item in found:
        if match := _PLAN.fullmatch(item.path):
            plans[match[1], match[2]].append(item)
        first = needs.first_journal_step
        match = _JOURNAL_STEP.fullmatch(item.path)
        if match and (first is None or int(match[3]) >= first):
            needed.add(match[2])
    # The latest plan is the one at work, whether or not anything was written under it yet. Where
    # times aren't told, each may be.
    ages = {key: _youngest(members) for key, members in plans.items()}
    latest = max((age for age in ages.values() if age is not None), default=None)
    return [
        _garbage(plans[path, plan], path, "the programs of a plan that nothing refers to")
        for (path, plan), age in ages.items()
        if plan not in needed and age is not None and age != latest
    ]


def _garbage(
    members: Sequence[FoundObject],
    path: str,
    why: str,
    step: int | None = None,
    modified_seconds: float | None = None,
) -> Garbage:
    if modified_seconds is None:
        modified_seconds = _youngest(members)
    size = sum(item.size_bytes for item in members)
    return Garbage(path, why, size, len(members), modified_seconds, step)


def _youngest(members: Sequence[FoundObject]) -> float | None:
    times = [item.modified_seconds for item in members]
    known = [time for time in times if time is not None]
    return max(known) if len(known) == len(times) else None


def _list_with_time(store: Store) -> tuple[list[FoundObject], float | None]:
    """Everything in the store, and what its own clock said just before."""
    marker = f"{_MARKER}{uuid.uuid4().hex}"
    store.write_bytes(marker, b"")
    try:
        found = list(walk(store))
    finally:
        store.delete(marker)
    now_seconds = next((item.modified_seconds for item in found if item.path == marker), None)
    return [item for item in found if item.path != marker], now_seconds


def _read_manifests(store: Store) -> tuple[dict[int, Snapshot], list[str]]:
    manifests: dict[int, Snapshot] = {}
    notes = []
    for step in list_snapshots(store):
        try:
            manifests[step] = Snapshot.open(store, step)
        except NotFound:
            continue  # deleted since it was listed
        except DamagedData as error:
            notes.append(
                f"Nothing under {SNAPSHOTS_FOLDER}/ is deleted, because one manifest doesn't say what "
                f"it needs: {error}."
            )
    return manifests, notes


def _needed_folders(manifests: Mapping[int, Snapshot]) -> set[str]:
    needed: set[str] = set()
    for step, snapshot in manifests.items():
        needed.add(manifest_path(step))
        for record in snapshot.shards:
            own = record.path.startswith(f"{step_folder(step)}/")
            # A shard that was written for this snapshot is needed whole.
            needed |= {record.path} if own else record.array_folders
    return needed


def _plans(manifests: Mapping[int, Snapshot]) -> set[str]:
    plans = (snapshot.meta.get("plan") for snapshot in manifests.values())
    return {plan for plan in plans if isinstance(plan, str)}


def _settled(
    manifests: Mapping[int, Snapshot],
    found: Sequence[FoundObject],
    now_seconds: float | None,
    grace_seconds: float,
) -> Settled:
    newest = max(manifests, default=None)
    times = {item.path: item.modified_seconds for item in found}
    written = None if newest is None else times.get(manifest_path(newest))
    return Settled(newest, written, now_seconds, grace_seconds)


def _remove_empty(store: Store, deleted: Sequence[Garbage], *, everywhere: bool) -> None:
    """Remove empty folders: where something was deleted, or all that a crash left behind."""
    folders = {"/".join(item.path.split("/")[:2]) for item in deleted if "/" in item.path}
    for folder in sorted(_KNOWN_FOLDERS if everywhere else folders):
        remove_empty_folders(store, folder)
