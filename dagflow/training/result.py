"""What a run leaves in its caller's hands; the rest is in the store."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dagflow.check.micro_batch import CheckReport
from dagflow.plan.plan import Plan
from dagflow.training.initial_weights import read_state_dict
from dagflow_storage import Store


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns; the rest is in the store.

    Attributes
    ----------
    losses : list of float
        One a step, from the run's first.
    step : int
        Steps done.
    plan : Plan
        The latest one.
    store : str
        URL of the run's directory.
    check : CheckReport
        What the check before the first step has found, and how long it took.
    """

    losses: list[float]
    step: int
    plan: Plan
    store: str = field(repr=False)  # the next one shows it, without what nobody should see
    _store: Store
    alias_names: dict[str, str]
    _names: tuple[str, ...]
    check: CheckReport = field(default_factory=CheckReport)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Read the trained weights and buffers from the store, on the CPU.

        ``model.load_state_dict(result.state_dict())`` works on the model that was given.
        """
        found = read_state_dict(self._store, self.step, self.alias_names)
        # Without the buffers that the model keeps out of its own state_dict.
        return {name: found[name] for name in self._names if name in found}
