"""dagflow: train torch models on machines nobody controls, as a dask graph of stages.

>>> import dagflow
>>> sorted(name for name in dagflow.__all__ if name[0].islower())
['capture', 'embed', 'empty_weights', 'generate', 'load', 'partition', 'score', 'train']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagflow.errors import (
        BatchInvalid,
        CacheFull,
        CaptureFailed,
        DagflowError,
        NonFiniteLoss,
        OperatorNotAllowed,
        OptimizerInvalid,
        PermanentError,
        PlanInvalid,
        ProgramInvalid,
        RequestTooLarge,
        ResultsDiffer,
        SettingsInvalid,
        StageTooLarge,
        StoreHoldsAnotherRun,
        StoreNotWritable,
        TransientError,
        WorkerIncompatible,
        WorkersLost,
    )
    from dagflow.graph.capture import capture
    from dagflow.graph.dag import OperatorDag
    from dagflow.plan.partition import Partition, partition
    from dagflow.plan.plan import Plan
    from dagflow.run.clusters import ClusterSettings
    from dagflow.run.data import TokenDataset
    from dagflow.run.events import StepEvent
    from dagflow.run.settings import Config
    from dagflow.run.training import TrainResult, train
    from dagflow.run.weights import empty_weights
    from dagflow.sessions.answers import Token
    from dagflow.sessions.deployment import Deployment
    from dagflow.sessions.generate import Generation, generate
    from dagflow.sessions.kept import StoredAnswer
    from dagflow.sessions.loading import load
    from dagflow.sessions.models import Model
    from dagflow.sessions.sampling import Sampling
    from dagflow.sessions.score import Scores, embed, score
    from dagflow.sessions.session import Session
    from dagflow_storage import Retention
    from dagflow_tasks.optimizer import Optimizer, Schedule
    from dagflow_tasks.references import DAGFLOW_VERSION as __version__

__all__ = [
    "BatchInvalid",
    "CacheFull",
    "CaptureFailed",
    "ClusterSettings",
    "Config",
    "DagflowError",
    "Deployment",
    "Generation",
    "Model",
    "NonFiniteLoss",
    "OperatorDag",
    "OperatorNotAllowed",
    "Optimizer",
    "OptimizerInvalid",
    "Partition",
    "PermanentError",
    "Plan",
    "PlanInvalid",
    "ProgramInvalid",
    "RequestTooLarge",
    "ResultsDiffer",
    "Retention",
    "Sampling",
    "Schedule",
    "Scores",
    "Session",
    "SettingsInvalid",
    "StageTooLarge",
    "StepEvent",
    "StoreHoldsAnotherRun",
    "StoreNotWritable",
    "StoredAnswer",
    "Token",
    "TokenDataset",
    "TrainResult",
    "TransientError",
    "WorkerIncompatible",
    "WorkersLost",
    "__version__",
    "capture",
    "embed",
    "empty_weights",
    "generate",
    "load",
    "partition",
    "score",
    "train",
]

# Where each name is. They are loaded when they are used: torch takes two seconds and 200 MB, which
# dask's own commands (they load dagflow's, too), a worker's nanny and `dagflow join` do without.
_HOMES = {
    "dagflow.errors": (
        "BatchInvalid",
        "CacheFull",
        "CaptureFailed",
        "DagflowError",
        "NonFiniteLoss",
        "OperatorNotAllowed",
        "OptimizerInvalid",
        "PermanentError",
        "PlanInvalid",
        "ProgramInvalid",
        "RequestTooLarge",
        "ResultsDiffer",
        "SettingsInvalid",
        "StageTooLarge",
        "StoreHoldsAnotherRun",
        "StoreNotWritable",
        "TransientError",
        "WorkerIncompatible",
        "WorkersLost",
    ),
    "dagflow.graph.capture": ("capture",),
    "dagflow.graph.dag": ("OperatorDag",),
    "dagflow.plan.partition": (
        "Partition",
        "partition",
    ),
    "dagflow.plan.plan": ("Plan",),
    "dagflow.run.clusters": ("ClusterSettings",),
    "dagflow.run.data": ("TokenDataset",),
    "dagflow.run.events": ("StepEvent",),
    "dagflow.run.settings": ("Config",),
    "dagflow.run.training": (
        "TrainResult",
        "train",
    ),
    "dagflow.run.weights": ("empty_weights",),
    "dagflow.sessions.answers": ("Token",),
    "dagflow.sessions.deployment": ("Deployment",),
    "dagflow.sessions.generate": (
        "Generation",
        "generate",
    ),
    "dagflow.sessions.kept": ("StoredAnswer",),
    "dagflow.sessions.loading": ("load",),
    "dagflow.sessions.models": ("Model",),
    "dagflow.sessions.sampling": ("Sampling",),
    "dagflow.sessions.score": (
        "Scores",
        "embed",
        "score",
    ),
    "dagflow.sessions.session": ("Session",),
    "dagflow_storage": ("Retention",),
    "dagflow_tasks.optimizer": (
        "Optimizer",
        "Schedule",
    ),
    "dagflow_tasks.references": ("__version__",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = import_module(_HOME_OF[name])
        globals()[name] = vars(home)["DAGFLOW_VERSION" if name == "__version__" else name]
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
