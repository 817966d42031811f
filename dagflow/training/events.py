"""Steps as events, and who is told of a run's events: callbacks and the progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dagflow.graph.show import amount
from dagflow.swarm.events import Event

# Without a terminal the progress line becomes a line of log every so often.
_LOG_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class StepEvent(Event):
    """One optimizer step is done.

    Attributes
    ----------
    step : int
        Steps done so far: 1 after the first.
    loss : float
    seconds : float
        Since the step before was done.
    amount : int
        Tokens or samples in the step's batch.
    unit : {"tokens", "samples"}
    learning_rate_factor : float
    gradient_norm : float | None
        Before clipping, in a run that clips.
    journal_bytes : int
        Written to the journal since the step before was done, by all workers.
    journal_share : float
        Share of that time for which the busiest worker's journal was being written.
    """

    step: int
    loss: float
    seconds: float
    amount: int
    unit: str
    learning_rate_factor: float
    gradient_norm: float | None = None
    journal_bytes: int = 0
    journal_share: float = 0.0

    @property
    def kind(self) -> str:
        return "step"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class StepObserver(Protocol):
    """An object that wants to hear of every step; with an `on_event`, of all other events, too."""

    def on_step(self, event: StepEvent) -> None: ...


Callback = StepObserver | Callable[[StepEvent], None]


def notify(callbacks: Sequence[Callback], event: Event) -> None:
    """Tell every callback: of a step by its `on_step` or by calling it, of the rest by its `on_event`."""
    for callback in callbacks:
        if isinstance(event, StepEvent):
            on_step: Callable[[StepEvent], None] = getattr(callback, "on_step", callback)  # type: ignore[arg-type]
            on_step(event)
        elif hasattr(callback, "on_event"):
            callback.on_event(event)


class ProgressLine:
    """One line: step, loss, speed, time left; and notes above it.

    Attributes
    ----------
    total : int | None
        Steps of the whole run, if known.
    """

    def __init__(self, enabled: bool, total: int | None = None) -> None:
        self._enabled = enabled
        self.total = total
        self._console = Console(stderr=True, highlight=False)
        self._live = enabled and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._smoothed: float | None = None
        self._logged = 0.0
        self._journal_bytes = 0

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False)

    def show(self, event: Event) -> None:
        """Show an event: a step in the line, what it says above it."""
        if isinstance(event, StepEvent):
            self.update(event)
        elif text := event.text():
            self.note(text)

    def begin(self, step: int) -> None:
        """Show the line, at a step that may be later than 0."""
        if not self._live:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=self.total, completed=step, text="starting")
        self._progress.start()

    def update(self, event: StepEvent) -> None:
        """Show a step."""
        rate = event.amount / event.seconds if event.seconds else 0.0
        old = self._smoothed
        self._smoothed = rate if old is None else 0.9 * old + 0.1 * rate
        text = f"loss {event.loss:.4f}  {self._smoothed:,.0f} {event.unit}/s"
        if event.journal_bytes:
            self._journal_bytes = event.journal_bytes
        if self._journal_bytes:
            text += f"  journal {amount(self._journal_bytes, 'B')} a step"
            text += f", {event.journal_share:.0%} of the time"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=event.step, text=text)
        elif self._enabled and time.monotonic() - self._logged > _LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            self.note(f"step {event.step}/{self.total or '?'}  {text}{self._remaining(event)}")

    def _remaining(self, event: StepEvent) -> str:
        if self.total is None or not self._smoothed:
            return ""
        seconds = (self.total - event.step) * event.amount / self._smoothed
        return f"  {seconds:.0f} s left"

    def close(self) -> None:
        """Leave the line as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
