"""What a step is computed from, and how far its stages are if it is taken up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dagflow.training.dask_tasks import Key
from dagflow_tasks.train.optimizer import Schedule as LearningRates
from dagflow_tasks.train.references import Microbatch
from dagflow_tasks.train.replay import StageProgress
from dagflow_tasks.train.results import Decision


@dataclass(frozen=True)
class StepInputs:
    """What a step is computed from.

    Attributes
    ----------
    step : int
    microbatches : tuple of Microbatch
    batch : callable
        ``batch(stage, microbatch_index)`` gives the graph argument (a literal or a `TaskRef`) that
        holds the batch's tensors for that stage.
    learning_rate : float or Schedule
        The schedule's factor, or the schedule itself; see `dagflow_tasks.train.update.update`.
    saved : bool
        True if the state before this step is being written to the store, which its update must
        wait for.
    first : bool
        True if nothing before this step is in flight: the weights are in the workers' caches or in
        the store, and no earlier task has to be waited for.
    decision : Decision | None
        The latest decision, if `first` in a run that clips or scales.
    ready : mapping
        By stage the key of a task that brings its weights to this step, and has to be waited for.
    standing : Standing | None
        How far each stage has got, if the step is taken up again after something was lost.
    """

    step: int
    microbatches: tuple[Microbatch, ...]
    batch: Callable[[int, int], Any]
    learning_rate: float | LearningRates
    first: bool
    saved: bool = False
    decision: Decision | None = None
    ready: Mapping[int, Key] = field(default_factory=dict)
    standing: Standing | None = None


@dataclass(frozen=True)
class Standing:
    """How far every stage has got in steps that were interrupted.

    Attributes
    ----------
    stages : mapping
        Progress by stage; a stage that is being rebuilt stands at the beginning of a step.
    """

    stages: Mapping[int, StageProgress]

    def step(self, stage: int) -> int:
        """Return how many steps a stage's weights have taken."""
        return self.stages[stage].step

    def has_done(self, kind: str, step: int, stage: int, index: int = 0) -> bool:
        """Tell whether a task is done, so that its result can be recalled."""
        known = self.stages[stage]
        if known.step != step:
            return known.step > step
        place = (step, index)
        if known.place[0] == step and place <= known.place:
            return kind in ("forward", "backward", "weights")
        if kind == "forward":
            return place in known.forwards or place in known.halves
        return kind == "backward" and place in known.halves
