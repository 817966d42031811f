"""The run's ledger: what each step was computed from, samples included, written behind the driver."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagflow.errors import DagflowError
from dagflow_storage import RunDirectory
from dagflow_tasks.replay import StepRecord

_Row = tuple[StepRecord, Mapping[str, Any]]


class Ledger:
    """Remembers the steps since a snapshot, and has them written in the order they were done.

    Parameters
    ----------
    run : RunDirectory
    records
        Steps that are in the store already and may still be needed.
    """

    def __init__(self, run: RunDirectory, records: dict[int, StepRecord] | None = None) -> None:
        self._run = run
        self.records = dict(records or {})
        self._queue: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self.trouble = ""

    def since(self, step: int) -> list[StepRecord]:
        """Return the records from a step on, in order."""
        return [self.records[k] for k in sorted(self.records) if k >= step]

    def add(self, record: StepRecord, metrics: Mapping[str, Any]) -> None:
        """Note a step that all stages have done, and what there is to say of it."""
        self.records[record.step] = record
        self._queue.put((record, metrics))

    def forget(self, before_step: int) -> None:
        """Forget the steps that no replay will need; the store keeps them."""
        self.records = {k: r for k, r in self.records.items() if k >= before_step}

    @contextmanager
    def writing(self) -> Iterator[Ledger]:
        """Write in the background while the block runs, and the rest at its end."""
        thread = threading.Thread(target=self._write, name="dagflow-ledger", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._queue.put(None)
            thread.join()

    def _write(self) -> None:
        waiting: list[_Row] = []
        ending = False
        while not ending:
            rows, ending = self._gathered()
            waiting += rows
            if not waiting:
                continue
            try:
                # Metrics first: a step that the ledger knows isn't run again.
                self._run.append_metrics([metrics for _, metrics in waiting])
                self._run.ledger.append([record.to_json() for record, _ in waiting])
                waiting, self.trouble = [], ""
            except DagflowError as error:
                # The store has tried for as long as it may. Tried again with the next step; if
                # nothing helps, a run that is taken up again goes on from the last step written.
                self.trouble = f"{type(error).__name__}: {error}"

    def _gathered(self) -> tuple[list[_Row], bool]:
        rows: list[_Row] = []
        row = self._queue.get()
        while row is not None:
            rows.append(row)
            if self._queue.empty():
                return rows, False
            row = self._queue.get()
        return rows, True
