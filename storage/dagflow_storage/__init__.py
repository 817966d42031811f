"""Floor 1 of dagflow: where things are, and whether they are finished. Knows no task."""

from dagflow_storage.arrays import ArraySpec, StoredArray, read_arrays, write_arrays
from dagflow_storage.codec import Blosc2Codec
from dagflow_storage.documents import JSON
from dagflow_storage.errors import (
    CredentialsExpired,
    DagflowError,
    DamagedData,
    FormatTooNew,
    NotFound,
    PermanentError,
    StoreHoldsAnotherRun,
    StoreNotReadable,
    StoreNotWritable,
    StoreUnreachable,
    TransientError,
)
from dagflow_storage.location import ConditionMissing, ProbeReport, Store
from dagflow_storage.retries import Clock, Retries, RetryPolicy
from dagflow_storage.runs import RunDirectory, settings_diff
from dagflow_storage.snapshots import (
    ShardRecord,
    Snapshot,
    commit_snapshot,
    delete_old_snapshots,
    delete_snapshot,
    list_snapshots,
    write_shard,
)
from dagflow_storage.tokens import TokenArray, write_tokens

__all__ = [
    "JSON",
    "ArraySpec",
    "Blosc2Codec",
    "Clock",
    "ConditionMissing",
    "CredentialsExpired",
    "DagflowError",
    "DamagedData",
    "FormatTooNew",
    "NotFound",
    "PermanentError",
    "ProbeReport",
    "Retries",
    "RetryPolicy",
    "RunDirectory",
    "ShardRecord",
    "Snapshot",
    "Store",
    "StoreHoldsAnotherRun",
    "StoreNotReadable",
    "StoreNotWritable",
    "StoreUnreachable",
    "StoredArray",
    "TokenArray",
    "TransientError",
    "commit_snapshot",
    "delete_old_snapshots",
    "delete_snapshot",
    "list_snapshots",
    "read_arrays",
    "settings_diff",
    "write_arrays",
    "write_shard",
    "write_tokens",
]
