"""What a snapshot's manifest says: every array, and every object that they lie in.

A manifest carries a checksum of itself, so one that somebody edited is noticed. Each object is
listed with its size and checksum, so whole, truncated, changed and missing can be told apart
without decoding anything.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c

from dagflow_storage.arrays.arrays import StoredArray, check_places
from dagflow_storage.errors import DamagedData
from dagflow_storage.place import fields
from dagflow_storage.place.documents import encode_document, read_document, sound
from dagflow_storage.place.location import Store

# 1 had neither checksums nor objects; it is still read.
SNAPSHOT_FORMAT = 2
_FIRST_WITH_CHECKSUM = 2
_CHECKSUM = "checksum"
_CHUNK_CHECKSUM_BYTES = 4
_OBJECT = re.compile(r"([0-9]{1,18}) ([0-9a-f]{8})")


@dataclass(frozen=True)
class StoredObject:
    """One object as it lies in the store: `path` is relative to its shard's."""

    path: str
    size_bytes: int
    crc32c: int

    def to_json(self) -> str:
        """Size and checksum, without the path; one line in the manifest."""
        return f"{self.size_bytes} {self.crc32c:08x}"

    @classmethod
    def from_json(cls, path: str, data: str) -> "StoredObject":
        """As it comes out of the manifest; ValueError if it is no such line."""
        found = _OBJECT.fullmatch(fields.text(data, f"the size of {path!r}"))
        if found is None:
            raise ValueError(f"{path!r} has {data!r:.80}, not a size and a checksum")
        return cls(fields.path(path, "an object"), int(found[1]), int(found[2], 16))


@dataclass(frozen=True)
class ShardRecord:
    """One worker's part of a snapshot, written but not committed: what the manifest needs.

    Attributes
    ----------
    shard
        Its name; several parts may share it.
    path
        Where it lies. That may be another snapshot's folder: reading doesn't care, and nothing
        that a manifest names is deleted.
    arrays
        The arrays in it that belong to this snapshot.
    objects
        What the arrays lie in.
    parts
        Further records of the same shard that lie elsewhere; the manifest lists them beside it.
    """

    shard: str
    path: str
    arrays: tuple[StoredArray, ...]
    objects: tuple[StoredObject, ...] = ()
    parts: tuple["ShardRecord", ...] = ()

    def flattened(self) -> Iterator["ShardRecord"]:
        """This record and its parts, each without parts; none that holds no array."""
        for record in (replace(self, parts=()), *self.parts):
            if record.arrays:
                yield record

    @property
    def array_folders(self) -> set[str]:
        """The folders, from the store's root, that the arrays lie in."""
        return {f"{self.path}/{stored.array}" for stored in self.arrays}

    def to_json(self) -> dict[str, Any]:
        """As it goes into the manifest, without its parts."""
        return {
            "shard": self.shard,
            "path": self.path,
            "arrays": [stored.to_json() for stored in self.arrays],
            "objects": {stored.path: stored.to_json() for stored in self.objects},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ShardRecord":
        """As it comes out of the manifest; ValueError if it is none."""
        given = fields.members(data, "a shard", "shard", "path", "arrays")
        arrays = tuple(map(StoredArray.from_json, fields.items(given["arrays"], "arrays")))
        check_places(arrays)
        listed = fields.members(given.get("objects", {}), "objects")
        objects = tuple(StoredObject.from_json(path, stored) for path, stored in listed.items())
        shard, path = fields.text(given["shard"], "shard"), fields.path(given["path"], "path")
        return cls(shard, path, arrays, objects)


@dataclass(frozen=True)
class Manifest:
    """A manifest's content; `nonce` tells whose it is when several commit the same step."""

    step: int
    meta: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    nonce: str = ""

    def encode(self) -> bytes:
        """The bytes to put."""
        content = {
            "step": self.step,
            "nonce": self.nonce,
            "meta": self.meta,
            "shards": [record.to_json() for record in self.shards],
        }
        # Through JSON once, so that the checksum is of what a reader will see.
        content = json.loads(json.dumps({"format_version": SNAPSHOT_FORMAT, **content}))
        content[_CHECKSUM] = _checksum(content)
        del content["format_version"]
        return encode_document(SNAPSHOT_FORMAT, content)


def read_manifest(store: Store, path: str) -> Manifest:
    """The manifest at `path`.

    Raises
    ------
    NotFound
        If there is none.
    FormatTooNew
        If it is newer than this dagflow.
    DamagedData
        If it is none, or isn't what was written: its checksum differs.
    """
    document = read_document(store, path, SNAPSHOT_FORMAT)
    _check(document, f"{path} in {store!r}")
    with sound(f"{path} in {store!r} is no manifest"):
        given = fields.members(document, "it", "step", "meta", "shards")
        return Manifest(
            step=fields.integer(given["step"], "step"),
            meta=dict(fields.members(given["meta"], "meta")),
            shards=tuple(map(ShardRecord.from_json, fields.items(given["shards"], "shards"))),
            nonce=fields.text(given.get("nonce", ""), "nonce"),
        )


def claimed_crc32c(path: str, data: bytes) -> int:
    """The checksum that the object `path` with these bytes should have; nearly free.

    A chunk ends in the checksum of what comes before it, so that is the one. The checksum of all
    its bytes would say nothing: it is the same number for every chunk.
    """
    if _is_metadata(path):
        return int(google_crc32c.value(data))
    return int.from_bytes(data[-_CHUNK_CHECKSUM_BYTES:], "little")


def computed_crc32c(path: str, data: bytes) -> int:
    """The checksum that the object `path` with these bytes has; reads them all."""
    body = data if _is_metadata(path) else memoryview(data)[:-_CHUNK_CHECKSUM_BYTES]
    return int(google_crc32c.value(bytes(body)))


def borrowed(records: Sequence[ShardRecord], folder: str) -> list[ShardRecord]:
    """The records that lie outside `folder`."""
    return [record for record in records if not record.path.startswith(f"{folder}/")]


def _is_metadata(path: str) -> bool:
    return path.endswith("zarr.json")


def _check(document: Mapping[str, Any], where: str) -> None:
    if int(document["format_version"]) < _FIRST_WITH_CHECKSUM:
        return
    found, wanted = document.get(_CHECKSUM), _checksum(document)
    if found != wanted:
        raise DamagedData(
            f"{where} was changed after it was written, by hand or by damage: it holds the "
            f"checksum {found}, its content has {wanted}. Undo the change, or go on from another "
            "snapshot"
        )


def _checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != _CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
