"""Errors of programs and tasks, on dagflow's tree (see `dagflow_storage.errors` for its root).

::

    DagflowError
    ├── TransientError            another worker, or later, may succeed
    │   ├── StateLost             a stage's weights are neither on this worker nor in the store
    │   └── GarbageReceived       another worker's result can't be right
    └── PermanentError            the same inputs fail again
        ├── ProgramInvalid        a program file that can't be read as one
        │   ├── OperatorNotAllowed
        │   ├── SizeInvalid       a size that no program may ask for, or that can't be calculated
        │   └── ProgramTooNew
        ├── OptimizerInvalid      no such optimizer, or no such option
        ├── WeightsNotFinite      an update made weights infinite or NaN: no snapshot of those
        └── TaskFailed            an operator of a stage raised: names stage, operator and module
            └── LimitReached      a program would take more memory or time than this machine gives
"""

from __future__ import annotations

from dagflow_storage.errors import PermanentError, TransientError


class StateLost(TransientError):
    """A stage's weights of a step are neither cached on this worker nor in the store."""


class GarbageReceived(TransientError):
    """What a stage sent can't be right: NaN, or another shape than its program says.

    Attributes
    ----------
    stage : int
        Who sent it, or computed it; -1 if unknown.
    has_nan : bool
        Whether it is its numbers that are wrong.
    """

    def __init__(self, message: str = "", stage: int = -1, has_nan: bool = False) -> None:
        super().__init__(message)
        self.stage = stage
        self.has_nan = has_nan


class ProgramInvalid(PermanentError):
    """A program file lacks what a program needs."""


class OperatorNotAllowed(ProgramInvalid):
    """A program names an operator outside the allow-list."""


class SizeInvalid(ProgramInvalid, ArithmeticError):
    """A size expression is none, is too large, or can't be calculated for these sizes."""


class ProgramTooNew(ProgramInvalid):
    """A program was written by a newer dagflow."""


class OptimizerInvalid(PermanentError):
    """The optimizer's or schedule's name or options don't exist."""


class TaskFailed(PermanentError):
    """An operator of a stage raised an error."""


class WeightsNotFinite(PermanentError):
    """A stage's weights are no longer finite; they are not put into a snapshot."""


class LimitReached(TaskFailed):
    """A program takes more time, or would take more memory, than a run may on this machine."""
