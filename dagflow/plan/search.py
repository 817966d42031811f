"""Where to cut a model that is trained, for the workers that are there. Pure.

One more worker never makes a plan worse: the workers with the most memory are taken, as many as make a
step shortest, and the rest are spares. Each worker's own memory bounds what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.plan.partition import Partition, fitting, num_parts
from dagflow.plan.training_memory import TrainingMemory


def cut_and_place(
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
