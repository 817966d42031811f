"""Which workers take part, and which stages each of them gets. Pure.

One more worker never makes a plan worse: the workers with the most memory are taken, as many as make a
step shortest, and the rest are spares. Each worker's own memory bounds what it gets.

While a run is on, its stages are placed again one by one (`place_again`), moved (`spare_for`) and kept
at hand (`choose_spares`). Workers are told apart by their addresses there, and memory is in bytes; a
worker of whom nothing is known has enough.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.show import amount
from dagflow.plan.partition import Partition, fitting, num_parts
from dagflow.plan.training_memory import TrainingMemory

# Spares may fill this share of their memory with weights; of this much if they don't say.
_SPARE_SHARE, _ROOM_BYTES = 0.5, 8 << 30


class NoRoom(Exception):
    """No worker that is there has the memory for a stage that has lost its own."""


def place(
    analysis: DagAnalysis,
    memory_bytes: Sequence[int],
    training: TrainingMemory,
    *,
    num_stages: int | None = None,
    cuts: Sequence[int] | None = None,
) -> tuple[Partition, tuple[int, ...]]:
    """Cut a DAG for some workers, and return the stages and the index of each one's worker.

    Parameters
    ----------
    memory_bytes
        Of each worker.
    num_stages
        As many stages as this, dealt to as many workers as they fit on; by default one for each
        worker that makes a step shorter.
    cuts
        The cuts, if they are given.

    Raises
    ------
    PlanInvalid
        If the DAG has fewer parts than stages are wanted.
    StageTooLarge
        If nobody, or not all together, have the memory; with the numbers.
    """
    if cuts is not None:
        num_stages = len(cuts) + 1
    if num_stages is not None and num_stages < 1:
        raise PlanInvalid(f"num_stages must be at least 1; found {num_stages}.")
    most = min(len(memory_bytes), num_parts(analysis) if num_stages is None else num_stages)
    total = sum(analysis.node_seconds)
    found: tuple[Partition, tuple[int, ...]] | None = None
    refusal = StageTooLarge("There are no workers.")
    shortest = float("inf")
    for num_workers in range(most, 0, -1):
        stages = num_stages or num_workers
        if total * (1 + (training.num_microbatches - 1) / num_workers) >= shortest:
            break  # even if the stages were all alike
        placement = _dealt(stages, memory_bytes, num_workers)
        try:
            cut = fitting(analysis, placement, memory_bytes, training, cuts)
        except StageTooLarge as error:
            refusal = error if num_workers == most else refusal
            continue
        if num_stages is not None:
            return cut, placement
        seconds = step_seconds(cut, placement, training.num_microbatches)
        if seconds < shortest:
            shortest, found = seconds, (cut, placement)
    if found is None:
        raise refusal
    return found


def step_seconds(cut: Partition, placement: Sequence[int], num_microbatches: int) -> float:
    """Return how long a step takes about: the busiest worker's work, and filling the pipeline.

    Nominal, as the stages' costs are.
    """
    work: dict[int, float] = {}
    for worker, estimate in zip(placement, cut.estimates, strict=True):
        work[worker] = work.get(worker, 0.0) + estimate.seconds
    slowest = max(estimate.seconds for estimate in cut.estimates)
    return max(work.values()) * num_microbatches + (len(work) - 1) * slowest


def _dealt(num_stages: int, memory_bytes: Sequence[int], num_workers: int) -> tuple[int, ...]:
    """Deal stages out to the workers with the most memory, one after the other.

    The first stage goes to the largest: it has the most micro-batches in flight. With more stages
    than workers every worker has stages from all over the model, so that the pipeline fills sooner
    (interleaved 1F1B, arXiv 2104.04473, section 2.2).
    """
    largest = sorted(range(len(memory_bytes)), key=lambda worker: -memory_bytes[worker])
    return tuple(largest[stage % num_workers] for stage in range(num_stages))


def place_again(
    addresses: Sequence[str],
    lost: Iterable[int],
    usable: Sequence[str],
    warm: Mapping[int, str],
    stage_bytes: Sequence[int] = (),
    memory: Mapping[str, int | None] | None = None,
) -> list[str]:
    """Return the stages' workers after some stages have lost theirs.

    A stage goes to a spare, one that has its weights at hand if there is one, or to the worker with
    the fewest stages; of these, to one that has the memory. Those with weights at hand somewhere
    choose first. Stages whose workers are well stay where they are.

    Parameters
    ----------
    addresses
        The worker of each stage so far.
    lost
        Stages to be placed.
    usable
        Workers that may get a stage; at least one.
    warm
        By stage a worker that keeps its weights at hand.
    stage_bytes
        Of each stage; nothing if it isn't known.
    memory
        Of each worker.

    Raises
    ------
    NoRoom
        If nobody has the memory for one of them.

    >>> place_again(["a", "b", "c"], [1], ["a", "c", "d", "e"], {1: "e"})
    ['a', 'e', 'c']
    >>> place_again(["a", "b", "c"], [1, 2], ["a"], {})
    ['a', 'a', 'a']
    >>> place_again(["a", "b"], [1], ["a", "small", "c"], {}, [8, 8], {"a": 9, "small": 4, "c": 9})
    ['a', 'c']
    """
    found = list(addresses)
    waiting = sorted(lost, key=lambda stage: (stage not in warm, stage))
    taken = dict(enumerate(stage_bytes))
    kept = {stage: a for stage, a in enumerate(addresses) if a in usable and stage not in waiting}
    load = dict.fromkeys(usable, 0)
    free = {address: _room(address, memory or {}) for address in usable}
    for stage, address in kept.items():
        load[address] += 1
        free[address] -= taken.get(stage, 0)
    for stage in waiting:
        fitting = [address for address in usable if free[address] >= taken.get(stage, 0)]
        if not fitting:
            raise NoRoom(
                f"Stage {stage} needs about {amount(taken[stage], 'B')}, and the most that a worker "
                f"has left is {amount(max(0, *free.values()), 'B')}"
            )
        least = min(load[address] for address in fitting)
        first = [address for address in fitting if load[address] == least]
        chosen = warm[stage] if warm.get(stage) in first else first[0]
        load[chosen] += 1
        free[chosen] -= taken.get(stage, 0)
        found[stage] = chosen
    return found


def spare_for(
    stage: int,
    usable: Sequence[str],
    addresses: Sequence[str],
    stage_bytes: Sequence[int],
    memory: Mapping[str, int | None],
    warm: Collection[str] = (),
) -> str | None:
    """Return a worker without a stage to which one may move, or None; one that is warm if possible.

    >>> spare_for(1, ["a", "c", "d"], ["a", "b"], [8, 8], {"d": 9}, {"d"})
    'd'
    >>> spare_for(1, ["a", "c"], ["a", "b"], [8, 8], {"c": 4}) is None
    True
    """
    fitting = [
        address
        for address in usable
        if address not in addresses and _room(address, memory) >= stage_bytes[stage]
    ]
    return next((address for address in fitting if address in warm), next(iter(fitting), None))


def choose_spares(
    order: Iterable[int],
    spares: Mapping[str, int | None],
    stage_bytes: Sequence[int],
    kept: Mapping[int, str],
) -> dict[int, str]:
    """Return which spare keeps which stage's weights at hand, each stage by one.

    Parameters
    ----------
    order
        Stages, those most at risk first.
    spares
        Their memory.
    kept
        By stage who keeps it so far, and goes on if there is room.

    >>> choose_spares([1, 0], {"c": 20, "d": 40}, [8, 12], {0: "c"})
    {1: 'd', 0: 'c'}
    >>> choose_spares([1, 0], {"c": 20}, [8, 12], {})
    {0: 'c'}
    """
    free = {
        a: _SPARE_SHARE * (_ROOM_BYTES if memory is None else memory)
        for a, memory in spares.items()
    }
    found: dict[int, str] = {}
    for stage in order:
        fitting = [a for a in free if free[a] >= stage_bytes[stage]]
        if fitting:
            roomiest = max(fitting, key=lambda a: free[a])
            found[stage] = kept[stage] if kept.get(stage) in fitting else roomiest
            free[found[stage]] -= stage_bytes[stage]
    return found


def _room(address: str, memory: Mapping[str, int | None]) -> float:
    known = memory.get(address)
    return math.inf if known is None else known
