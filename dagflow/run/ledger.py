"""The run's ledger and metrics: what each step was computed from, and what came of it.

Both are written behind the driver, metrics first: whoever goes on from a step that the ledger has
knows the losses up to there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagflow.errors import DagflowError
from dagflow_storage import RunDirectory
from dagflow_tasks.replay import StepRecord

_PAUSE_SECONDS = 1.0


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
        self.trouble = ""
        self._changed = threading.Condition()
        self._waiting: list[tuple[StepRecord, Mapping[str, Any]]] = []
        self._ending = False

    def before(self, step: int) -> list[StepRecord]:
        """Return the records of the steps before one, in order."""
        return [self.records[k] for k in sorted(self.records) if k < step]

    def add(self, record: StepRecord, metrics: Mapping[str, Any]) -> None:
        """Note a step that all stages have done, and what there is to tell of it."""
        self.records[record.step] = record
        with self._changed:
            self._waiting.append((record, metrics))
            self._changed.notify_all()

    def forget(self, before_step: int) -> None:
        """Forget the steps that no replay will need; the store keeps them."""
        self.records = {k: r for k, r in self.records.items() if k >= before_step}

    def flush(self, seconds: float) -> bool:
        """Return once everything is written; False if that took longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def has_written(self, before_step: int) -> bool:
        """Tell whether all earlier steps are in the store."""
        with self._changed:
            return all(record.step >= before_step for record, _ in self._waiting)

    @contextmanager
    def writing(self) -> Iterator[Ledger]:
        """Write in the background while the block runs, and the rest at its end."""
        thread = threading.Thread(target=self._write, name="dagflow-ledger", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            thread.join()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                waiting, ending = list(self._waiting), self._ending
            written = self._try(waiting)
            with self._changed:
                if written:
                    del self._waiting[: len(waiting)]
                    self._changed.notify_all()
                elif not ending:
                    self._changed.wait_for(lambda: self._ending, _PAUSE_SECONDS)
                    continue
                if ending:
                    return

    def _try(self, waiting: list[tuple[StepRecord, Mapping[str, Any]]]) -> bool:
        try:
            self._run.append_metrics([metrics for _, metrics in waiting])
            self._run.ledger.append([record.to_json() for record, _ in waiting])
        except DagflowError as error:
            # The store has tried for as long as it may. If nothing helps, a run that is taken up
            # again goes on from the last step written.
            self.trouble = f"{type(error).__name__}: {error}"
            return False
        self.trouble = ""
        return True
