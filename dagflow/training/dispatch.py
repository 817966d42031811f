"""Hands tasks to dask, each to its stage's owner, and waits for what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import dask
from distributed import Client, Future, KilledWorker

from dagflow.errors import GarbageReceived, SchedulerLost, TransientError
from dagflow.swarm.dask_internals import cause_of
from dagflow.swarm.membership import Membership, ResultGone
from dagflow.swarm.watch import kind_of
from dagflow.training import recovery_protocol as recovery
from dagflow.training.dask_tasks import Key, Places, Priorities, attempt_of
from dagflow.training.step_graph import StepGraph

# What dask says of every future of a client whose scheduler is gone.
CONNECTION_LOST = "scheduler-connection-lost"


class Disturbed(Exception):
    """Something was lost that the steps in flight need; they can be taken up again.

    Attributes
    ----------
    event : Event or None
        What has happened, if `dagflow.training.recovery` hasn't been told of it.
    """

    def __init__(self, text: str, event: recovery.Event | None = None) -> None:
        super().__init__(text)
        self.event = event


class Dispatch:
    """The tasks of one attempt at a run.

    Parameters
    ----------
    owners
        The workers by stage; changed in place when stages change hands.
    look_around
        Called while something is waited for; what it raises ends the wait.
    """

    def __init__(
        self,
        client: Client,
        graph: StepGraph,
        priorities: Priorities,
        owners: list[str],
        membership: Membership,
        look_around: Callable[[], None],
    ) -> None:
        self.client = client
        self.graph = graph
        self._priorities = priorities
        self._owners = owners
        self._membership = membership
        self._look_around = look_around
        self._assignments = {graph.prefix: 0}

    def assign(self, owners: Sequence[str], number: int, prefix: str) -> None:
        """Give the stages other owners, and all tasks from now on other keys.

        dask remembers the keys of tasks that were lost.
        """
        self._owners[:] = owners
        self.graph = self.graph.again(prefix)
        self._assignments[prefix] = number

    def submit(
        self,
        dsk: Mapping[Key, Any],
        keys: Sequence[Key] | None = None,
        addresses: Sequence[str] | None = None,
    ) -> dict[Key, Future]:
        """Hand tasks to dask, and return the futures of some, or of all, by key.

        Parameters
        ----------
        addresses
            The workers by stage, if they aren't the owners.
        """
        wanted = list(dsk if keys is None else keys)
        if not wanted:
            return {}
        places = Places(self._owners if addresses is None else addresses)
        with dask.annotate(workers=places, priority=self._priorities):
            futures: list[Future] = self.client.get(dsk, wanted, sync=False)
        return dict(zip(wanted, futures, strict=True))

    def result(self, future: Future) -> Any:
        """Wait for a result.

        Raises
        ------
        Disturbed
            If something was lost on the way, or a task has failed; its cause is what was raised.
        """
        try:
            return self._membership.result_of(future, self._look_around)
        except (Disturbed, SchedulerLost):
            raise
        except ResultGone as error:
            raise _lost(str(error)) from error
        except (CancelledError, KilledWorker, OSError) as error:
            if CONNECTION_LOST not in str(error):
                self._look_around()  # an owner that is gone explains it
            raise _lost(f"{type(error).__name__}: {error}") from error
        except GarbageReceived as error:
            self._look_around()
            assignment, _ = self._cause(future)
            event = recovery.GarbageReceived(error.stage, str(error), error.has_nan, assignment)
            raise Disturbed(str(error), event) from error
        except TransientError as error:
            self._look_around()
            raise _lost(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            self._look_around()
            raise Disturbed(str(error), self._failure(error, future)) from error

    def check_scheduler(self, why: str, cause: BaseException | None) -> None:
        """Refuse to ask a scheduler that isn't there, or is another than the one we knew.

        Raises
        ------
        SchedulerLost
        """
        if self.client.status != "running" or CONNECTION_LOST in why:
            address = self.client.scheduler.address
            raise SchedulerLost(f"The scheduler at {address} went away.") from cause

    def _failure(self, error: Exception, future: Future) -> recovery.WorkFailed:
        assignment, cause = self._cause(future)
        why = f"{type(error).__name__}: {error}"
        if cause is None:
            return recovery.WorkFailed((), 0, None, why, assignment)
        kind, stage = kind_of(cause)
        task = (kind, *map(str, cause[1:]))
        where = self._membership.where_failed(cause)
        return recovery.WorkFailed(task, stage, where, why, assignment)

    def _cause(self, future: Future) -> tuple[int | None, Key | None]:
        """Return the task that failed first, and under which assignment it was handed out."""
        cause: Key | None = cause_of(self.client, future.key)
        return (None if cause is None else self._assignments.get(attempt_of(cause))), cause


def release(futures: Iterable[Future]) -> None:
    """Let dask forget tasks that nobody wants any more."""
    for future in futures:
        future.release()


def _lost(why: str) -> Disturbed:
    return Disturbed(why, recovery.ResultLost(why))
