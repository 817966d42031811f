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
    from dagflow.models.loading import load
    from dagflow.models.model import Model
    from dagflow.models.weight_files import empty_weights
    from dagflow.plan.partition import Partition, partition
    from dagflow.plan.plan import Plan
    from dagflow.serving.answers import Token
    from dagflow.serving.deployment import Deployment
    from dagflow.serving.generate import Generation, generate
    from dagflow.serving.kept import StoredAnswer
    from dagflow.serving.sampling import Sampling
    from dagflow.serving.score import Scores, embed, score
    from dagflow.serving.session import Session
    from dagflow.swarm.clusters import ClusterSettings
    from dagflow.training.data import TokenDataset
    from dagflow.training.events import StepEvent
    from dagflow.training.result import TrainResult
    from dagflow.training.settings import Config
    from dagflow.training.train import train
    from dagflow_storage import Retention
    from dagflow_tasks.train.optimizer import Optimizer, Schedule
    from dagflow_tasks.train.references import DAGFLOW_VERSION as __version__

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
    "dagflow.swarm.clusters": ("ClusterSettings",),
    "dagflow.training.data": ("TokenDataset",),
    "dagflow.training.events": ("StepEvent",),
    "dagflow.training.settings": ("Config",),
    "dagflow.training.result": ("TrainResult",),
    "dagflow.training.train": ("train",),
    "dagflow.models.weight_files": ("empty_weights",),
    "dagflow.serving.answers": ("Token",),
    "dagflow.serving.deployment": ("Deployment",),
    "dagflow.serving.generate": (
        "Generation",
        "generate",
    ),
    "dagflow.serving.kept": ("StoredAnswer",),
    "dagflow.models.loading": ("load",),
    "dagflow.models.model": ("Model",),
    "dagflow.serving.sampling": ("Sampling",),
    "dagflow.serving.score": (
        "Scores",
        "embed",
        "score",
    ),
    "dagflow.serving.session": ("Session",),
    "dagflow_storage": ("Retention",),
    "dagflow_tasks.train.optimizer": (
        "Optimizer",
        "Schedule",
    ),
    "dagflow_tasks.train.references": ("__version__",),
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
