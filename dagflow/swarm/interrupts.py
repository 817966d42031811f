"""Ctrl-C while a run is under way: heeded where nothing is half done."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dagflow_storage import is_pausing

# Whoever waits looks around so often: for Ctrl-C, and for who has come or gone.
TICK_SECONDS = 0.5


@dataclass
class Interrupts:
    """Notes the first Ctrl-C until somebody asks for it; the second ends everything at once.

    A store that is away is tried for minutes: whoever waits to try again is asked at once.

    Python raises KeyboardInterrupt between any two lines, also between handing a step to dask and
    remembering that it is in flight, and loses it in destructors, of which releasing results runs
    many.
    """

    _noted: bool = False
    _heeded: bool = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note interrupts inside the block; a program's own handler is left alone."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def heed(self) -> None:
        """Raise KeyboardInterrupt if one was noted; once."""
        if self._noted and not self._heeded:
            self._heeded = True
            raise KeyboardInterrupt

    def until(self, is_done: Callable[[float], bool], seconds: float) -> bool:
        """Wait for something so many seconds, heeding interrupts; False if it takes longer.

        Parameters
        ----------
        is_done
            Waits for it as many seconds as it is given, and tells whether it is done.
        """
        deadline = time.monotonic() + seconds
        while not is_done(TICK_SECONDS):
            self.heed()
            if time.monotonic() > deadline:
                return False
        return True

    def _note(self, *_: Any) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True
        if is_pausing():
            self.heed()
