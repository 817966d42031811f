"""What the zoo finds out of one model: a row of its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dagflow.errors import DagflowError, ResultsDiffer


class Record(dict[str, Any]):
    """A row: column names to plain values. Each note is reported, so that a killed model leaves them.

    ``training`` and ``serving`` hold the verdict: right, refused, wrong (by how much), warned
    (wrong, as a warning says), refused needlessly (by the check before the first step), crash, late
    (a batch was taken that the captured operators don't take), stopped (took too long, or too much
    memory), or not run.
    """

    def __init__(self, group: str, name: str, report: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(group=group, name=name)
        self._report = report

    def note(self, **columns: Any) -> None:
        self.update(columns)
        self._report(dict(self))

    def failed(self, what: str, error: Exception) -> None:
        """Note an exception of dagflow's: a refusal if it is one of its errors."""
        verdict = "refused" if isinstance(error, DagflowError) else "crash"
        if verdict == "refused" and type(error).__name__ == "TaskFailed":
            verdict = "late"
        if _is_out_of_memory(error):
            verdict = "stopped"
        cause = "cause" if what == "training" else "serving_cause"
        self.note(**{what: verdict, cause: f"{type(error).__name__}: {short(error)}"})
        if isinstance(error, ResultsDiffer):
            self.note(**{f"{what}_found_by_check": True})

    def conclude_training(self) -> None:
        """Derive training's verdict from what has been compared."""
        if not self.get("training"):
            self.note(training=self._compared())
        if self.get("check") == "crash":
            self.note(training="crash", cause=f"the check: {self['check_cause']}")
        if self.get("microbatches") == "crash":
            self.note(training="crash", cause=f"micro-batches: {self['microbatches_cause']}")
        # A run begins with the check: what that refuses isn't trained, rightly so or not.
        if self.get("check") == "refuses":
            found = self["training"] not in ("right", "wrong cut")
            verdict = "refused" if found else "refused needlessly"
            self.note(training=verdict, found_by_check=found, cause=self["check_cause"])

    def _compared(self) -> str:
        uncut, cut = str(self.get("uncut")), str(self.get("cut"))
        if uncut.startswith("off"):
            return "warned" if self.get("warned") else "wrong"
        if cut.startswith("off"):
            return "wrong cut"
        if self.get("uncut") is None:
            return "not run"
        return "wrong" if self.get("left_as_it_was") is False else "right"


def short(error: object) -> str:
    """Return the first line of a message."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, Exception) and not isinstance(error, DagflowError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.splitlines()[0].split())[:300]


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether a model met the limit that the zoo sets to its process."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
