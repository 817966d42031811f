"""The journal: what crossed the boundaries of stages, step by step, for whoever must replay one.

::

    journal/PLAN/step-00000012/2-3f9a.../float32/...   a segment: entries of stage 2
    journal/PLAN/step-00000012/2-3f9a.../index.json    written last

An entry is what one task sent, tensors and a few facts. Entries are written in segments, as many at
a time as have gathered, and read one by one. Nothing is overwritten: the same entry written twice
has the same content, and either is read.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dagflow_storage.arrays import ArraySpec, StoredArray, read_arrays, write_arrays
from dagflow_storage.documents import encode_document, read_document
from dagflow_storage.errors import DamagedData, NotFound
from dagflow_storage.flat import AnyArray
from dagflow_storage.location import Store

JOURNAL_FORMAT = 1
_FOLDER = "journal"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PARALLEL_READS = 8


@dataclass(frozen=True, order=True)
class EntryKey:
    """Names an entry within a step: which stage's task sent it, and for which micro-batch."""

    kind: str
    stage: int
    index: int


@dataclass(frozen=True)
class Entry:
    """What one task sent.

    Attributes
    ----------
    key : EntryKey
    arrays : mapping
        NumPy arrays by name; what NumPy lacks (bfloat16) as integers of the same size.
    dtypes : mapping
        Label of each array's dtype.
    facts : mapping
        JSON.
    """

    key: EntryKey
    arrays: Mapping[str, AnyArray]
    dtypes: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays, uncompressed."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Segment:
    """Entries of one step and stage as they lie in the store."""

    path: str
    facts: Mapping[EntryKey, Mapping[str, Any]]
    index: Mapping[EntryKey, tuple[StoredArray, ...]]

    def read(
        self, store: Store, key: EntryKey, names: Iterable[str] | None = None
    ) -> dict[str, AnyArray]:
        """The arrays of an entry, or those of it with these names.

        Raises
        ------
        NotFound, DamagedData, StoreUnreachable
            As `read_arrays` does.
        """
        wanted = None if names is None else set(names)
        stored = [s for s in self.index[key] if wanted is None or s.role in wanted]
        found = read_arrays(store, self.path, stored)
        return {s.role: found[s.name] for s in stored}

    def dtypes(self, key: EntryKey) -> dict[str, str]:
        """The labels of an entry's dtypes, by array name."""
        return {stored.role: stored.dtype for stored in self.index[key]}


def write_segment(
    store: Store, plan: str, step: int, stage: int, entries: Sequence[Entry]
) -> Segment:
    """Write entries, which exist once their index does.

    Safe to run twice, also at once: each call writes under a path of its own. Survives the writer,
    not a power cut at the store: the journal of a few steps isn't worth waiting for a disk.
    """
    path = f"{_step_folder(plan, step)}/{stage}-{uuid.uuid4().hex[:12]}"
    # An array's role is its name within the entry: names must differ within a segment.
    arrays = {
        f"{number}/{name}": array
        for number, entry in enumerate(entries)
        for name, array in entry.arrays.items()
    }
    specs = [
        ArraySpec(f"{number}/{name}", name, entry.dtypes[name], array.shape)
        for number, entry in enumerate(entries)
        for name, array in entry.arrays.items()
    ]
    stored = {s.name: s for s in write_arrays(store, path, specs, arrays.__getitem__)}
    segment = Segment(
        path,
        {entry.key: dict(entry.facts) for entry in entries},
        {
            entry.key: tuple(stored[f"{number}/{name}"] for name in entry.arrays)
            for number, entry in enumerate(entries)
        },
    )
    store.write_bytes(f"{path}/index.json", _encode(segment))
    return segment


def read_segments(store: Store, plan: str, step: int) -> list[Segment]:
    """All segments of a step that are there, whoever wrote them; unfinished ones are left out."""
    folder = _step_folder(plan, step)
    paths = [f"{folder}/{name}" for name in store.list(folder)]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = pool.map(lambda path: _read_index(store, path), paths)
        return [segment for segment in found if segment is not None]


def journalled_steps(store: Store, plan: str) -> list[int]:
    """The steps that the journal of a plan says something of, ascending."""
    names = store.list(f"{_FOLDER}/{plan}")
    return sorted(int(match[1]) for match in map(_STEP_FOLDER.fullmatch, names) if match)


def trim_journal(store: Store, before_step: int) -> None:
    """Delete what is known of earlier steps, of all plans, and what is left of other plans' ends."""
    for plan in store.list(_FOLDER):
        for step in journalled_steps(store, plan):
            if step < before_step:
                store.delete(_step_folder(plan, step))


def delete_segments(store: Store, plan: str, from_step: int, stage: int) -> None:
    """Delete what a stage has sent from a step on: it has turned out to be wrong."""
    for step in journalled_steps(store, plan):
        if step >= from_step:
            folder = _step_folder(plan, step)
            for name in store.list(folder):
                if name.startswith(f"{stage}-"):
                    store.delete(f"{folder}/{name}")


def _read_index(store: Store, path: str) -> Segment | None:
    try:
        document = read_document(store, f"{path}/index.json", JOURNAL_FORMAT)
    except NotFound:
        return None  # never finished, or trimmed since it was listed
    try:
        facts, index = {}, {}
        for item in document["entries"]:
            key = EntryKey(item["kind"], item["stage"], item["index"])
            facts[key] = dict(item["facts"])
            index[key] = tuple(StoredArray.from_json(stored) for stored in item["arrays"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedData(f"{path}/index.json in {store!r} is no index: {error!r}") from error
    return Segment(path, facts, index)


def _encode(segment: Segment) -> bytes:
    entries = [
        {
            "kind": key.kind,
            "stage": key.stage,
            "index": key.index,
            "facts": segment.facts[key],
            "arrays": [stored.to_json() for stored in segment.index[key]],
        }
        for key in segment.facts
    ]
    return encode_document(JOURNAL_FORMAT, {"entries": entries})


def _step_folder(plan: str, step: int) -> str:
    return f"{_FOLDER}/{plan}/step-{step:08d}"
