"""The run's ledger and metrics: what each step was computed from, and what came of it.

Both are written behind the driver, metrics first: whoever goes on from a step that the ledger has
knows the losses up to there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagflow_storage import RunDirectory
from dagflow_storage.write_behind import WriteBehind
from dagflow_tasks.train.replay import StepRecord

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
        self._rows = WriteBehind[_Row]("dagflow-ledger", self._write)

    @property
    def trouble(self) -> str:
        """Why the ledger can't be written at present; empty if it can."""
        return self._rows.trouble

    def before(self, step: int) -> list[StepRecord]:
        """Return the records of the steps before one, in order."""
        return [self.records[k] for k in sorted(self.records) if k < step]

    def add(self, record: StepRecord, metrics: Mapping[str, Any]) -> None:
        """Note a step that all stages have done, and what there is to tell of it."""
        self.records[record.step] = record
        self._rows.add((record, metrics))

    def forget(self, before_step: int) -> None:
        """Forget the steps that no replay will need; the store keeps them."""
        self.records = {k: r for k, r in self.records.items() if k >= before_step}

    def flush(self, seconds: float) -> bool:
        """Return once everything is written; False if that took longer than so many seconds."""
        return self._rows.flush(seconds)

    def has_written(self, before_step: int) -> bool:
        """Tell whether all earlier steps are in the store."""
        with self._rows.changed:
            return all(record.step >= before_step for record, _ in self._rows.waiting)

    @contextmanager
    def writing(self) -> Iterator[Ledger]:
        """Write in the background while the block runs, and the rest at its end.

        If nothing helps then, a run that is taken up again goes on from the last step written.
        """
        try:
            yield self
        finally:
            self._rows.end()

    def _write(self, rows: list[_Row]) -> list[_Row]:
        self._run.append_metrics([metrics for _, metrics in rows])
        self._run.ledger.append([record.to_json() for record, _ in rows])
        return rows
