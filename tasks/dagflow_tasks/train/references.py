"""What a task is given instead of data: names of a run, a stage, a version, a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dagflow_storage import Store
from dagflow_tasks.train.optimizer import Optimizer

DAGFLOW_VERSION = version("dagflow")

# How values begin that hold the weight of a term, and what a whole batch has been summed up to.
WEIGHT, OF_BATCH = "w.", "n."

Numbers = Any
"""A number, or lists of numbers as deep as the value has dimensions."""


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
    numbers : tuple of (value, number or numbers)
        What the program reads besides tensors: the factors of the loss's terms, where these are weighed
        one by one (``w.0``; `weight` is 1 then, or 0), and what the whole batch has been summed up to.
    """

    step: int
    index: int
    weight: float
    sizes: tuple[tuple[str, int], ...] = ()
    numbers: tuple[tuple[str, Numbers], ...] = ()

    @property
    def least_weight(self) -> float:
        """The weight of what counts least; where it is 0, a mean over nothing may be NaN."""
        return min(
            [self.weight, *(float(n) for name, n in self.numbers if name.startswith(WEIGHT))]
        )


@dataclass(frozen=True)
class StateRef:
    """A stage's weights and optimizer state after `step` optimizer steps."""

    step: int


def action(kind: str, stage: int, step: int, microbatch: int | None = None) -> str:
    """Write a task as schedules do: ``2F0 step 17`` is stage 2, forward, micro-batch 0.

    Parameters
    ----------
    kind
        ``F`` forward, ``I`` input gradients, ``W`` weight gradients, ``B`` both, ``U`` update.
    """
    return f"{stage}{kind}{'' if microbatch is None else microbatch} step {step}"
