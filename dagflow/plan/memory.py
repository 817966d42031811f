"""What a worker needs for a set of stages, in training and in serving. Pure.

Whatever decides where a stage goes asks here: cutting, placing, moving, keeping at hand, placing again
after a loss. `training_memory` and `serving_memory` derive a stage's needs from its program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS
from dagflow_tasks.train.worker_journal import most_waiting_bytes

# Caches of sessions may take this part of what weights leave of a worker's memory. The rest is for what
# a pass computes, and for the process.
CACHE_SHARE = 0.5

WorkerT = TypeVar("WorkerT")


@dataclass(frozen=True)
class StageNeeds:
    """Bytes that a stage takes of its worker's memory, by what they are for.

    Stages of one worker share no tensor: each has its own copy of a weight that both use. Of a frozen
    weight there is that one copy, without gradients, optimizer state or a copy for snapshots.

    Attributes
    ----------
    weight_bytes : int
        Parameters, buffers and constants, each once, with those that other stages own.
    token_bytes : int
        For each token of each session: a key and a value a layer, and the rows that are sent on.
    windows : tuple of (int, int)
        Layers with a window or chunks: how many tokens of a session each keeps at most, and its part
        of `token_bytes`.
    session_bytes : int
        For each session, however long: what its recurrent layers remember at most.
    pass_bytes : int
        For each token of one session: what a pass takes to look back at it, in one layer at a time.
    gradient_bytes : int
        A sum for each use of a trained weight.
    optimizer_bytes : int
        The optimizer's moments.
    copy_bytes : int
        The copy of weights and moments from which a snapshot is written.
    activation_bytes : int
        Left behind by one micro-batch's forward for its backward.
    in_flight : int
        Micro-batches that are between forward and backward at once.
    update_bytes : int
        Taken by an update, when no micro-batch is in flight.
    spool_bytes : int
        Sent, and not yet written to the journal.
    """

    weight_bytes: int
    token_bytes: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    session_bytes: int = 0
    pass_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    copy_bytes: int = 0
    activation_bytes: int = 0
    in_flight: int = 1
    update_bytes: int = 0
    spool_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        """What is there for as long as the stage is."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.copy_bytes

    @property
    def step_bytes(self) -> int:
        """What a training step takes besides: activations, or the update when these are gone."""
        return max(self.activation_bytes * self.in_flight, self.update_bytes)

    @property
    def restored_bytes(self) -> int:
        """What a worker holds that keeps the stage at hand without computing it."""
        return self.weight_bytes + self.optimizer_bytes

    @property
    def least_cache_bytes(self) -> int:
        """What a session of one block of tokens takes."""
        return BLOCK_TOKENS * self.token_bytes + self.session_bytes

    @property
    def cache_share(self) -> float:
        """The part that caches may have where the pass that looks back at them needs room as well."""
        if not self.pass_bytes:
            return 1.0
        return self.token_bytes / (self.token_bytes + self.pass_bytes)

    def spared(self, num_tokens: int) -> int:
        """Return how many tokens fewer a session of so many takes, because layers have windows."""
        spared_bytes = sum(size * max(0, num_tokens - kept) for kept, size in self.windows)
        return spared_bytes // max(1, self.token_bytes)


@dataclass(frozen=True)
class WorkerMemory:
    """A worker's memory.

    Attributes
    ----------
    limit_bytes : int
        dask's limit for the worker, or its GPU's memory.
    taken_bytes : int
        What others have of it: the weights and caches of other deployments.
    """

    limit_bytes: int
    taken_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - self.taken_bytes


# Of a worker that doesn't say how much memory it has: enough for any stage.
UNKNOWN_MEMORY = WorkerMemory(1 << 62)


def together(stages: Iterable[StageNeeds]) -> StageNeeds:
    """Return what stages take on one worker, as if they were one stage.

    A worker computes one stage at a time, so looking back takes memory in one of them only.
    """
    needs = list(stages)
    return StageNeeds(
        weight_bytes=sum(n.weight_bytes for n in needs),
        token_bytes=sum(n.token_bytes for n in needs),
        windows=tuple(window for n in needs for window in n.windows),
        session_bytes=sum(n.session_bytes for n in needs),
        pass_bytes=max((n.pass_bytes for n in needs), default=0),
        gradient_bytes=sum(n.gradient_bytes for n in needs),
        optimizer_bytes=sum(n.optimizer_bytes for n in needs),
        copy_bytes=sum(n.copy_bytes for n in needs),
        activation_bytes=sum(n.step_bytes for n in needs),
        spool_bytes=min(
            most_waiting_bytes(), sum(n.spool_bytes for n in needs)
        ),  # a process has one
    )


def cache_part(needs: StageNeeds, cache_bytes: int | None) -> float:
    """Return which part of what weights leave caches may take; see `worker_bytes`."""
    return min(needs.cache_share, CACHE_SHARE if cache_bytes is None else 1.0)


def worker_bytes(stages: Iterable[StageNeeds], cache_bytes: int | None = None) -> int:
    """Return what a worker needs at least for all of its stages.

    Parameters
    ----------
    stages
        What each of them needs.
    cache_bytes
        What sessions' caches may take on a worker in serving, if the user has said so; None for
        `CACHE_SHARE` of what weights leave.
    """
    needs = together(stages)
    caches = math.ceil(needs.least_cache_bytes / (cache_part(needs, cache_bytes) or 1.0))
    return needs.state_bytes + needs.step_bytes + needs.spool_bytes + caches


def needs_by_worker(
    stages: Sequence[StageNeeds], workers: Sequence[WorkerT]
) -> dict[WorkerT, StageNeeds]:
    """Return what each worker's stages take together; `workers` has the worker of each stage."""
    return {
        worker: together(n for n, w in zip(stages, workers, strict=True) if w == worker)
        for worker in dict.fromkeys(workers)
    }


def bytes_by_worker(stages: Sequence[StageNeeds], workers: Sequence[WorkerT]) -> dict[WorkerT, int]:
    """Return what each worker needs for its stages; `workers` has the worker of each stage."""
    own = needs_by_worker(stages, workers)
    return {worker: worker_bytes([needs]) for worker, needs in own.items()}


def fits(
    stages: Sequence[StageNeeds],
    memory: WorkerMemory,
    cache_bytes: int | None = None,
    at_hand: Iterable[StageNeeds] = (),
) -> bool:
    """Tell whether a worker has the memory for stages.

    Parameters
    ----------
    stages
        That it computes.
    cache_bytes
        As for `worker_bytes`.
    at_hand
        Stages that it holds besides without computing them.
    """
    least = sum(needs.least_cache_bytes for needs in stages)
    if cache_bytes is not None and cache_bytes < least:
        return False
    held = sum(needs.restored_bytes for needs in at_hand)
    return worker_bytes(stages, cache_bytes) + held <= memory.free_bytes


def fits_at_hand(
    stages: Sequence[StageNeeds], memory: WorkerMemory, cache_bytes: int | None = None
) -> bool:
    """Tell whether a worker can hold stages without computing them, and then compute any one of them."""
    return all(
        fits([own], memory, cache_bytes, [*stages[:stage], *stages[stage + 1 :]])
        for stage, own in enumerate(stages)
    )
