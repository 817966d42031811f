"""What a task is given instead of data: names of a run, a stage, a version, a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from dagflow_storage import Store
from dagflow_tasks.optimizer import Optimizer

DAGFLOW_VERSION = version("dagflow")


@dataclass(frozen=True)
class TaskSettings:
    """The settings of a run that change what its tasks compute."""

    seed: int
    precision: str
    optimizer: Optimizer


@dataclass(frozen=True)
class StageRef:
    """One stage of one run under one plan.

    Attributes
    ----------
    store, run_id, plan, stage, settings
    journal : int
        Steps whose boundary tensors are written to the journal together; 0 for no journal.
    """

    store: Store
    run_id: str
    plan: str
    stage: int
    settings: TaskSettings
    journal: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What a worker's caches know the stage by."""
        return (self.run_id, self.plan, self.stage)


@dataclass(frozen=True)
class Microbatch:
    """One micro-batch of one step.

    Attributes
    ----------
    step, index : int
    weight : float
        The factor with which its loss counts in the step's: its share of what a mean is over, 1 for a
        sum, and 0 if nothing of it counts (no target), whatever its loss is then.
    sizes : tuple of (symbol, size)
    term_weights : tuple of (value, float)
        The factors of the loss's terms, where these are weighed one by one; `weight` is 1 then, or 0.
    """

    step: int
    index: int
    weight: float
    sizes: tuple[tuple[str, int], ...] = ()
    term_weights: tuple[tuple[str, float], ...] = ()

    @property
    def all_counts(self) -> bool:
        """Whether there is something to count for every part of the loss; a mean over nothing is NaN."""
        return bool(self.weight) and all(weight for _, weight in self.term_weights)


@dataclass(frozen=True)
class StateRef:
    """A stage's weights and optimizer state after `step` optimizer steps."""

    step: int


def action(kind: str, stage: int, microbatch: Microbatch) -> str:
    """Write a task as schedules do: ``2F0 step 17`` is stage 2, forward, micro-batch 0."""
    return f"{stage}{kind}{microbatch.index} step {microbatch.step}"
