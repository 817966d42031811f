"""The plan: which stages there are, who runs them, and how many micro-batches are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dagflow.graph.show import amount
from dagflow.plan.memory import StageNeeds, bytes_by_worker
from dagflow.plan.partition import Partition
from dagflow.plan.schedule import Pipeline, halved_stages, in_flight_limits, useful_slack


@dataclass(frozen=True)
class Plan:
    """A partition, placed.

    Attributes
    ----------
    partition : Partition
    placement : tuple of int
        Index of each stage's worker.
    workers : tuple of str
        Names of the workers, for people.
    limits : tuple of int
        Micro-batches in flight by stage.
    num_microbatches : int
    halved : tuple of bool
        Whether backwards come in two halves, by stage.
    """

    partition: Partition
    placement: tuple[int, ...]
    workers: tuple[str, ...]
    limits: tuple[int, ...]
    num_microbatches: int
    halved: tuple[bool, ...]

    @classmethod
    def placed(
        cls,
        partition: Partition,
        placement: Sequence[int],
        workers: Sequence[str],
        num_microbatches: int,
        *,
        slack: int | None = None,
        memory_bytes: Sequence[int] | None = None,
    ) -> Plan:
        """Decide on what is left when stages have their workers.

        Parameters
        ----------
        slack : int, optional
            Micro-batches in flight beyond 1F1B's; `useful_slack` by default, or as many of it as
            the memory allows.
        memory_bytes : sequence of int, optional
            Of each worker.
        """
        if slack is None:
            slack = useful_slack(placement, num_microbatches, _costs(partition))
            while slack and not _fits(partition, placement, slack, memory_bytes):
                slack -= 1
        limits = in_flight_limits(len(partition), slack)
        halved = tuple(
            is_halved and program.multiplies_weights
            for program, is_halved in zip(partition.programs, halved_stages(placement), strict=True)
        )
        return cls(partition, tuple(placement), tuple(workers), limits, num_microbatches, halved)

    @classmethod
    def in_turn(
        cls,
        partition: Partition,
        workers: Sequence[str],
        num_microbatches: int,
        slack: int | None = None,
    ) -> Plan:
        """Deal the stages out to the workers one after the other, whatever their memory."""
        placement = [stage % len(workers) for stage in range(len(partition))]
        return cls.placed(partition, placement, workers, num_microbatches, slack=slack)

    @property
    def num_stages(self) -> int:
        return len(self.partition)

    @property
    def needs(self) -> list[StageNeeds]:
        """What each stage takes of its worker's memory, with the micro-batches that are in flight."""
        return _needs(self.partition, self.limits)

    @property
    def pipeline(self) -> Pipeline:
        """What the 1F1B timetable follows from, with the stages' estimated costs."""
        costs = tuple(_costs(self.partition))
        return Pipeline(self.placement, self.num_microbatches, self.limits, self.halved, costs)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_stages": self.num_stages,
            "cuts": list(self.partition.cuts),
            "placement": list(self.placement),
            "workers": list(self.workers),
            "limits": list(self.limits),
            "num_microbatches": self.num_microbatches,
            "halved": list(self.halved),
            "estimates": [asdict(estimate) for estimate in self.partition.estimates],
        }

    def __str__(self) -> str:
        lines = str(self.partition).splitlines()
        lines[0] += "  worker"
        for stage in range(self.num_stages):
            lines[stage + 1] += f"  {self.workers[self.placement[stage]]}"
        total = sum(e.needs.weight_bytes for e in self.partition.estimates)
        lines.append(f"{self.num_stages} stages, {amount(total, 'B')} of weights")
        return "\n".join(lines)


def _costs(partition: Partition) -> list[tuple[float, float]]:
    """Return each stage's forward and backward in units of a mean forward."""
    seconds = [estimate.seconds for estimate in partition.estimates]
    mean = sum(seconds) / len(seconds) or 1.0
    return [(max(s / mean, 1e-3), max(2 * s / mean, 1e-3)) for s in seconds]


def _fits(
    partition: Partition,
    placement: Sequence[int],
    slack: int,
    memory_bytes: Sequence[int] | None,
) -> bool:
    if memory_bytes is None:
        return True
    needs = _needs(partition, in_flight_limits(len(partition), slack))
    return all(
        total <= memory_bytes[worker] for worker, total in bytes_by_worker(needs, placement).items()
    )


def _needs(partition: Partition, limits: Sequence[int]) -> list[StageNeeds]:
    return [
        replace(estimate.needs, in_flight=limit)
        for estimate, limit in zip(partition.estimates, limits, strict=True)
    ]
