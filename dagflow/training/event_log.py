"""A run's events, kept in its directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagflow.swarm.events import Event
from dagflow.training.events import StepEvent
from dagflow_storage import RunDirectory
from dagflow_storage.write_behind import WriteBehind

_LAST_SECONDS = 5.0


class EventLog:
    """A listener that has events written behind the driver, numbered through all attempts at a run.

    Steps are in the metrics already. If the store is away when the run ends, nobody waits long for the
    last events, and they are lost.
    """

    def __init__(self, run: RunDirectory) -> None:
        last = run.events.last()
        self._number = 0 if last is None else int(last["number"]) + 1
        self._rows = WriteBehind[dict[str, Any]](
            "dagflow-events", lambda rows: _append(run, rows), gather_seconds=1.0
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            return
        self._rows.add({"number": self._number, "time": time.time(), **event.to_json()})
        self._number += 1

    @contextmanager
    def writing(self) -> Iterator[EventLog]:
        """Write in the background while the block runs, and the rest at its end."""
        try:
            yield self
        finally:
            if not self._rows.end(_LAST_SECONDS):
                self._rows.drop(lambda _: True)


def _append(run: RunDirectory, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    run.events.append(rows)
    return rows
