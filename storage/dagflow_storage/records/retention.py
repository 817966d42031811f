"""Which snapshots are kept, and the deletion of the others."""

import math
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass

from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.place.location import Store
from dagflow_storage.records.snapshots import (
    Snapshot,
    delete_snapshot,
    list_snapshots,
    list_step_folders,
    step_folder,
)


@dataclass(frozen=True)
class Retention:
    """Which snapshots of a run are kept; one that any of the rules names stays.

    Attributes
    ----------
    newest
        The last so many, at least 1.
    every
        The first in each so many steps, for good: 0, 1000, 2000, ... for 1000.
    best
        The so many with the lowest loss.
    """

    newest: int = 3
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        if self.newest < 1:
            raise ValueError(f"newest is {self.newest}, at least 1 snapshot must be kept")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every is {self.every} steps, must be at least 1 or None")
        if self.best < 0:
            raise ValueError(f"best is {self.best}, must be at least 0")

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, of those with a snapshot; their losses by step, None if unknown.

        What it drops it would never have kept later, whatever snapshots come: it doesn't matter
        how often it is applied.
        """
        steps = sorted(losses)
        kept = set(steps[-self.newest :])
        if self.every is not None:
            first = {step // self.every: step for step in reversed(steps)}
            kept |= set(first.values())
        if self.best:
            known = {s: loss for s, loss in losses.items() if loss is not None}
            finite = [s for s, loss in known.items() if not math.isnan(loss)]
            kept |= set(sorted(finite, key=lambda s: (known[s], s))[: self.best])
        return kept


@dataclass(frozen=True)
class SnapshotFacts:
    """What retention must know of a snapshot: its loss, and the folders that it needs."""

    loss: float | None
    array_folders: frozenset[str]


def apply_retention(
    store: Store,
    retention: Retention,
    facts: MutableMapping[int, SnapshotFacts] | None = None,
    in_flight: Collection[int] = (),
) -> list[int]:
    """Delete the snapshots that needn't be kept, and unfinished ones older than the newest kept.

    Unfinished ones that are newer are left alone: somebody may be writing them. So is whatever
    a remaining manifest refers to. A snapshot whose manifest is damaged counts as unfinished.

    Parameters
    ----------
    facts
        What earlier calls found out, to be passed again so that each manifest is read once; to be
        forgotten when the run goes back to an older snapshot.
    in_flight
        Steps whose snapshots are being written, and are left alone though newer ones are done.

    Returns
    -------
    list of int
        The steps of which something was deleted.
    """
    facts = {} if facts is None else facts
    _learn(store, facts)
    kept = retention.kept({step: known.loss for step, known in facts.items()})
    if not kept:
        return []
    spare = {folder for step in kept for folder in facts[step].array_folders}
    floor = sorted(facts)[-retention.newest :][0]
    doomed = [
        step
        for step in list_step_folders(store)
        if step not in kept
        and step not in in_flight
        # Of one that lent something there is always a rest, and it isn't looked through each time.
        and (step in facts or (step < floor and not _lends(step, spare)))
    ]
    for step in doomed:
        delete_snapshot(store, step, spare)
        facts.pop(step, None)
    return doomed


def delete_old_snapshots(store: Store, keep: int) -> None:
    """Keep the newest `keep` complete snapshots: `apply_retention` with nothing else to keep."""
    if keep < 1:
        raise ValueError(f"keep is {keep}, at least 1 snapshot must be kept")
    apply_retention(store, Retention(newest=keep))


def _lends(step: int, spare: Collection[str]) -> bool:
    return any(folder.startswith(f"{step_folder(step)}/") for folder in spare)


def _learn(store: Store, facts: MutableMapping[int, SnapshotFacts]) -> None:
    steps = list_snapshots(store)
    for step in facts.keys() - set(steps):
        del facts[step]
    for step in steps:
        if step in facts:
            continue
        try:
            snapshot = Snapshot.open(store, step)
        except (DamagedData, NotFound):
            continue
        loss = snapshot.meta.get("loss")
        known = float(loss) if isinstance(loss, int | float) else None
        facts[step] = SnapshotFacts(known, frozenset(snapshot.array_folders))
