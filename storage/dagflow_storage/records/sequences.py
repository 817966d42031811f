"""Token sequences (answers, sessions), appended to while they are made.

::

    sessions/NAME/part-00000000.jsonl   rows; the first says what the sequence is

Everything that a driver knows of a sequence follows from these rows. Each carries its number and a
checksum: what a crash has cut off or a disk has spoilt is noticed, and the rows before it hold.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c

from dagflow_storage.errors import DamagedData, FormatTooNew, NotFound
from dagflow_storage.place import fields
from dagflow_storage.place.documents import sound
from dagflow_storage.place.location import Store
from dagflow_storage.records.rows import RowLog

SEQUENCE_FORMAT = 1
SEQUENCES_FOLDER = "sessions"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class StoredSequence:
    """What the store has of a sequence.

    Attributes
    ----------
    head : mapping
        What it was begun with.
    tokens : tuple of int
    details : tuple
        What was noted beside each token; None where nothing was.
    end : str or None
        Why it ended, if it has.
    num_rows : int
        How many rows hold.
    is_damaged : bool
        Whether rows after them don't.
    """

    head: Mapping[str, Any]
    tokens: tuple[int, ...]
    details: tuple[Any, ...]
    end: str | None
    num_rows: int
    is_damaged: bool


class SequenceLog:
    """The rows of one sequence; one writer at a time.

    Parameters
    ----------
    store : Store
    name : str
        As `is_sequence_name` wants it.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._path = f"{SEQUENCES_FOLDER}/{name}"
        self._rows = RowLog(store, self._path)
        self._num_rows = 0

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, the head first; may be done again if it has failed.

        A row of tokens has ``at``, the position of its first one: what was there and beyond is
        superseded. ``details`` are as many as its tokens, and ``end`` says that none follow.
        """
        numbered = [{"step": self._num_rows + i, **row} for i, row in enumerate(rows)]
        if self._num_rows == 0:
            numbered[0]["format_version"] = SEQUENCE_FORMAT
        self._rows.append([{**row, "crc32c": _checksum(row)} for row in numbered])
        self._num_rows += len(rows)

    def read(self) -> StoredSequence:
        """What holds; rows are then added after it.

        Raises
        ------
        NotFound
            If there is no such sequence.
        DamagedData
            If its head is damaged: then nobody knows what it was.
        FormatTooNew
            If a newer dagflow wrote it.
        """
        found = self._rows.read(skip_damaged=True)
        whole = [row for row in found if row.pop("crc32c", None) == _checksum(row)]
        held = [row for number, row in enumerate(whole) if row["step"] == number]
        if not held:
            if not self._store.list(self._path):  # an empty folder is where a crash came early
                raise NotFound(f"{self._store!r} has nothing at {self._path}")
            raise DamagedData(
                f"the first row of {self._path} in {self._store!r} is damaged: nobody knows what it "
                "was. Delete it, and begin anew"
            )
        head, *rows = held
        with sound(f"the first row of {self._path} in {self._store!r} is none"):
            version = fields.integer(head.get("format_version"), "format_version")
        if version > SEQUENCE_FORMAT:
            raise FormatTooNew(
                f"{self._path} in {self._store!r} has format version {head['format_version']}, this "
                f"dagflow reads versions up to {SEQUENCE_FORMAT}: upgrade dagflow"
            )
        tokens: list[int] = []
        details: list[Any] = []
        for number, row in enumerate(rows, 1):
            try:
                _extend(tokens, details, row)
            except ValueError:
                del held[number:]
                break
        self._num_rows = len(held)
        return StoredSequence(
            head,
            tuple(tokens),
            tuple(details),
            held[-1].get("end"),
            len(held),
            len(whole) > len(held),
        )


def _extend(tokens: list[int], details: list[Any], row: Mapping[str, Any]) -> None:
    """Add a row's tokens to those before; ValueError if it isn't one that could follow on them."""
    given = fields.members(row, "a row", "at", "tokens")
    at = fields.integer(given["at"], "at", most=len(tokens))
    more = [fields.integer(token, "a token") for token in fields.items(given["tokens"], "tokens")]
    beside = fields.items(given.get("details") or [None] * len(more), "details")
    if len(beside) != len(more):
        raise ValueError(f"it has {len(more)} tokens and {len(beside)} details")
    for detail in beside:
        for number in fields.items(detail or (), "a detail"):
            fields.number(number, "a detail")
    if given.get("end") is not None:
        fields.text(given["end"], "end")
    tokens[at:] = more
    details[at:] = beside


def is_sequence_name(name: str) -> bool:
    """Whether a name can be a folder everywhere: letters, digits, ``.``, ``_``, ``-``, at most 128."""
    return _NAME.fullmatch(name) is not None


def list_sequences(store: Store) -> list[str]:
    """The names of all sequences, finished or not."""
    return [name for name in store.list(SEQUENCES_FOLDER) if is_sequence_name(name)]


def delete_sequence(store: Store, name: str) -> None:
    """Delete a sequence; absent is fine."""
    folder = f"{SEQUENCES_FOLDER}/{name}"
    # The newest rows first: what a crash leaves is a shorter sequence, and not a headless one.
    for part in reversed(store.list(folder)):
        store.delete(f"{folder}/{part}")
    store.delete(folder)


def _checksum(row: Mapping[str, Any]) -> int:
    return int(google_crc32c.value(json.dumps(row).encode()))
