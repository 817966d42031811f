"""A background writer: items are written in turn, and again while that fails.

Whoever adds an item goes on at once. Nothing that is raised ends the thread: not an error of the
store, nor a lack of memory, nor a bug in what writes.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Generic, TypeVar

from dagflow_storage.errors import TransientError

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0

Item = TypeVar("Item")


class WriteBehind(Generic[Item]):
    """Items that wait to be written, and the thread that writes them. Safe to use from any thread.

    The thread begins with the first item. After a failure it pauses, twice as long each time; a
    `flush` or the end makes it try again at once, once.

    Parameters
    ----------
    name : str
        Of the thread.
    write : callable
        Is given the oldest items, in the thread, and yields each as soon as it is done with. What
        it raises leaves the others waiting. Without `changed` held: it may take its time.
    at_once : int, optional
        How many items it is given at most; all that wait by default.
    gather_seconds : float
        How long it is waited for more items before some are written, unless somebody waits.

    Attributes
    ----------
    changed : threading.Condition
        Guards all that follows, and is told of its changes. Users guard with it what must change
        together with `waiting`.
    waiting : deque
        Items that aren't written, the oldest first; those being written are still among them.
    trouble : str
        What was in the way of the last attempt; "" if nothing was.
    is_refused : bool
        Whether that won't pass by itself (no space, a bug), as a store that is away does.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[list[Item]], Iterable[Item]],
        at_once: int | None = None,
        gather_seconds: float = 0.0,
    ) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Item] = deque()
        self.trouble = ""
        self.is_refused = False
        self._name = name
        self._write = write
        self._at_once = at_once
        self._gather_seconds = gather_seconds
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._under_way: list[Item] = []
        self._is_asked = False
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def add(self, item: Item) -> None:
        """Have an item written some time soon, after those before it."""
        with self.changed:
            self.waiting.append(item)
            self._wake()

    def flush(self, seconds: float, wanted: Callable[[Item], bool] = lambda _: True) -> bool:
        """Return once all items are written, or these; False if that took longer than some seconds."""
        with self.changed:
            self._is_asked = True
            self._wake()
            return self.changed.wait_for(lambda: not any(map(wanted, self.waiting)), seconds)

    def drop(self, unwanted: Callable[[Item], bool], seconds: float = 0.0) -> None:
        """Give up items.

        Parameters
        ----------
        seconds
            How long to wait for what is being written just now, so that whoever deletes it
            afterwards finds all of it.
        """
        with self.changed:
            self._keep(lambda item: item in self._under_way or not unwanted(item))
            self.changed.wait_for(lambda: not any(map(unwanted, self._under_way)), seconds)
            self._keep(lambda item: not unwanted(item))

    def end(self, seconds: float | None = None) -> bool:
        """Try a last time to write what waits, end the thread, and tell whether nothing is left."""
        with self.changed:
            self._is_asked = self._is_ending = True
            self._wake()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
        with self.changed:
            return not self.waiting

    def _keep(self, is_wanted: Callable[[Item], bool]) -> None:
        self.waiting = deque(filter(is_wanted, self.waiting))
        self.changed.notify_all()

    def _wake(self) -> None:
        """Have the thread look; begin it if there is none and something to do."""
        self.changed.notify_all()
        if self.waiting and (self._thread is None or not self._thread.is_alive()):
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads; the next time, then
                self._tell(error)
                return
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self._is_ending)
                self._wait_for_somebody(self._gather_seconds)
                self._under_way = list(islice(self.waiting, self._at_once))
                self._is_asked, is_last = False, self._is_ending
            is_done = self._attempt()
            with self.changed:
                if self._is_ending and (not self.waiting or (is_last and not is_done)):
                    self._thread = None
                    return
                if is_done or self._wait_for_somebody(self._pause_seconds):
                    self._pause_seconds = FIRST_PAUSE_SECONDS
                else:
                    self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _wait_for_somebody(self, seconds: float) -> bool:
        """Return after some seconds, or with True as soon as somebody waits for what is written."""
        return self.changed.wait_for(lambda: self._is_asked, seconds)

    def _attempt(self) -> bool:
        """Write what is under way; False if something was in the way."""
        trouble: BaseException | None = None
        try:
            for item in self._write(list(self._under_way)):
                with self.changed:
                    self._under_way.remove(item)
                    if item in self.waiting:  # it may have been given up meanwhile
                        self.waiting.remove(item)
                    self._pause_seconds = FIRST_PAUSE_SECONDS
                    self._tell(None)
        except BaseException as error:  # a thread that ended here would leave all waiting for ever
            trouble = error
        with self.changed:
            self._under_way = []
            self._tell(trouble)
        return trouble is None

    def _tell(self, trouble: BaseException | None) -> None:
        self.trouble = "" if trouble is None else f"{type(trouble).__name__}: {trouble}"
        self.is_refused = trouble is not None and not isinstance(trouble, TransientError)
        self.changed.notify_all()
