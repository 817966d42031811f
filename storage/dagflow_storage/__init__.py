"""Floor 1 of dagflow: where things are, and whether they are finished. Knows no task."""

from dagflow_storage.arrays import ArraySpec, StoredArray, read_arrays, write_arrays
from dagflow_storage.codec import Blosc2Codec
from dagflow_storage.documents import JSON
from dagflow_storage.errors import (
    DagflowError,
    DamagedData,
    FormatTooNew,
    LeaseLost,
    LeaseUnconfirmed,
    NotFound,
    PermanentError,
    StoreHoldsAnotherRun,
    StoreInUse,
    StoreNotWritable,
    StoreUnreachable,
    TransientError,
)
from dagflow_storage.lease import Lease, hold_lease
from dagflow_storage.location import Store
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
    "DagflowError",
    "DamagedData",
    "FormatTooNew",
    "Lease",
    "LeaseLost",
    "LeaseUnconfirmed",
    "NotFound",
    "PermanentError",
    "RunDirectory",
    "ShardRecord",
    "Snapshot",
    "Store",
    "StoreHoldsAnotherRun",
    "StoreInUse",
    "StoreNotWritable",
    "StoreUnreachable",
    "StoredArray",
    "TokenArray",
    "TransientError",
    "commit_snapshot",
    "delete_old_snapshots",
    "delete_snapshot",
    "hold_lease",
    "list_snapshots",
    "read_arrays",
    "settings_diff",
    "write_arrays",
    "write_shard",
    "write_tokens",
]
