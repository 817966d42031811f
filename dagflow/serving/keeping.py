"""Keeps what sequences are made of in a store, behind whoever makes them, for who comes after.

Only tokens are kept: everything else follows from them. One driver holds the store's lease, and
writes. A store that is away holds nobody up; what it lacks is computed again by whoever takes over.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dagflow.errors import (
    DagflowError,
    DamagedData,
    FormatTooNew,
    LeaseLost,
    NotFound,
    PermanentError,
    SessionInUse,
    SettingsInvalid,
    StoreUnreachable,
)
from dagflow_storage import (
    SEQUENCES_FOLDER,
    Lease,
    RetryPolicy,
    SequenceLog,
    Store,
    StoredSequence,
    delete_sequence,
    hold_lease,
    is_sequence_name,
    list_sequences,
    walk,
)
from dagflow_storage.lease import BEAT_SECONDS, PATIENCE_SECONDS, Waiting, steady_seconds
from dagflow_storage.write_behind import WriteBehind

logger = logging.getLogger(__name__)

ANSWER, SESSION = "answer", "session"
_GATHER_SECONDS = 0.25
# How long the store is waited for at the end, or by who wants to read what waits to be written.
_LAST_SECONDS = 10.0
# Numbers that may wait for the store; about a hundred megabytes.
_MOST_WAITING = 1_000_000
_PARALLEL_READS, _PARALLEL_WRITES = 16, 8
_TIDY_SECONDS = 3600.0
# The writer tries again by itself.
_IMPATIENT = RetryPolicy(total_seconds=5.0)

Note = Callable[[str], None]


class Record:
    """What is kept of one sequence while it is made. Safe to use from several threads.

    Attributes
    ----------
    name : str
    found : StoredSequence or None
        What the store had when it was taken up; None if it was begun now.
    """

    def __init__(self, keeper: Keeper, name: str) -> None:
        self.name = name
        self.found: StoredSequence | None = None
        self.log = SequenceLog(keeper.store, name)
        self.rows: list[dict[str, Any]] = []  # that wait to be written
        self.num_taken = 0  # of them: those that are being written
        self.is_closed = False
        self._keeper = keeper

    def check(self) -> None:
        """Return unless another driver has taken the store over; raises `LeaseLost`."""
        self._keeper.check()

    def add(
        self,
        at: int,
        tokens: Sequence[int],
        details: Sequence[Sequence[float]] | None = None,
        end: str | None = None,
    ) -> None:
        """Note tokens from a position on, what there is to say of each, and why none follow."""
        row: dict[str, Any] = {"at": at, "tokens": list(tokens)}
        if details is not None:
            row["details"] = [list(detail) for detail in details]
        if end is not None:
            row["end"] = end
        self._keeper.add(self, row)

    def close(self) -> None:
        """Let others take the sequence up; what is noted is written all the same."""
        self._keeper.let_go(self)


class Keeper:
    """The sequences of one store, and a thread that writes them; `keeping` makes one."""

    def __init__(self, store: Store, lease: Lease, keep_seconds: float | None, note: Note) -> None:
        self.store = store
        self._lease = lease
        self._keep_seconds = keep_seconds
        self._note = note
        self._came = steady_seconds()
        # Those with rows to be written.
        self._queue = WriteBehind[Record](
            "dagflow-keeping", self._write, gather_seconds=_GATHER_SECONDS
        )
        # Guards the following, and the records' rows.
        self._changed = self._queue.changed
        # Nobody else writes here, so all names are known, and who is making what.
        self._names: dict[str, Record | None] = dict.fromkeys(list_sequences(store))
        self._num_waiting = 0

    @property
    def trouble(self) -> str:
        """Why the store can't be written to just now; empty if it can."""
        return self._queue.trouble

    def note(self, what: str) -> None:
        """Tell people something of what is kept."""
        self._note(what)

    # Taking sequences up, from any thread

    def names(self) -> list[str]:
        """Return what is kept and nobody is making."""
        with self._changed:
            return sorted(name for name, record in self._names.items() if record is None)

    def take_up(self, name: str, head: Mapping[str, Any] | None = None) -> Record:
        """Return the record of a kept sequence, or of a new one with a head.

        Raises
        ------
        NotFound
            If there is none of this name, and no head to begin it with.
        SessionInUse
            If somebody is making it.
        LeaseLost, DamagedData, FormatTooNew, StoreUnreachable
        """
        record, is_known = self._claim(name, may_begin=head is not None)
        try:
            if is_known:
                record.found = self._found(record, name, must_be=head is None)
        except BaseException:
            record.close()
            raise
        if record.found is None:
            self.add(record, dict(head or {}))
        return record

    def _found(self, record: Record, name: str, *, must_be: bool) -> StoredSequence | None:
        self._wait_until_written(name)
        try:
            return record.log.read()
        except NotFound:
            if must_be:
                raise
            return None

    def stored(self) -> dict[str, StoredSequence]:
        """Return what is kept and nobody is making; damaged ones are told of and left out.

        Raises
        ------
        LeaseLost, StoreUnreachable
        """
        names = self.names()
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            found = zip(names, pool.map(self._read, names), strict=True)
            return {name: sequence for name, sequence in found if sequence is not None}

    def _read(self, name: str) -> StoredSequence | None:
        try:
            record = self.take_up(name)
        except (NotFound, SessionInUse):
            return None
        except (DamagedData, FormatTooNew) as error:
            self._note(str(error))
            return None
        record.close()
        return record.found

    def forget(self, name: str) -> None:
        """Delete a sequence, damaged or not; else raises what `take_up` does."""
        record, _ = self._claim(name, may_begin=False)
        try:
            self._wait_until_written(name)
            delete_sequence(self.store, name)
            with self._changed:
                del self._names[name]
        finally:
            record.close()

    def check(self) -> None:
        """Return unless another driver has taken the store over; raises `LeaseLost`."""
        if self._lease.is_lost:
            raise LeaseLost(
                f"Another driver has taken over what {self.store!r} keeps, because this one was away "
                "from the store for too long: ask the other one."
            )

    def _claim(self, name: str, *, may_begin: bool) -> tuple[Record, bool]:
        self.check()
        check_name(name)
        record = Record(self, name)
        with self._changed:
            is_known = name in self._names
            if self._names.get(name) is not None:
                raise SessionInUse(f"{name!r} is being made just now: wait until that has ended.")
            if not (is_known or may_begin):
                raise NotFound(f"{self.store!r} keeps nothing of the name {name!r}.")
            self._names[name] = record
        return record, is_known

    def _wait_until_written(self, name: str) -> None:
        """Return once nothing of a sequence waits any more."""
        if not self._queue.flush(_LAST_SECONDS, lambda record: record.name == name):
            raise StoreUnreachable(f"{self.store!r} lacks the end of {name!r}: {self.trouble}")

    # For records

    def add(self, record: Record, row: dict[str, Any]) -> None:
        """Have a row written some time soon."""
        with self._changed:
            if record.is_closed:
                return
            is_new = not record.rows
            last = record.rows[-1] if len(record.rows) > record.num_taken else {}
            if not _extend(last, row):
                record.rows.append(row)
            self._num_waiting += _size(row)
            if is_new:
                self._queue.add(record)
            if self._num_waiting > _MOST_WAITING:
                self._give_up_one()

    def let_go(self, record: Record) -> None:
        """Let somebody else make a sequence."""
        with self._changed:
            record.is_closed = True
            if self._names.get(record.name) is record:
                self._names[record.name] = None

    def _give_up_one(self) -> None:
        """Keep no more of who has waited longest: whoever takes it over computes it again."""
        for record in self._queue.waiting:
            taken, waiting = record.rows[: record.num_taken], record.rows[record.num_taken :]
            heads = [row for row in waiting if "tokens" not in row]
            if len(heads) < len(waiting):
                record.rows = taken + heads
                record.is_closed = True
                self._note(f"{record.name!r} is kept no longer: the store has been away too long.")
                break
        self._count()

    def _count(self) -> None:
        waiting = self._queue.waiting
        self._num_waiting = sum(_size(row) for record in waiting for row in record.rows)

    # Writing, in a thread

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write while the block runs, and what is left at its end, if the store lets it."""
        over = threading.Event()
        tidying = threading.Thread(
            target=self._keep_tidy, args=(over,), name="dagflow-tidying", daemon=True
        )
        tidying.start()
        try:
            yield
        finally:
            over.set()
            tidying.join(_LAST_SECONDS)
            if not self._queue.end(_LAST_SECONDS):
                waiting = list(self._queue.waiting)
                names = ", ".join(sorted(record.name for record in waiting)[:5])
                self._note(
                    f"{self.store!r} lacks the last tokens of {len(waiting)} sequences ({names}); "
                    f"whoever goes on computes them again: {self.trouble}"
                )

    def _write(self, records: list[Record]) -> Iterator[Record]:
        """Write what has gathered of sequences; see `WriteBehind`."""
        with self._changed:
            batches = {record: list(record.rows) for record in records}
            for record, rows in batches.items():
                record.num_taken = len(rows)
        with ThreadPoolExecutor(_PARALLEL_WRITES, "dagflow-keeping") as pool:
            errors = list(pool.map(self._try, batches, batches.values()))
        trouble = next(filter(None, errors), None)
        if trouble is not None and not self.trouble:
            said = f"{type(trouble).__name__}: {trouble}"
            self._note(f"{self.store!r} can't be written to; answers go on all the same. {said}")
        elif trouble is None and self.trouble:
            self._note(f"{self.store!r} can be written to again; it lacks nothing any more.")
        with self._changed:
            for record, error in zip(batches, errors, strict=True):
                if error is None:
                    del record.rows[: record.num_taken]
                record.num_taken = 0
                if not record.rows:
                    yield record  # with the lock held: no row may come before it is taken out
            self._count()
        if trouble is not None:
            raise trouble

    def _try(self, record: Record, rows: Sequence[Mapping[str, Any]]) -> Exception | None:
        """Write rows, and return what was in the way."""
        try:
            self._lease.check()
            record.log.append(rows)
        except Exception as error:  # of this one; the others are written
            return error
        return None

    def _keep_tidy(self, over: threading.Event) -> None:
        period = min(_TIDY_SECONDS, max(1.0, self._keep_seconds or _TIDY_SECONDS))
        while True:
            with suppress(DagflowError, OSError):  # the next time, then
                self.tidy()
            if over.wait(period):
                return

    def tidy(self) -> None:
        """Delete old answers: those that have ended, and those that nobody has gone on with.

        Old is what hasn't been written to for the time that answers are kept, by the store's own
        clock; for an unfinished one that begins when a driver has come who could have gone on.
        """
        if self._keep_seconds is None:
            return
        modified: dict[str, float] = {}
        for found in walk(self.store, SEQUENCES_FOLDER):
            name = found.path.split("/")[1]
            modified[name] = max(modified.get(name, -math.inf), found.modified_seconds or math.inf)
        # The lease's beat is as old as a beat.
        beats = [found.modified_seconds or -math.inf for found in walk(self.store, "lease")]
        limit = max(beats, default=-math.inf) - self._keep_seconds
        for name in sorted(name for name, seconds in modified.items() if seconds <= limit):
            if self._is_over(name):
                with suppress(SessionInUse, NotFound):
                    self.forget(name)

    def _is_over(self, name: str) -> bool:
        try:
            found = SequenceLog(self.store, name).read()
        except DamagedData:
            return True
        except PermanentError:
            return False  # gone meanwhile, or a newer dagflow's
        was_there = steady_seconds() - self._came >= (self._keep_seconds or 0)
        return found.head.get("kind") == ANSWER and (found.end is not None or was_there)


@contextmanager
def keeping(
    store: str | Path | Store,
    note: Note | None = None,
    *,
    keep_seconds: float | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
    beat_seconds: float = BEAT_SECONDS,
) -> Iterator[Keeper]:
    """Hold a store's lease, and keep sequences in it.

    Parameters
    ----------
    store
        Folder or URL.
    note : callable
        Tells people what happens; a warning in the log by default.
    keep_seconds : float, optional
        How long answers stay; for good by default.
    patience_seconds, beat_seconds : float
        Of the lease.

    Raises
    ------
    StoreInUse
        If another driver holds the lease, and lives.
    StoreNotWritable, StoreUnreachable
    SettingsInvalid
        If it is no URL that fsspec knows.
    """
    said = note or logger.warning
    place = _opened(store)
    place.probe()
    with hold_lease(
        place,
        patience_seconds=patience_seconds,
        beat_seconds=beat_seconds,
        on_wait=_waiting_for_the_other(said),
    ) as lease:
        keeper = Keeper(place, lease, keep_seconds, said)
        with keeper.writing():
            yield keeper


def check_name(name: str) -> None:
    """Raise `SettingsInvalid` unless something can be kept under a name."""
    if not is_sequence_name(name):
        raise SettingsInvalid(
            f"{name!r} is no name: it has 1 to 128 letters, digits, '.', '_' and '-', and begins with a "
            "letter or a digit."
        )


def _opened(store: str | Path | Store) -> Store:
    if isinstance(store, Store):
        return store
    try:
        return Store(store, retry=_IMPATIENT)
    except ValueError as error:
        raise SettingsInvalid(f"{error}.") from error


def _waiting_for_the_other(note: Note) -> Callable[[Waiting], None]:
    told: set[int] = set()

    def tell(waiting: Waiting) -> None:
        if waiting.holder.epoch not in told:
            told.add(waiting.holder.epoch)
            note(
                f"{waiting.holder} has kept its sessions here; what it left is taken over once it has "
                f"been silent for {waiting.patience_seconds:g} s."
            )

    return tell


def _extend(last: dict[str, Any], row: Mapping[str, Any]) -> bool:
    """Add a row's tokens to the row before, if they follow on its own."""
    same = last.keys() == row.keys() - {"end"} and "tokens" in last
    if not same or row["at"] != last["at"] + len(last["tokens"]):
        return False
    last["tokens"] += row["tokens"]
    if "details" in row:
        last["details"] += row["details"]
    if "end" in row:
        last["end"] = row["end"]
    return True


def _size(row: Mapping[str, Any]) -> int:
    """Return how many numbers a row holds."""
    return 1 + len(row.get("tokens", ())) + sum(map(len, row.get("details", ())))
