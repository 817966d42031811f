"""The plan: which stages there are, who runs them, and how many micro-batches are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dagflow.graph.show import amount
from dagflow.plan.partition import Partition
from dagflow.plan.schedule import (
    Schedule,
    halved_stages,
    in_flight_limits,
    one_forward_one_backward,
    useful_slack,
)


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
    def in_turn(
        cls,
        partition: Partition,
        workers: Sequence[str],
        num_microbatches: int,
        slack: int | None = None,
        memory_limit_bytes: int | None = None,
    ) -> Plan:
        """Deal the stages out to the workers one after the other.

        Parameters
        ----------
        slack : int, optional
            Micro-batches in flight beyond 1F1B's; `useful_slack` by default, or as many of it as
            the memory limit allows.
        memory_limit_bytes : int, optional
            Of every stage.
        """
        placement = place_in_turn(len(partition), len(workers))
        if slack is None:
            slack = useful_slack(placement, num_microbatches, _costs(partition))
            while slack and not _fits(partition, slack, memory_limit_bytes):
                slack -= 1
        limits = in_flight_limits(len(partition), slack)
        halved = tuple(
            is_halved and program.multiplies_weights
            for program, is_halved in zip(partition.programs, halved_stages(placement), strict=True)
        )
        return cls(partition, placement, tuple(workers), limits, num_microbatches, halved)

    @property
    def num_stages(self) -> int:
        return len(self.partition)

    def schedule(self) -> Schedule:
        """Return the 1F1B timetable, with the stages' estimated costs."""
        return one_forward_one_backward(
            self.placement,
            self.num_microbatches,
            self.limits,
            self.halved,
            _costs(self.partition),
        )

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
        total = sum(e.parameter_bytes for e in self.partition.estimates)
        lines.append(f"{self.num_stages} stages, {amount(total, 'B')} of weights")
        return "\n".join(lines)


def _costs(partition: Partition) -> list[tuple[float, float]]:
    """Return each stage's forward and backward in units of a mean forward."""
    seconds = [estimate.seconds for estimate in partition.estimates]
    mean = sum(seconds) / len(seconds) or 1.0
    return [(max(s / mean, 1e-3), max(2 * s / mean, 1e-3)) for s in seconds]


def _fits(partition: Partition, slack: int, memory_limit_bytes: int | None) -> bool:
    return memory_limit_bytes is None or all(
        estimate.memory_bytes + slack * estimate.activation_bytes <= memory_limit_bytes
        for estimate in partition.estimates
    )


def place_in_turn(num_stages: int, num_workers: int) -> tuple[int, ...]:
    """Deal stages out to workers one after the other.

    With more stages than workers every worker has stages from all over the model, so that the
    pipeline fills sooner (interleaved 1F1B, arXiv 2104.04473, section 2.2).
    """
    return tuple(stage % num_workers for stage in range(num_stages))
