"""dagflow: train torch models on machines nobody controls, as a dask graph of stages.

>>> import dagflow
>>> sorted(name for name in dagflow.__all__ if name[0].islower())
['capture', 'empty_weights', 'partition', 'train']
"""

from dagflow.errors import (
    BatchInvalid,
    CaptureFailed,
    DagflowError,
    NonFiniteLoss,
    OperatorNotAllowed,
    OptimizerInvalid,
    PermanentError,
    PlanInvalid,
    ProgramInvalid,
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
from dagflow_storage import Retention
from dagflow_tasks.optimizer import Optimizer, Schedule
from dagflow_tasks.references import DAGFLOW_VERSION as __version__

__all__ = [
    "BatchInvalid",
    "CaptureFailed",
    "ClusterSettings",
    "Config",
    "DagflowError",
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
    "Retention",
    "Schedule",
    "SettingsInvalid",
    "StageTooLarge",
    "StepEvent",
    "StoreHoldsAnotherRun",
    "StoreNotWritable",
    "TokenDataset",
    "TrainResult",
    "TransientError",
    "WorkerIncompatible",
    "WorkersLost",
    "__version__",
    "capture",
    "empty_weights",
    "partition",
    "train",
]
