"""A worker's side of the journal: what its tasks send is written behind them, and found again.

Tasks put what crosses a stage's boundary here, as they return it; a thread writes it to the store
while the next ones run. Until it is written it is kept, so what a task has sent can be sent again
(`tasks.recall`): to a stage that was lost and is being rebuilt elsewhere.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dagflow_storage import DagflowError, Store
from dagflow_storage.place import fields
from dagflow_storage.place.documents import sound
from dagflow_storage.records.journal import Entry, EntryKey, Segment, read_segments, write_segment
from dagflow_storage.write_behind import WriteBehind
from dagflow_tasks.layout import checked_layout, pack, unpack
from dagflow_tasks.train.references import StageRef
from dagflow_tasks.train.results import Decision, JournalStats
from dagflow_tasks.train.state import from_array, to_array

# Gathered before they are written. On S3 a segment costs two requests, whatever its size; in a folder
# next to nothing, while what waits takes memory.
_SEGMENT_BYTES, _FOLDER_SEGMENT_BYTES = 8 << 20, 2 << 20
# Beyond this the tasks wait for the store: it slows the run, and doesn't break it.
_SPOOL_BYTES = 512 << 20
# The index of what is written is a cache of the store's listing; nobody asks for older steps often.
_INDEXED_STEPS = 256
# What fails so often for another reason than the store's would hold up all that comes after it.
_MOST_FAILURES = 4

_Where = tuple[str, str, int]  # run, plan, step


@dataclass(frozen=True)
class Sent:
    """What one task sent: tensors by name, and facts that fit into JSON."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(eq=False)
class _Batch:
    """Entries of one step and stage that will be written together."""

    ref: StageRef
    step: int
    entries: dict[EntryKey, Sent] = field(default_factory=dict)
    num_bytes: int = 0
    num_failures: int = 0


class Journal:
    """The journal of one process, for all stages that run in it. Safe to use from any thread.

    Parameters
    ----------
    write : callable
        As `write_segment`.
    """

    def __init__(self, write: Callable[..., Segment] = write_segment) -> None:
        self.name = uuid.uuid4().hex[:12]
        self._write = write
        self._sealed = WriteBehind[_Batch]("dagflow-journal", self._write_out, at_once=1)
        # Guards the following, too.
        self._changed = self._sealed.changed
        self._open: dict[tuple[tuple[str, str, int], int], _Batch] = {}
        self._segments: dict[_Where, dict[EntryKey, Segment]] = {}
        # By run, since it began here.
        self._written_bytes: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    # What tasks do

    def put(self, ref: StageRef, step: int, key: EntryKey, sent: Sent) -> None:
        """Keep what a task sent, and have it written; once is enough.

        Waits while more than `_SPOOL_BYTES` are unwritten.
        """
        if not ref.journal:
            return
        where = (ref.run_id, ref.plan, step)
        with self._changed:
            if key in self._segments.get(where, ()) or self._in_memory(ref, step, key) is not None:
                return
            self._make_room()
            batch = self._open.setdefault((ref.key, step), _Batch(ref, step))
            batch.entries[key] = sent
            batch.num_bytes += sent.num_bytes
            if batch.num_bytes >= _segment_bytes(ref.store) and ref.journal == 1:
                self._seal(ref, step)

    def end_step(self, ref: StageRef, step: int) -> None:
        """Have what is left of a stage's step written: nothing more will come."""
        if not ref.journal or (step + 1) % ref.journal:
            return
        with self._changed:
            for key, open_step in [k for k in self._open if k[0] == ref.key and k[1] <= step]:
                assert key == ref.key
                self._seal(ref, open_step)

    def find(
        self, ref: StageRef, step: int, key: EntryKey, names: Collection[str] | None = None
    ) -> Sent | None:
        """What a task sent, or the tensors with these names of it; None if nobody knows."""
        with self._changed:
            found = self._in_memory(ref, step, key)
        if found is None:
            segment = self._segment(ref, step, key)
            return None if segment is None else read_sent(ref.store, segment, key, names)
        if names is None:
            return found
        return Sent({n: t for n, t in found.tensors.items() if n in names}, found.facts)

    def forget(self, run_id: str, *, but_plan: str | None = None) -> None:
        """Forget a run, or its other plans: what isn't written yet, and where the rest is."""
        with self._changed:
            for where in [w for w in self._segments if w[0] == run_id and w[1] != but_plan]:
                del self._segments[where]
            for numbers in (self._written_bytes, self._seconds):
                numbers.pop(run_id, None)
            self._drop(lambda b: b.ref.run_id == run_id and b.ref.plan != but_plan)

    def disown(self, run_id: str, stage: int, from_step: int, seconds: float) -> None:
        """Drop what a stage has sent from a step on: it has turned out to be wrong.

        Waits for what is just being written, so that whoever deletes it afterwards finds it.
        """

        def is_wrong(batch: _Batch) -> bool:
            ref = batch.ref
            return ref.run_id == run_id and ref.stage == stage and batch.step >= from_step

        with self._changed:
            self._drop(is_wrong, seconds)
            for where in [w for w in self._segments if w[0] == run_id and w[2] >= from_step]:
                known = self._segments[where]
                self._segments[where] = {k: s for k, s in known.items() if k.stage != stage}

    def flush(self, seconds: float) -> bool:
        """Have everything written now; False if that took longer than so many seconds."""
        with self._changed:
            self._seal_all()
            return self._sealed.flush(seconds)

    def stats(self, run_id: str = "") -> JournalStats:
        """Say how the journal fares, and how much it has written of a run since that began here."""
        with self._changed:
            return JournalStats(
                self.name,
                self._written_bytes.get(run_id, 0),
                self._seconds.get(run_id, 0.0),
                self._waiting_bytes,
                self._sealed.trouble,
            )

    # Looking

    def _in_memory(self, ref: StageRef, step: int, key: EntryKey) -> Sent | None:
        batches = [self._open.get((ref.key, step)), *self._sealed.waiting]
        for batch in batches:
            if batch is not None and (batch.ref.key, batch.step) == (ref.key, step):
                found = batch.entries.get(key)
                if found is not None:
                    return found
        return None

    def _segment(self, ref: StageRef, step: int, key: EntryKey) -> Segment | None:
        where = (ref.run_id, ref.plan, step)
        with self._changed:
            known = self._segments.get(where, {}).get(key)
        if known is None:
            self.look(ref, step, {key.stage})
            with self._changed:
                known = self._segments.get(where, {}).get(key)
        return known

    def look(self, ref: StageRef, step: int, stages: Collection[int]) -> None:
        """Learn from the store what some stages' workers have written of a step."""
        found = read_segments(ref.store, ref.plan, step, stages)
        with self._changed:
            self._index((ref.run_id, ref.plan, step), found)

    def _index(self, where: _Where, segments: Collection[Segment]) -> None:
        """Remember where entries of a step are; the oldest are looked up again, if ever."""
        known = self._segments.setdefault(where, {})
        for segment in segments:
            known.update(dict.fromkeys(segment.facts, segment))
        while len(self._segments) > _INDEXED_STEPS:
            del self._segments[next(iter(self._segments))]

    # Writing

    def _make_room(self) -> None:
        """Wait for the store, or, if it refuses, give up on the oldest entries."""
        if self._waiting_bytes < _SPOOL_BYTES:
            return
        self._seal_all()
        sealed = self._sealed
        self._changed.wait_for(lambda: self._waiting_bytes < _SPOOL_BYTES or sealed.is_refused)
        while self._waiting_bytes >= _SPOOL_BYTES and sealed.waiting:
            sealed.waiting.popleft()
        self._changed.notify_all()

    @property
    def _waiting_bytes(self) -> int:
        return sum(batch.num_bytes for batch in (*self._open.values(), *self._sealed.waiting))

    def _drop(self, unwanted: Callable[[_Batch], bool], seconds: float = 0.0) -> None:
        """Give up entries that aren't written, or not yet by then."""
        self._open = {key: batch for key, batch in self._open.items() if not unwanted(batch)}
        self._sealed.drop(unwanted, seconds)

    def _seal_all(self) -> None:
        for ref, step in [(batch.ref, batch.step) for batch in self._open.values()]:
            self._seal(ref, step)

    def _seal(self, ref: StageRef, step: int) -> None:
        batch = self._open.pop((ref.key, step), None)
        if batch is not None:
            self._sealed.add(batch)

    def _write_out(self, batches: list[_Batch]) -> Iterator[_Batch]:
        for batch in batches:
            begin = time.perf_counter()
            try:
                segment = self._write_batch(batch)
            except DagflowError:
                # Permanent for this request, not for the run: disks are emptied, rights granted.
                raise
            except Exception:
                batch.num_failures += 1
                if batch.num_failures < _MOST_FAILURES:
                    raise
            else:
                self._written(batch, segment, time.perf_counter() - begin)
            yield batch

    def _write_batch(self, batch: _Batch) -> Segment:
        entries = [encode(key, sent) for key, sent in batch.entries.items()]
        ref = batch.ref
        return self._write(ref.store, ref.plan, batch.step, ref.stage, entries)

    def _written(self, batch: _Batch, segment: Segment, seconds: float) -> None:
        where = (batch.ref.run_id, batch.ref.plan, batch.step)
        with self._changed:
            if batch in self._sealed.waiting:  # it may have been forgotten meanwhile
                self._seconds[batch.ref.run_id] += seconds
                self._written_bytes[batch.ref.run_id] += batch.num_bytes
                self._index(where, [segment])


def _segment_bytes(store: Store) -> int:
    return _SEGMENT_BYTES if store.folder("") is None else _FOLDER_SEGMENT_BYTES


def encode(key: EntryKey, sent: Sent) -> Entry:
    """Turn what was sent into what is stored, with how each tensor lies in memory."""
    arrays, dtypes, layouts = {}, {}, {}
    for name, tensor in sent.tensors.items():
        packed, layout = pack(tensor)
        arrays[name] = to_array(packed)
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if layout is not None:
            layouts[name] = layout
    facts = {**sent.facts, **({"layouts": layouts} if layouts else {})}
    return Entry(key, arrays, dtypes, facts)


def read_sent(
    store: Store, segment: Segment, key: EntryKey, names: Collection[str] | None = None
) -> Sent:
    """Read what was sent from a segment.

    Raises
    ------
    NotFound, DamagedData, StoreUnreachable
    """
    facts = dict(segment.facts[key])
    with sound(f"what {segment.path} in {store!r} says of {key} is damaged"):
        layouts = fields.members(facts.pop("layouts", {}), "layouts")
        _check_facts(facts)
    dtypes = segment.dtypes(key)
    tensors = {}
    for name, array in segment.read(store, key, names).items():
        packed = from_array(array, dtypes[name])
        with sound(f"how {name!r} lay, by {segment.path} in {store!r}, is damaged"):
            layout = checked_layout(layouts.get(name), packed.shape, packed.dtype)
        tensors[name] = unpack(packed, layout)
    return Sent(tensors, facts)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError unless what an entry says can be what tasks say; what is missing may be."""
    for name, value in facts.items():
        if name == "finite":
            fields.flag(value, name)
        elif name == "loss":
            fields.number(value, name)
        elif name == "losses":
            for loss in fields.items(value, name):
                fields.number(loss, "a loss")
        elif name == "non_finite":
            for index in fields.items(value, name):
                fields.integer(index, "a micro-batch")
        elif name == "decision" and value is not None:
            Decision.from_json(value)


def most_waiting_bytes() -> int:
    """Return how much a process's journal keeps that isn't written yet, at most about."""
    return _SPOOL_BYTES


JOURNAL = Journal()

__all__ = ["JOURNAL", "EntryKey", "Journal", "Sent", "read_sent"]
