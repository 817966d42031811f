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
    """Result of `forward`.

    Attributes
    ----------
    values : mapping
        Boundary values, and the loss, by name, without autograd history.
    buffers : mapping or None
        The stage's mutated buffers after this micro-batch. They stay on the worker: only the
        stage's own next task reads them.
    finite : bool
        Whether all floating-point values are finite.
    place : (step, micro-batch)
        What the worker's cache knows `buffers` by, if this copy has lost them on a journey.
    weights : BackwardResult or None
        Result of the `backward_weights` that the task began with.
    """

    values: Tensors
    buffers: Tensors | None = None
    finite: bool = True
    place: tuple[int, int] = (-1, -1)
    weights: BackwardResult | None = None


@dataclass
class GradientSums:
    """Gradients of a stage's parameter uses, added up in place over a step's micro-batches.

    All of a stage's backward results of a step share one: it is as large as the weights. `place`
    says which micro-batch was added last, so that a backward that runs again adds nothing twice.

    Attributes
    ----------
    place : (step, micro-batch) or None
        None while a backward is adding, and for good if it fails on the way.
    tensors : dict
        By use.
    trouble : Exception or None
        What went wrong in adding ahead; whoever asks for the sums raises it.
    """

    place: tuple[int, int] | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    trouble: Exception | None = None


@dataclass(frozen=True)
class BackwardResult:
    """Result of `backward`, of either half of it, and of `forward_backward`.

    Attributes
    ----------
    gradients : mapping
        Gradients of the stage's boundary inputs by value name, later readers' included.
    sums : GradientSums or None
        Gradients of the stage's parameter uses so far. They stay on the worker: only the stage's own
        next task reads them.
    non_finite : tuple of int
        Micro-batches so far whose forward left the finite numbers in this stage.
    losses : tuple of float
        Of the micro-batches so far, in the stage that computes the loss.
    place : (step, micro-batch)
        What the worker's cache knows `sums` by, if this copy has lost them on a journey.
    forward : ForwardResult or None
        The forward's result, where one task did both.
    """

    gradients: Tensors
    sums: GradientSums | None = None
    non_finite: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    place: tuple[int, int] = (-1, -1)
    forward: ForwardResult | None = None


StageResult = ForwardResult | BackwardResult
"""What holds a forward's result: itself, or the result of `forward_backward`."""


def forward_part(result: StageResult) -> ForwardResult:
    """Return the forward's result, whether or not the backward came with it."""
    if isinstance(result, ForwardResult):
        return result
    assert result.forward is not None
    return result.forward


def sums_part(result: StageResult) -> BackwardResult:
    """Return the result that holds gradient sums, whether or not a forward came with it."""
    there = result if isinstance(result, ForwardResult) else result.forward
    if there is not None and there.weights is not None:
        return there.weights
    assert isinstance(result, BackwardResult)
    return result


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
