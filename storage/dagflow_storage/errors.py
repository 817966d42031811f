"""The root of dagflow's error tree: its first branch is the question a scheduler asks.

::

    DagflowError
    ├── TransientError          another worker, or later, may succeed: retried
    │   ├── StoreUnreachable    the store did not answer, or not as it should
    │   │   └── OutOfDescriptors  this process may open no more files; soon given up
    │   └── LeaseUnconfirmed    for too long nobody could see whether the lease is still ours
    └── PermanentError          the same inputs fail again: stop
        ├── StoreNotWritable    permission, read-only, no such bucket, disk full
        ├── StoreNotReadable    permission, wrong credentials
        ├── CredentialsExpired  renew them
        ├── NotFound            nothing is stored under that name
        ├── DamagedData         what is stored is not what was written
        ├── FormatTooNew        written by a newer dagflow
        ├── StoreHoldsAnotherRun
        ├── StoreInUse          another driver writes to this store
        └── LeaseLost           another driver has taken this store over

The floors above add their own branches. Errors cross processes, so every class takes one
positional message with a default, and a test pickles them all.
"""


class DagflowError(Exception):
    """Anything that dagflow itself raises."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class TransientError(DagflowError):
    """Another worker, or later, may succeed."""


class PermanentError(DagflowError):
    """The same inputs fail again."""


class StoreUnreachable(TransientError):
    """The store did not answer, or its answer was lost or garbled on the way."""


class OutOfDescriptors(StoreUnreachable):
    """This process may open no more files or sockets, so it can't use a store that is well.

    Tried again for some seconds only: another process can, and the work goes there.
    """


class LeaseUnconfirmed(TransientError):
    """The store has been away for so long that another driver may have taken over.

    Nothing may be written until it answers and shows that nobody has: `Lease.check` then passes
    again, or raises `LeaseLost`.
    """


class StoreNotWritable(PermanentError):
    """The store refuses writes: permission, read-only, no such bucket, disk full."""


class StoreNotReadable(PermanentError):
    """The store refuses reads: permission, wrong credentials, a request it can't understand."""


class CredentialsExpired(PermanentError):
    """The store knew the credentials once, and doesn't accept them any more.

    Permanent: credentials that a library can renew, it has renewed before this is raised. The
    others a person must bring; then the run resumes.
    """


class NotFound(PermanentError):
    """Nothing is stored under that name."""


class DamagedData(PermanentError):
    """What is stored is not what was written.

    Permanent, because it is raised only after a second read found the same damage: the bytes
    at rest are wrong, and every worker would read the same. The way out is an older snapshot,
    not a retry. Damage that a second read doesn't find is `StoreUnreachable`.
    """


class FormatTooNew(PermanentError):
    """The data was written by a newer dagflow than this one."""


class StoreHoldsAnotherRun(PermanentError):
    """A run was to be created where one exists already."""


class StoreInUse(PermanentError):
    """Another driver holds the lease of this store, and lives."""


class LeaseLost(PermanentError):
    """Another driver has taken over this store; this one must not write to it any more."""
