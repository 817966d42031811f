"""Floor 1 of dagflow: where things are, and whether they are finished. Knows no task."""

from dagflow_storage.arrays.arrays import (
    ALIGNMENT_BYTES,
    ArraySpec,
    StoredArray,
    read_arrays,
    write_arrays,
)
from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.arrays.tokens import TokenArray, write_tokens
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
from dagflow_storage.lease import Lease, hold_lease
from dagflow_storage.place.documents import JSON
from dagflow_storage.place.listing import FoundObject, size_bytes, walk
from dagflow_storage.place.location import ConditionMissing, ProbeReport, Store
from dagflow_storage.place.redaction import shown_url
from dagflow_storage.place.retries import Clock, Retries, RetryPolicy, is_pausing
from dagflow_storage.records.garbage import (
    Garbage,
    GarbageReport,
    collect_garbage,
    first_journal_step,
)
from dagflow_storage.records.manifest import ShardRecord, StoredObject
from dagflow_storage.records.retention import (
    Retention,
    SnapshotFacts,
    apply_retention,
    delete_old_snapshots,
)
from dagflow_storage.records.run_directory import RunDirectory, settings_diff
from dagflow_storage.records.sequences import (
    SEQUENCES_FOLDER,
    SequenceLog,
    StoredSequence,
    delete_sequence,
    is_sequence_name,
    list_sequences,
)
from dagflow_storage.records.snapshots import (
    Snapshot,
    commit_snapshot,
    delete_snapshot,
    list_snapshots,
    write_shard,
)
from dagflow_storage.records.verify import (
    Damage,
    differences,
    glance_at_snapshot,
    newest_whole_snapshot,
    set_aside_newer,
    verify_snapshot,
)

__all__ = [
    "ALIGNMENT_BYTES",
    "JSON",
    "SEQUENCES_FOLDER",
    "ArraySpec",
    "Blosc2Codec",
    "Clock",
    "ConditionMissing",
    "CredentialsExpired",
    "DagflowError",
    "Damage",
    "DamagedData",
    "FormatTooNew",
    "FoundObject",
    "Garbage",
    "GarbageReport",
    "Lease",
    "LeaseLost",
    "LeaseUnconfirmed",
    "NotFound",
    "PermanentError",
    "ProbeReport",
    "Retention",
    "Retries",
    "RetryPolicy",
    "RunDirectory",
    "SequenceLog",
    "ShardRecord",
    "Snapshot",
    "SnapshotFacts",
    "Store",
    "StoreHoldsAnotherRun",
    "StoreInUse",
    "StoreNotReadable",
    "StoreNotWritable",
    "StoreUnreachable",
    "StoredArray",
    "StoredObject",
    "StoredSequence",
    "TokenArray",
    "TransientError",
    "apply_retention",
    "collect_garbage",
    "commit_snapshot",
    "delete_old_snapshots",
    "delete_sequence",
    "delete_snapshot",
    "differences",
    "first_journal_step",
    "glance_at_snapshot",
    "hold_lease",
    "is_pausing",
    "is_sequence_name",
    "list_sequences",
    "list_snapshots",
    "newest_whole_snapshot",
    "read_arrays",
    "set_aside_newer",
    "settings_diff",
    "shown_url",
    "size_bytes",
    "verify_snapshot",
    "walk",
    "write_arrays",
    "write_shard",
    "write_tokens",
]
