"""Settings of a run: the mathematics, which the store remembers, and the rest, which may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dagflow.errors import SettingsInvalid
from dagflow.swarm.clusters import ClusterSettings
from dagflow_storage import Retention
from dagflow_tasks.train.optimizer import Optimizer, Schedule

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """Settings that few runs need; none of them changes what a run computes.

    Attributes
    ----------
    cluster : ClusterSettings
        Workers of the embedded cluster, and how long to wait for others.
    split_points : sequence of str, optional
        Module paths to cut at, instead of balancing `num_stages`.
    memory_limit_bytes : int, optional
        Memory that the stages of a worker may take; each worker's own by default.
    granularity : {"stage", "operator"}
        "operator" runs every operator as a dask task of its own: slow, and the reference that
        stages are checked against.
    dynamic : mapping, optional
        Dimensions that vary by tensor name, see `dagflow.capture`.
    batch_size : int, optional
        Rows a batch, for Hugging Face datasets, which yield rows.
    lookahead_steps : int
        Steps handed to the scheduler before the oldest is done.
    in_flight_slack : int, optional
        Micro-batches in flight beyond 1F1B's, against slow messages; costs their activations. By
        default as many as keep workers busy that have several stages.
    retention : Retention
        Which snapshots are kept.
    origin : mapping, optional
        The command that started the run, for `dagflow resume`; the store remembers it.
    check : bool
        Compare the captured graph with the model itself, and the first batch's loss with that of its
        micro-batches, before anything runs. Takes less than two steps.
    force : bool
        Resume though settings differ from the store's that change the mathematics, or batches from
        those that the run was trained on.
    """

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    split_points: Sequence[str] | None = None
    memory_limit_bytes: int | None = None
    granularity: Literal["stage", "operator"] = "stage"
    dynamic: Mapping[str, Sequence[int]] | None = None
    batch_size: int | None = None
    lookahead_steps: int = 2
    in_flight_slack: int | None = None
    retention: Retention = field(default_factory=Retention)
    origin: Mapping[str, Any] | None = None
    check: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        at_least = {"lookahead_steps": 1, "in_flight_slack": 0}
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise SettingsInvalid(
                    f"Config({name}=...) must be at least {minimum}; found {value}."
                )
        if self.granularity not in ("stage", "operator"):
            raise SettingsInvalid(
                f"Config(granularity=...) is 'stage' or 'operator'; found {self.granularity!r}."
            )


@dataclass(frozen=True)
class Mathematics:
    """The settings that decide what a run computes. A store keeps them; a resumed run must agree."""

    optimizer: Optimizer
    schedule: Schedule
    clip_grad_norm: float | None
    num_microbatches: int
    precision: str
    seed: int

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SettingsInvalid(
                f"precision is one of {', '.join(PRECISIONS)}; found {self.precision!r}."
            )
        if self.num_microbatches < 1:
            raise SettingsInvalid(
                f"num_microbatches must be at least 1; found {self.num_microbatches}."
            )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise SettingsInvalid(f"clip_grad_norm must be positive; found {self.clip_grad_norm}.")

    def to_json(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.to_json(),
            "schedule": {
                "kind": self.schedule.kind,
                "warmup_steps": self.schedule.warmup_steps,
                "total_steps": self.schedule.total_steps
                if self.schedule.kind != "constant"
                else None,
                "final_factor": self.schedule.final_factor,
            },
            "clip_grad_norm": self.clip_grad_norm,
            "num_microbatches": self.num_microbatches,
            "precision": self.precision,
            "seed": self.seed,
        }
