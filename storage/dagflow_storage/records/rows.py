"""Rows by step (metrics, the ledger), appended to as a run goes, superseded when it goes back.

Events are rows by their own number, which never goes back.

::

    FOLDER/part-00000040.jsonl     named after its first step

An object can't be appended to: small additions write their part again, until it is long enough.
"""

import contextlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from dagflow_storage.errors import NotFound
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import parse_json
from dagflow_storage.place.documents import JSON, sound
from dagflow_storage.place.location import Store

_PART = re.compile(r"part-([0-9]{8,18})\.jsonl")
_ROWS_PER_PART = 64


class RowLog:
    """Rows in one folder of a store; one writer at a time, any number of readers.

    Parameters
    ----------
    store : Store
    folder : str
    by : str
        The member of each row that orders them.
    """

    def __init__(self, store: Store, folder: str, by: str = "step") -> None:
        self._store = store
        self._folder = folder
        self._by = by
        self._last_part: list[dict[str, Any]] = []

    def append(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        """Add rows, each with an integer ``"step"`` (or what they are ordered by).

        Rows already there of the first new step or later are superseded: after a rollback those
        steps have not happened.
        """
        if not rows:
            return
        first = min(self._number_of(row) for row in rows)
        fits = len(self._last_part) + len(rows) <= _ROWS_PER_PART
        last = max((row[self._by] for row in self._last_part), default=first)
        if not (fits and first > last):
            # Outdated parts first: a crash between here and the put loses rows of steps that will
            # be run again. The other way round it would leave rows that never come true.
            for start in self._parts():
                if start > first:
                    self._store.delete(self._path(start))
            self._last_part = []
        part = self._last_part + [dict(row) for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in part)
        start = min(self._number_of(row) for row in part)
        self._store.write_bytes(self._path(start), text.encode())
        self._last_part = part

    def read(self, since: int = 0, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
        """The rows that hold, by step; rows of one step as they were appended.

        Parameters
        ----------
        since
            Only those of this step and later ones; no more objects are read than that takes.
        skip_damaged
            Leave out what is no row, for readers that notice by themselves that one is missing.

        Raises
        ------
        DamagedData
            If something is no row, and that isn't to be left out.
        """
        starts = self._parts()
        starts = starts[max(0, bisect_right(starts, since) - 1) :]
        rows: list[dict[str, Any]] = []
        for start, end in zip_longest(starts, starts[1:]):
            # A part that starts later was written later, so it has the say from its start on.
            found = self._sound_rows(start) if skip_damaged else self._rows(start)
            rows += [
                row
                for row in found
                if since <= row[self._by] and (end is None or row[self._by] < end)
            ]
        return sorted(rows, key=lambda row: int(row[self._by]))

    def last(self) -> dict[str, Any] | None:
        """The row of the latest step, without reading those before; None if there is none."""
        for start in reversed(self._parts()):
            if rows := list(self._rows(start)):
                return max(rows, key=lambda row: int(row[self._by]))
        return None

    def _parts(self) -> list[int]:
        matches = (_PART.fullmatch(name) for name in self._store.list(self._folder))
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, first_step: int) -> str:
        return f"{self._folder}/part-{first_step:08d}.jsonl"

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        path = self._path(start)
        try:
            data = self._store.read_bytes(path)
        except NotFound:
            return  # superseded since it was listed
        with sound(f"{path} in {self._store!r}"):
            yield from [self._row(line) for line in data.splitlines()]

    def _sound_rows(self, start: int) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(NotFound):
            for line in self._store.read_bytes(self._path(start)).splitlines():
                try:
                    row = self._row(line)
                except ValueError:
                    continue
                yield row

    def _row(self, line: bytes) -> dict[str, Any]:
        row = fields.members(parse_json(line, finite=False), "a row", self._by)
        self._number_of(row)
        return dict(row)

    def _number_of(self, row: Mapping[str, JSON]) -> int:
        what = f"the {self._by} of the row {fields.shown(dict(row))}"
        return fields.integer(row.get(self._by), what)
