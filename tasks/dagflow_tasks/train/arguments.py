"""Arguments of the tasks of a step: one frozen dataclass for each kind of task.

Where another task's result belongs, the driver's graph has a reference to it, which `call` fills in
on the worker. Activations and gradients are (B, ...): B rows of one micro-batch, and what each
`ValueSpec` of the stage's program says of the rest, (B, T, D) say, for T tokens of D features. Their
dtype is the program's, or autocast's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from dagflow_tasks.train.optimizer import Schedule
from dagflow_tasks.train.references import Microbatch, StageRef, action
from dagflow_tasks.train.results import (
    BackwardResult,
    Decision,
    ForwardResult,
    StageResult,
    Tensors,
)


class Arguments:
    """Base of the arguments of a stage's tasks."""

    __slots__ = ()

    ref: StageRef

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Return the same with a function applied to each field."""
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))  # type: ignore[arg-type]

    @property
    def place(self) -> tuple[int, int]:
        """Step and micro-batch."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ForwardArguments(Arguments):
    """What a stage's forward on one micro-batch (``F``) is computed from.

    Attributes
    ----------
    ref : StageRef
    microbatch : Microbatch
        Its step says which version of the weights: those after that many optimizer steps.
    values : sequence of mapping or ForwardResult
        The batch's tensors and earlier stages' activations, by name, each (B, ...).
    halved : bool
        Whether the stage's backward is two tasks, ``I`` and ``W``, or one, ``B``; the same for all
        tasks of a stage under one plan.
    before : ForwardResult or BackwardResult or None
        Result of the previous micro-batch's forward, in a stage with mutated buffers.
    tied : sequence of mapping
        Parameters that other stages own, by name, each in its own shape.
    """

    ref: StageRef
    microbatch: Microbatch
    values: Sequence[Tensors | ForwardResult]
    halved: bool = False
    before: StageResult | None = None
    tied: Sequence[Tensors] = ()

    @property
    def place(self) -> tuple[int, int]:
        return self.microbatch.step, self.microbatch.index

    def label(self, kind: str) -> str:
        """Name a task with these arguments: ``2F0 step 17``."""
        return action(kind, self.ref.stage, *self.place)


@dataclass(frozen=True, slots=True)
class BackwardArguments(ForwardArguments):
    """What ``I``, ``W`` and ``B`` are computed from, and the last stage's forward with ``I`` or ``B``.

    What `ForwardArguments` has serves to run the forward again if its autograd graph is gone.

    Attributes
    ----------
    gradients : sequence of BackwardResult
        Results of the stages that hold gradients of this stage's activations, each (B, ...).
    scaling : Decision or None
        The previous step's decision, which holds the loss scale, in a run with loss scaling.
    previous : BackwardResult or None
        The result with the gradient sums up to the previous micro-batch; None for a step's first,
        and in ``I``, which adds nothing to them.
    """

    gradients: Sequence[BackwardResult] = ()
    scaling: Decision | None = None
    previous: BackwardResult | None = None


@dataclass(frozen=True, slots=True)
class UpdateArguments(Arguments):
    """What an optimizer step of a stage (``U``) is computed from.

    Attributes
    ----------
    ref : StageRef
    step : int
        Optimizer steps that the weights have taken before.
    gradients : BackwardResult
        The result with the gradient sums of the step's last micro-batch.
    learning_rate : float or Schedule
        The schedule's factor for this step, or the schedule, in a run with loss scaling: which of its
        factors it is depends on the decision.
    borrowed : sequence of mapping
        Gradients of this stage's parameters from stages that borrow them, by use.
    last : ForwardResult or BackwardResult or None
        Result of the last micro-batch's forward, in a stage with mutated buffers.
    decision : Decision or None
        Clipping and loss scaling, if the run has either.
    """

    ref: StageRef
    step: int
    gradients: BackwardResult
    learning_rate: float | Schedule
    borrowed: Sequence[Tensors] = ()
    last: StageResult | None = None
    decision: Decision | None = None

    @property
    def place(self) -> tuple[int, int]:
        return self.step, 0
