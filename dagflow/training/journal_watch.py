"""How much the journals write, and whether they and the ledger can, from what steps report."""

from __future__ import annotations

from collections.abc import Callable

from dagflow.training.ledger import Ledger
from dagflow_tasks.train.results import JournalStats, StepReport


class JournalWatch:
    """Compares what worker processes have written so far with the report before.

    Parameters
    ----------
    ledger
    note : callable
        Is told, once, of a journal or ledger that can't be written.
    """

    def __init__(self, ledger: Ledger, note: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._note = note
        self._journals: dict[str, JournalStats] = {}
        self._trouble = ""

    def since_last(self, report: StepReport) -> tuple[int, float]:
        """Return what all journals have written since the last report, and the busiest's seconds."""
        num_bytes, seconds = 0, 0.0
        for stats in {s.process: s for s in report.journal.values()}.values():
            before = self._journals.get(stats.process, JournalStats())
            num_bytes += max(0, stats.num_bytes - before.num_bytes)
            seconds = max(seconds, stats.seconds - before.seconds)
            if stats.trouble and stats.trouble != before.trouble:
                self._note(f"A worker's journal can't be written at present: {stats.trouble}")
            self._journals[stats.process] = stats
        if self._ledger.trouble and self._ledger.trouble != self._trouble:
            self._note(f"The ledger can't be written at present: {self._ledger.trouble}")
        self._trouble = self._ledger.trouble
        return num_bytes, seconds
