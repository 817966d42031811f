"""The journal: what crossed the boundaries of stages, step by step, for whoever must replay one.

::

    journal/PLAN/step-00000012/2-3f9a.../c/...        a segment: entries of stage 2
    journal/PLAN/step-00000012/2-3f9a.../zarr.json    written last

An entry is what one task sent, tensors and a few facts. Entries are written in segments, as many at
a time as have gathered, and read one by one. A segment is one zarr array of bytes, which says in its
attributes whose they are: each object is a request, and of those a segment of any size should cost
few. Nothing is overwritten: the same entry written twice has the same content, and either is read.
"""

import re
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import numpy as np

from dagflow_storage.arrays.arrays import ALIGNMENT_BYTES, aligned_empty, chunk_elements, codec_for
from dagflow_storage.arrays.flat import AnyArray, FlatArray
from dagflow_storage.arrays.metadata import DATA_TYPES
from dagflow_storage.errors import FormatTooNew, NotFound
from dagflow_storage.place import fields
from dagflow_storage.place.documents import JSON, sound
from dagflow_storage.place.location import Store

JOURNAL_FORMAT = 3
_MARK = "dagflow_journal"
_FOLDER = "journal"
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_PARALLEL_READS = 8
_STORED_AS = frozenset(np.dtype(name).newbyteorder("<").str for name in DATA_TYPES)


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
class StoredTensor:
    """Where a segment's bytes hold a tensor; `stored_as` is its dtype, or NumPy's stand-in for it."""

    name: str
    dtype: str
    stored_as: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def from_json(cls, data: Any) -> "StoredTensor":
        """As it comes out of a segment's index; ValueError if it is none."""
        given = fields.members(data, "a tensor", "name", "dtype", "stored_as", "shape", "offset")
        stored_as = fields.text(given["stored_as"], "stored_as")
        if stored_as not in _STORED_AS:
            raise ValueError(f"a tensor is stored as {stored_as[:80]!r}")
        return cls(
            fields.text(given["name"], "a tensor's name"),
            fields.text(given["dtype"], "a tensor's dtype"),
            stored_as,
            fields.shape(given["shape"], "a tensor's shape", np.dtype(stored_as).itemsize),
            fields.integer(given["offset"], "a tensor's offset"),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) * np.dtype(self.stored_as).itemsize


@dataclass(frozen=True)
class Segment:
    """Entries of one step and stage as they lie in the store."""

    path: str
    facts: Mapping[EntryKey, Mapping[str, Any]]
    index: Mapping[EntryKey, tuple[StoredTensor, ...]]

    def read(
        self, store: Store, key: EntryKey, names: Iterable[str] | None = None
    ) -> dict[str, AnyArray]:
        """The arrays of an entry, or those of it with these names.

        Raises
        ------
        NotFound, DamagedData, StoreUnreachable
            As `FlatArray.read_into` does.
        """
        wanted = None if names is None else set(names)
        stored = [s for s in self.index[key] if wanted is None or s.name in wanted]
        if not stored:
            return {}
        array = FlatArray.open(store, self.path)
        array.check_there([(s.offset, s.offset + s.num_bytes) for s in stored])
        raw = [(s.offset, aligned_empty(s.num_bytes, np.dtype(np.uint8))) for s in stored]
        array.read_into(raw)
        return {
            s.name: part.view(s.stored_as).reshape(s.shape)
            for s, (_, part) in zip(stored, raw, strict=True)
        }

    def dtypes(self, key: EntryKey) -> dict[str, str]:
        """The labels of an entry's dtypes, by array name."""
        return {stored.name: stored.dtype for stored in self.index[key]}


def write_segment(
    store: Store, plan: str, step: int, stage: int, entries: Sequence[Entry]
) -> Segment:
    """Write entries, which exist once their index does.

    Safe to run twice, also at once: each call writes under a path of its own. Survives the writer,
    not a power cut at the store: the journal of a few steps isn't worth waiting for a disk.
    """
    path = f"{_step_folder(plan, step)}/{stage}-{uuid.uuid4().hex[:12]}"
    facts = {entry.key: dict(entry.facts) for entry in entries}
    segment = Segment(path, facts, _layout(entries))
    raw = _gathered(segment, entries)
    codec = codec_for(store, _commonest_itemsize(segment))
    chunk = chunk_elements(raw.size, 1)
    array = FlatArray.create(
        store,
        path,
        raw.dtype,
        raw.size,
        chunk,
        _encode(segment),
        codec,
        visible=False,
        read_soon=False,  # only after a loss
    )
    array.write(0, raw)
    array.put_metadata(durable=False)
    return segment


def _layout(entries: Sequence[Entry]) -> dict[EntryKey, tuple[StoredTensor, ...]]:
    index, end = {}, 0
    for entry in entries:
        stored = []
        for name, array in entry.arrays.items():
            offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            dtype = entry.dtypes[name]
            stored.append(StoredTensor(name, dtype, array.dtype.str, array.shape, offset))
            end = offset + array.nbytes
        index[entry.key] = tuple(stored)
    return index


def _gathered(segment: Segment, entries: Sequence[Entry]) -> AnyArray:
    stored = [item for items in segment.index.values() for item in items]
    raw = np.zeros(max((s.offset + s.num_bytes for s in stored), default=0), np.uint8)
    arrays = [array for entry in entries for array in entry.arrays.values()]
    for item, array in zip(stored, arrays, strict=True):
        target = raw[item.offset : item.offset + item.num_bytes]
        target.view(item.stored_as).reshape(item.shape)[...] = array
    return raw


def _commonest_itemsize(segment: Segment) -> int:
    """The size of most bytes' elements: shuffling by it lets them shrink."""
    sizes = Counter[int]()
    for item in (item for items in segment.index.values() for item in items):
        sizes[np.dtype(item.stored_as).itemsize] += item.num_bytes
    return max(sizes, key=lambda size: sizes[size], default=1)


def read_segments(
    store: Store, plan: str, step: int, stages: Collection[int] | None = None
) -> list[Segment]:
    """The segments of a step that are there, of these stages or of all; unfinished ones are left out."""
    folder = _step_folder(plan, step)
    wanted = None if stages is None else set(map(str, stages))
    names = [n for n in store.list(folder) if wanted is None or n.partition("-")[0] in wanted]
    paths = [f"{folder}/{name}" for name in names]
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
    where = f"{path} in {store!r}"
    try:
        array = FlatArray.open(store, path)
    except NotFound:
        return None  # never finished, or trimmed since it was listed
    with sound(f"the journal's segment {where} has no index"):
        attributes = fields.members(array.attributes, "its attributes", _MARK)
        document = fields.members(attributes[_MARK], "it", "format_version")
        found = fields.integer(document["format_version"], "format_version")
        if found > JOURNAL_FORMAT:
            raise FormatTooNew(
                f"the journal's segment {where} has format version {found}, this dagflow reads "
                f"versions up to {JOURNAL_FORMAT}: upgrade dagflow"
            )
        if found < JOURNAL_FORMAT:
            return None  # its tensors' strides aren't said in full: the last snapshot stands
        facts: dict[EntryKey, Mapping[str, Any]] = {}
        index: dict[EntryKey, tuple[StoredTensor, ...]] = {}
        for item in fields.items(document.get("entries"), "entries"):
            key, facts_of_it, tensors = _decode(item)
            if key in facts:
                raise ValueError(f"{key} is in it twice")
            facts[key], index[key] = facts_of_it, tensors
        _check_places(array, [stored for tensors in index.values() for stored in tensors])
        return Segment(path, facts, index)


def _decode(item: Any) -> tuple[EntryKey, Mapping[str, Any], tuple[StoredTensor, ...]]:
    given = fields.members(item, "an entry", "kind", "stage", "index", "facts", "arrays")
    key = EntryKey(
        fields.text(given["kind"], "kind"),
        fields.integer(given["stage"], "stage"),
        fields.integer(given["index"], "index"),
    )
    tensors = tuple(map(StoredTensor.from_json, fields.items(given["arrays"], "arrays")))
    if len({stored.name for stored in tensors}) < len(tensors):
        raise ValueError(f"{key} has two tensors of the same name")
    return key, dict(fields.members(given["facts"], "facts")), tensors


def _check_places(array: FlatArray, tensors: Sequence[StoredTensor]) -> None:
    """Raise ValueError unless a segment's tensors lie beside each other in its bytes."""
    if array.dtype != np.uint8:
        raise ValueError(f"its elements are {array.dtype}, not bytes")
    end = 0
    for stored in sorted(tensors, key=lambda stored: (stored.offset, stored.num_bytes)):
        if stored.num_bytes and stored.offset < end:
            raise ValueError(f"{stored.name!r} overlaps the tensor before")
        end = max(end, stored.offset + stored.num_bytes)
    if end > len(array):
        raise ValueError(f"its tensors end at byte {end} of {len(array)}")


def _encode(segment: Segment) -> dict[str, JSON]:
    entries: list[JSON] = [
        {
            "kind": key.kind,
            "stage": key.stage,
            "index": key.index,
            "facts": segment.facts[key],
            "arrays": [asdict(stored) for stored in segment.index[key]],
        }
        for key in segment.facts
    ]
    return {_MARK: {"format_version": JOURNAL_FORMAT, "entries": entries}}


def _step_folder(plan: str, step: int) -> str:
    return f"{_FOLDER}/{plan}/step-{step:08d}"
