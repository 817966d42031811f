"""At most one driver writes to a run's store at a time.

::

    lease/epoch-00000005.json       who holds the lease; created once, never changed
    lease/beat-00000005-NONCE.json  a counter that its holder moves on, or "released"

Clocks of different machines are never compared, and a store that checks a condition badly costs
no more than one beat:

- Whoever creates the next epoch may hold the lease. It may be created once the holder of the
  newest one has released it, has ended (seen on the same machine), or hasn't beaten for
  `patience_seconds` of the challenger's own clock.
- The holder of an older epoch stops as soon as it sees a newer one; that is once a beat.
- A holder whose beats didn't get through for `patience_seconds` of its own clock takes itself for
  superseded until it has looked again.

That two never hold it at once, even if a holder that was silent comes back while another takes
over, is due to an order: a holder beats and then looks for newer epochs; a challenger creates its
epoch and then looks for older holders' beats. One of them sees the other. If it is the challenger,
it waits until the holder has seen the newer epoch and yielded.
"""

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dagflow_storage._process import ProcessIdentity
from dagflow_storage.errors import (
    DagflowError,
    DamagedData,
    LeaseLost,
    LeaseUnconfirmed,
    NotFound,
    StoreInUse,
)
from dagflow_storage.place import fields
from dagflow_storage.place.documents import encode_document, read_document
from dagflow_storage.place.location import Store

LEASE_FORMAT = 1
PATIENCE_SECONDS = 30.0
BEAT_SECONDS = 5.0
# One beat may get lost, and the next be late, before anybody thinks of taking over.
_MIN_BEATS_WITHIN_PATIENCE = 3
# Who is silent for a week is gone, whatever he said of his patience.
_LONGEST_SECONDS = 7 * 86400.0
_EPOCH = re.compile(r"epoch-([0-9]{8,18})\.json")
_ANY = re.compile(r"(?:epoch|beat)-([0-9]{8,18})[-.].*")


def steady_seconds() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps if it can.

    A laptop that was closed for an hour must not think that its lease is a second old.
    """
    clock: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass(frozen=True)
class Holder:
    """Who created an epoch, and how often it said it would beat."""

    epoch: int
    nonce: str
    process: ProcessIdentity
    beat_seconds: float
    patience_seconds: float

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host} (lease epoch {self.epoch})"


@dataclass(frozen=True)
class Beat:
    """What a holder last said."""

    counter: int
    released: bool = False


@dataclass(frozen=True)
class Waiting:
    """What a challenger waits for; `hold_lease` tells `on_wait`.

    Attributes
    ----------
    holder
        Who held the lease last.
    silent_seconds, patience_seconds
        How long it has been silent, and how long that has to be.
    """

    holder: Holder
    silent_seconds: float
    patience_seconds: float


class Lease:
    """The right to write to a store. Safe to use from several threads.

    Made by `hold_lease`, whose thread calls `beat`.
    """

    def __init__(self, store: Store, holder: Holder, clock: Callable[[], float]) -> None:
        self.holder = holder
        self._store = store
        self._files = _LeaseFiles(store)
        self._clock = clock
        self._beating = threading.Lock()
        self._counter = 0
        self._lost = ""
        self._trouble = ""
        self._confirmed_at = clock()

    def check(self) -> None:
        """Return if this process may write to the store. Does no IO.

        Raises
        ------
        LeaseLost
            If another driver has taken over.
        LeaseUnconfirmed
            If that can't be excluded, because the store has been away for too long. It passes
            once a beat has got through.
        """
        if self._lost:
            raise LeaseLost(self._lost)
        silent = self._clock() - self._confirmed_at
        if silent >= self.holder.patience_seconds:
            raise LeaseUnconfirmed(
                f"the lease of {self._store!r} was last confirmed {silent:.1f} s ago; after "
                f"{self.holder.patience_seconds:g} s another driver may have taken over. Nothing "
                "may be written until the store answers: "
                + (self._trouble or "it has not answered yet")
            )

    @property
    def is_lost(self) -> bool:
        """Whether another driver has taken over, as far as this one has heard."""
        return bool(self._lost)

    def verify(self) -> None:
        """Like `check`, after asking the store now: for what must not be written twice."""
        self.beat()
        self.check()

    def beat(self) -> None:
        """Tell others that this holder lives, then look for newer ones.

        Trouble with the store raises nothing here: `check` tells when it has lasted too long.
        """
        with self._beating:
            if self._lost:
                return
            started = self._clock()
            try:
                # In this order: see the module's docstring.
                self._write_beat(released=False)
                self._lost = self._reason_to_stop()
                if self._lost:
                    self._yield()
            except DagflowError as error:
                self._trouble = str(error)
                return
            # The beat was visible from some time after `started` on, so nobody's patience began
            # earlier.
            self._confirmed_at = started

    def release(self) -> None:
        """Let a successor in without waiting, if the store can be told."""
        with self._beating:
            if self._lost:
                return
            self._lost = f"the lease of {self._store!r} was released"
            # A store that is away is no reason to fail a finished run: others wait a little.
            with contextlib.suppress(DagflowError):
                self._write_beat(released=True)

    def _write_beat(self, *, released: bool) -> None:
        self._counter += 1
        self._files.write_beat(self.holder, Beat(self._counter, released))

    def _reason_to_stop(self) -> str:
        newest = self._files.newest()
        if newest is not None and newest.nonce == self.holder.nonce:
            return ""
        whose = f"{newest} has taken it over" if newest else "its files have been deleted"
        return (
            f"{self.holder} no longer holds {self._store!r}: {whose}. This driver has to stop; the "
            "run goes on with the newer one, or with the next call of train"
        )

    def _yield(self) -> None:
        if self.holder.epoch in self._files.epochs():
            self._write_beat(released=True)  # the newer holder waits for this
        else:
            self._files.delete_beat(self.holder)  # it has tidied up already


@contextlib.contextmanager
def hold_lease(
    store: Store,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    beat_seconds: float = BEAT_SECONDS,
    clock: Callable[[], float] = steady_seconds,
    pause: Callable[[float], object] = time.sleep,
    on_wait: Callable[[Waiting], object] | None = None,
) -> Iterator[Lease]:
    """Hold the lease of a store for the length of the block.

    Parameters
    ----------
    patience_seconds
        How long a holder may be silent before others take over. The larger of both sides' values
        counts.
    beat_seconds
        How often this one speaks.
    clock, pause
        This process's time; tests bring their own.
    on_wait
        Called again and again while a silent holder is waited for.

    Raises
    ------
    StoreInUse
        If another driver holds it and has been seen to live.
    StoreUnreachable
        If the store doesn't answer.
    """
    if patience_seconds < _MIN_BEATS_WITHIN_PATIENCE * beat_seconds:
        raise ValueError(
            f"patience_seconds ({patience_seconds:g}) must be at least {_MIN_BEATS_WITHIN_PATIENCE} "
            f"times beat_seconds ({beat_seconds:g}), or one slow put would cost the lease"
        )
    challenger = _Challenger(store, patience_seconds, beat_seconds, clock, pause, on_wait)
    lease = challenger.next_epoch()
    try:
        with _beating(lease):
            challenger.wait_for_older_holders(lease)
            lease.check()
            yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
    """Beat in a thread that ends before the block is left."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(lease.holder.beat_seconds):
            lease.beat()

    thread = threading.Thread(target=run, name="dagflow-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Challenger:
    """Creates the next epoch once the newest one is free."""

    def __init__(
        self,
        store: Store,
        patience_seconds: float,
        beat_seconds: float,
        clock: Callable[[], float],
        pause: Callable[[float], object],
        on_wait: Callable[[Waiting], object] | None,
    ) -> None:
        self._store = store
        self._files = _LeaseFiles(store)
        self._patience_seconds = patience_seconds
        self._beat_seconds = beat_seconds
        self._clock = clock
        self._pause = pause
        self._on_wait = on_wait or (lambda _: None)
        self._watches: dict[str, _Watch] = {}

    def next_epoch(self) -> Lease:
        """Return a lease that others can see; older holders may not have noticed yet."""
        while True:
            newest = self._files.newest()
            if newest is not None:
                self._wait_until_free(newest, must_yield=False)
            holder = Holder(
                1 if newest is None else newest.epoch + 1,
                uuid.uuid4().hex,
                ProcessIdentity.of_this_process(),
                self._beat_seconds,
                self._patience_seconds,
            )
            if self._files.create(holder):
                lease = Lease(self._store, holder, self._clock)
                lease.beat()
                # Others may have come and gone, and tidied up, since the newest was read.
                if not lease.is_lost:
                    return lease

    def wait_for_older_holders(self, lease: Lease) -> None:
        """Return once nobody else holds the lease, then remove what older holders left."""
        epoch = lease.holder.epoch
        for older in filter(epoch.__gt__, self._files.epochs()):
            with contextlib.suppress(NotFound):
                self._wait_until_free(self._files.read(older), must_yield=True)
        lease.verify()
        self._files.delete_below(epoch)

    def _wait_until_free(self, holder: Holder, *, must_yield: bool) -> None:
        patience = max(self._patience_seconds, holder.patience_seconds)
        new = _Watch(patience)
        watch = self._watches.setdefault(holder.nonce, new)
        while not holder.process.has_ended():
            epochs = self._files.epochs()
            # Somebody else was faster, and may have removed what this one would go on watching.
            if holder.epoch not in epochs or not (must_yield or holder.epoch == epochs[-1]):
                return
            watch.look(self._files.read_beat(holder), self._clock())
            if watch.is_free:
                return
            if watch.has_moved and not must_yield:
                raise StoreInUse(self._refusal(holder, watch))
            self._on_wait(Waiting(holder, watch.silent_seconds, patience))
            self._pause(min(holder.beat_seconds, patience / _MIN_BEATS_WITHIN_PATIENCE) / 4)

    def _refusal(self, holder: Holder, watch: "_Watch") -> str:
        return (
            f"{self._store!r} is in use by {holder}: it beat within the last "
            f"{watch.look_seconds:.1f} s, as seen from here. Two drivers would overwrite each "
            f"other's steps. Wait until it ends, stop it (kill {holder.process.pid} on "
            f"{holder.process.host}), or give this run a store of its own"
        )


@dataclass
class _Watch:
    """How long a holder has been silent, as far as somebody looked.

    Silence counts between two looks only as far as they are close together: a challenger that
    was itself suspended has not seen whether the holder beat meanwhile.
    """

    patience_seconds: float
    silent_seconds: float = 0.0
    look_seconds: float = 0.0
    has_moved: bool = False
    is_free: bool = False
    _last: Beat | None = None
    _looked_at: float | None = field(default=None)

    def look(self, beat: Beat | None, now: float) -> None:
        """Take note of what the holder's beat is now."""
        if self._looked_at is not None:
            self.look_seconds = now - self._looked_at
            moved = beat != self._last
            self.has_moved = self.has_moved or moved
            counted = min(self.look_seconds, self.patience_seconds / 4)
            self.silent_seconds = 0.0 if moved else self.silent_seconds + counted
        self._last, self._looked_at = beat, now
        released = beat is not None and beat.released
        self.is_free = released or self.silent_seconds >= self.patience_seconds


class _LeaseFiles:
    """The files of a store's lease."""

    def __init__(self, store: Store) -> None:
        self._folder = store.child("lease")

    def epochs(self) -> list[int]:
        matches = (_EPOCH.fullmatch(name) for name in self._folder.list())
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> Holder | None:
        """Return who created the newest epoch."""
        while epochs := self.epochs():
            try:
                return self.read(epochs[-1])
            except NotFound:
                continue  # an even newer holder has removed it since
        return None

    def read(self, epoch: int) -> Holder:
        found = read_document(self._folder, _epoch_path(epoch), LEASE_FORMAT)
        with self._well_formed(_epoch_path(epoch)):
            wanted = ("nonce", "process", "beat_seconds", "patience_seconds", "epoch")
            given = fields.members(found, "it", *wanted)
            # Its name is what others go by, and the nonce becomes part of another name.
            fields.integer(given["epoch"], "epoch", epoch, epoch)
            nonce = fields.name(given["nonce"], "nonce")
            process = _process(given["process"])
            beat = fields.number(given["beat_seconds"], "beat_seconds", 0, _LONGEST_SECONDS)
            patience = given["patience_seconds"]
            patience = fields.number(patience, "patience_seconds", 0, _LONGEST_SECONDS)
            return Holder(epoch, nonce, process, beat, patience)

    def create(self, holder: Holder) -> bool:
        """Create a holder's epoch; of several holders one succeeds."""
        path = _epoch_path(holder.epoch)
        self._folder.create_bytes(path, encode_document(LEASE_FORMAT, asdict(holder)))
        # Read back whatever the answer was: it can get lost, and a store without conditions may
        # have let another one overwrite it.
        try:
            return self.read(holder.epoch).nonce == holder.nonce
        except NotFound:
            return False

    def read_beat(self, holder: Holder) -> Beat | None:
        path = _beat_path(holder)
        try:
            found = read_document(self._folder, path, LEASE_FORMAT)
        except NotFound:
            return None
        with self._well_formed(path):
            given = fields.members(found, "it", "counter", "released")
            counter = fields.integer(given["counter"], "counter")
            return Beat(counter, fields.flag(given["released"], "released"))

    def write_beat(self, holder: Holder, beat: Beat) -> None:
        self._folder.write_bytes(_beat_path(holder), encode_document(LEASE_FORMAT, asdict(beat)))

    def delete_beat(self, holder: Holder) -> None:
        self._folder.delete(_beat_path(holder))

    def delete_below(self, epoch: int) -> None:
        for name in self._folder.list():
            match = _ANY.fullmatch(name)
            if match and int(match[1]) < epoch:
                self._folder.delete(name)

    @contextlib.contextmanager
    def _well_formed(self, path: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise DamagedData(
                f"{path} in {self._folder!r} is no file of a lease: {error}. If no driver uses "
                f"this store, delete {self._folder}"
            ) from error


def _process(given: Any) -> ProcessIdentity:
    found = fields.members(given, "process", "host", "pid")
    return ProcessIdentity(
        fields.text(found["host"], "host"),
        fields.integer(found["pid"], "pid", 1, 2**31 - 1),
        fields.text(found.get("machine", ""), "machine"),
        fields.text(found.get("started", ""), "started"),
    )


def _epoch_path(epoch: int) -> str:
    return f"epoch-{epoch:08d}.json"


def _beat_path(holder: Holder) -> str:
    return f"beat-{holder.epoch:08d}-{holder.nonce}.json"
