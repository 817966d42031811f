"""Errors of the upper floor, and the whole tree for those who import `dagflow`.

::

    DagflowError
    ├── TransientError                 another worker, or later, may succeed
    │   ├── StoreUnreachable, LeaseUnconfirmed
    │   ├── StateLost                  a stage's weights were on a worker that left
    │   ├── GarbageReceived            another worker's result can't be right
    │   ├── SessionInUse               an answer or a session is being made by somebody
    │   ├── WorkersLost                too few workers are left, or none came in time
    │   │   └── SchedulerLost          the scheduler went away
    │   ├── NoProgress                 a request's tokens were under way for too long
    │   ├── CacheFull                  workers' caches have no room for more tokens now
    │   └── ...
    └── PermanentError                 the same inputs fail again
        ├── CaptureFailed              the model can't become an operator DAG
        ├── ResultsDiffer              what was captured computes something else than the model
        ├── BatchInvalid               a batch fits no captured signature
        │   └── RequestTooLarge        prompt and answer are more than workers' caches hold
        ├── PlanInvalid                such a cut doesn't exist
        │   └── StageTooLarge          no worker can hold that stage
        ├── SettingsInvalid            an option of `train` that makes no sense
        ├── WorkerIncompatible         a worker runs another dagflow
        ├── NonFiniteLoss              the loss became NaN or infinite
        ├── WeightsNotFinite           an update destroyed the weights; no snapshot of those
        ├── ProgramInvalid, OptimizerInvalid, TaskFailed
        ├── StoreInUse, LeaseLost          another driver trains this run, or has taken over
        ├── StoreNotWritable, StoreNotReadable, StoreHoldsAnotherRun
        ├── CredentialsExpired             new ones are needed
        └── DamagedData, FormatTooNew, NotFound
"""

from __future__ import annotations

from dagflow_storage.errors import (
    CredentialsExpired,
    DagflowError,
    DamagedData,
    FormatTooNew,
    LeaseLost,
    LeaseUnconfirmed,
    NotFound,
    PermanentError,
    StoreHoldsAnotherRun,
    StoreInUse,
    StoreNotReadable,
    StoreNotWritable,
    StoreUnreachable,
    TransientError,
)
from dagflow_tasks.errors import (
    GarbageReceived,
    OperatorNotAllowed,
    OptimizerInvalid,
    ProgramInvalid,
    ProgramTooNew,
    StateLost,
    TaskFailed,
    WeightsNotFinite,
)


class CaptureFailed(PermanentError):
    """The model can't become an operator DAG; names module, source line and operator."""


class ResultsDiffer(PermanentError):
    """What dagflow would compute isn't what the model computes by itself; says what and by how much."""


class BatchInvalid(PermanentError):
    """A batch doesn't fit the shapes, dtypes or names that were captured."""


class RequestTooLarge(BatchInvalid):
    """A prompt with its answer is longer than what the workers' caches can ever hold."""


class PlanInvalid(PermanentError):
    """The requested cut into stages doesn't exist."""


class StageTooLarge(PlanInvalid):
    """A stage needs more memory than any worker has."""


class SettingsInvalid(PermanentError):
    """An option of `dagflow.train` is wrong or contradicts another."""


class WorkersLost(TransientError):
    """No worker came in time, or too few are left to go on."""


class SchedulerLost(WorkersLost):
    """The scheduler has gone away; the run goes on from the store when there is one again."""


class NoProgress(TransientError):
    """A request's tokens were under way for too long though workers answer; another may come through."""


class CacheFull(TransientError):
    """The workers' caches have no room for a session's tokens now; others may make some."""


class SessionInUse(TransientError):
    """An answer or a session of this name is being made; once that has ended it can be had."""


class WorkerIncompatible(PermanentError):
    """A worker runs another dagflow, or a torch that can't run the programs."""


class NonFiniteLoss(PermanentError):
    """The loss became NaN or infinite; training it further would destroy the weights."""


__all__ = [
    "BatchInvalid",
    "CacheFull",
    "CaptureFailed",
    "CredentialsExpired",
    "DagflowError",
    "DamagedData",
    "FormatTooNew",
    "GarbageReceived",
    "LeaseLost",
    "LeaseUnconfirmed",
    "NoProgress",
    "NonFiniteLoss",
    "NotFound",
    "OperatorNotAllowed",
    "OptimizerInvalid",
    "PermanentError",
    "PlanInvalid",
    "ProgramInvalid",
    "ProgramTooNew",
    "RequestTooLarge",
    "ResultsDiffer",
    "SchedulerLost",
    "SessionInUse",
    "SettingsInvalid",
    "StageTooLarge",
    "StateLost",
    "StoreHoldsAnotherRun",
    "StoreInUse",
    "StoreNotReadable",
    "StoreNotWritable",
    "StoreUnreachable",
    "TaskFailed",
    "TransientError",
    "WeightsNotFinite",
    "WorkerIncompatible",
    "WorkersLost",
]
