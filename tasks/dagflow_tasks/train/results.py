"""What tasks return: the part that travels to other stages, and the part that stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dagflow_storage.place import fields
from dagflow_tasks.train.references import StateRef

Tensors = Mapping[str, torch.Tensor]

# As torch.amp.GradScaler begins.
INITIAL_LOSS_SCALE = 65536.0


@dataclass(frozen=True)
class ForwardResult:
    """Result of a forward, ``F``.

    Attributes
    ----------
    values : mapping
        Activations that other stages read, (B, ...) each, and the loss, (), by name, without autograd
        history.
    buffers : mapping or None
        The stage's mutated buffers after this micro-batch. They stay on the worker: only the
        stage's own next task reads them.
    place : (step, micro-batch)
        If dask has moved this result away and back, the worker's cache is asked for `buffers` by it.
    """

    values: Tensors
    buffers: Tensors | None = None
    place: tuple[int, int] = (-1, -1)


@dataclass
class GradientSums:
    """Gradients of a stage's parameter uses, added up in place over a step's micro-batches.

    All of a stage's backward results of a step share one: it is as large as the weights. `place`
    says which micro-batch was added last, so that a task that runs again adds nothing twice.

    Attributes
    ----------
    place : (step, micro-batch) or None
        None while a micro-batch is added, and for good if that fails on the way.
    tensors : dict
        By use, each in the parameter's shape; float32 where autocast makes half-precision gradients.
    non_finite : tuple of int
        Micro-batches so far whose forward left the finite numbers in this stage.
    losses : tuple of float
        Of the micro-batches so far, in the stage that computes the loss.
    """

    place: tuple[int, int] | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    non_finite: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class BackwardResult:
    """Result of a backward: ``I`` (`gradients`), ``W`` (`sums` and what goes with them) or ``B`` (all).

    Attributes
    ----------
    gradients : mapping
        Gradients of the stage's inputs from other stages, (B, ...) like the activations, by their
        names. What later stages have found for the same activation is in the sum.
    sums : GradientSums or None
        Gradients of the stage's parameter uses so far. They stay on the worker: only the stage's own
        next task reads them.
    non_finite, losses
        As in `GradientSums`, when this was returned.
    place : (step, micro-batch)
        If dask has moved this result away and back, the worker's cache is asked for `sums` and
        `buffers` by it.
    buffers : mapping or None
        As in `ForwardResult`, in the last stage, whose forward is part of this task.
    """

    gradients: Tensors
    sums: GradientSums | None = None
    non_finite: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    place: tuple[int, int] = (-1, -1)
    buffers: Tensors | None = None


StageResult = ForwardResult | BackwardResult
"""Result of the task that ran a forward: in the last stage that is the backward's, too."""


@dataclass(frozen=True)
class Decision:
    """What all stages do with a step's gradients.

    Attributes
    ----------
    norm : float
        Global norm of the gradients before clipping.
    coefficient : float
        Factor that clips them.
    apply : bool
        False if gradients overflowed under loss scaling: the step is skipped.
    loss_scale, good_steps
        Loss scale of the next step, and for how many steps it has held.
    skipped : int
        Steps that were skipped so far, this one included. They don't move the schedule on.
    """

    norm: float = 0.0
    coefficient: float = 1.0
    apply: bool = True
    loss_scale: float = 1.0
    good_steps: int = 0
    skipped: int = 0

    @classmethod
    def initial(cls, *, scaled: bool) -> Decision:
        """Return what holds before a run's first step."""
        return cls(loss_scale=INITIAL_LOSS_SCALE if scaled else 1.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Any) -> Decision:
        """Return what `to_json` was asked of; raises ValueError if it is none."""
        given = fields.members(body, "a decision")
        if unknown := given.keys() - cls.__dataclass_fields__.keys():
            raise ValueError(f"a decision has {sorted(unknown)}")
        return cls(
            fields.number(given.get("norm", cls.norm), "norm"),
            fields.number(given.get("coefficient", cls.coefficient), "coefficient"),
            fields.flag(given.get("apply", cls.apply), "apply"),
            fields.number(given.get("loss_scale", cls.loss_scale), "loss_scale"),
            fields.integer(given.get("good_steps", cls.good_steps), "good_steps"),
            fields.integer(given.get("skipped", cls.skipped), "skipped"),
        )


@dataclass(frozen=True)
class JournalStats:
    """How a process's journal fares.

    Attributes
    ----------
    process : str
        Whose journal it is.
    num_bytes : int
        Written of the run so far, uncompressed.
    seconds : float
        Spent writing that.
    waiting_bytes : int
        Not written yet.
    trouble : str
        Why nothing can be written at present, or "".
    """

    process: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    waiting_bytes: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class UpdateResult:
    """Result of `update`: where the stage stands, and what went wrong on the way.

    Attributes
    ----------
    state : StateRef
    stage : int
    non_finite : tuple of int
        Micro-batches whose forward left the finite numbers in this stage.
    journal : JournalStats or None
        How the journal of the stage's worker fares, in a run that keeps one.
    """

    state: StateRef
    stage: int
    non_finite: tuple[int, ...] = ()
    journal: JournalStats | None = None


@dataclass(frozen=True)
class StepReport:
    """What the driver learns of a step.

    Attributes
    ----------
    step : int
    loss : float
        Weighted sum over the micro-batches.
    losses : tuple of float
        One a micro-batch.
    decision : Decision or None
        In a run that clips or scales.
    non_finite : mapping
        By stage the micro-batches whose values left the finite numbers there.
    journal : mapping
        How the journals of the stages' workers fare, by stage.
    """

    step: int
    loss: float
    losses: tuple[float, ...] = ()
    decision: Decision | None = None
    non_finite: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    journal: Mapping[int, JournalStats] = field(default_factory=dict)
