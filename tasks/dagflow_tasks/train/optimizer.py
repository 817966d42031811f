"""Optimizers and schedules as data: names and options that travel in settings, no code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch

from dagflow_tasks.errors import OptimizerInvalid
from dagflow_tasks.layout import with_strides

# They need a closure that runs the whole model again, or gradients that a stage can't give.
_UNSUPPORTED = frozenset({"LBFGS", "SparseAdam"})


@dataclass(frozen=True, init=False)
class Optimizer:
    """An optimizer of `torch.optim` by name, with its options.

    >>> Optimizer("AdamW", lr=3e-4, weight_decay=0.1).options["lr"]
    0.0003

    Raises
    ------
    OptimizerInvalid
        If torch has no such optimizer, or the optimizer no such option; lists what there is.
    """

    name: str
    options: Mapping[str, Any]
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=())

    def __init__(
        self,
        name: str,
        overrides: Iterable[tuple[str, Mapping[str, Any]]] = (),
        **options: Any,
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "overrides", tuple((p, dict(o)) for p, o in overrides))
        self._class()
        self.build({"probe": torch.nn.Parameter(torch.zeros(1, 1))})

    def override(self, pattern: str, **options: Any) -> Optimizer:
        """Return this optimizer with other options for parameters whose name the pattern finds.

        >>> Optimizer("AdamW", lr=0.1).override(r"bias$", weight_decay=0.0).overrides
        (('bias$', {'weight_decay': 0.0}),)
        """
        return Optimizer(self.name, (*self.overrides, (pattern, options)), **self.options)

    def _class(self) -> type[torch.optim.Optimizer]:
        found = getattr(torch.optim, self.name, None)
        if self.name in _UNSUPPORTED or not (
            isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
        ):
            names = [
                name
                for name, value in vars(torch.optim).items()
                if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
            ]
            usable = sorted(set(names) - _UNSUPPORTED - {"Optimizer"})
            raise OptimizerInvalid(
                f"torch.optim has no optimizer {self.name!r} that dagflow can run; choose one of "
                f"{', '.join(usable)}."
            )
        return found

    def build(self, parameters: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        """Return the torch optimizer over named parameters, one group for each set of options."""
        groups: dict[int, dict[str, Any]] = {}
        for name, parameter in parameters.items():
            index = self._group(name)
            extra = self.overrides[index][1] if index >= 0 else {}
            groups.setdefault(index, {"params": [], **extra})["params"].append(parameter)
        try:
            optimizer = self._class()(list(groups.values()), **self.options)
            probe = torch.nn.Parameter(torch.zeros(1, 1))
            for _, extra in self.overrides:
                self._class()([probe], **{**self.options, **extra})
        except (TypeError, ValueError) as error:
            known = [*signature(self._class()).parameters][1:]  # without params
            raise OptimizerInvalid(
                f"torch.optim.{self.name} doesn't take these options: {dict(self.options)!r}"
                f"{f' with {list(self.overrides)!r}' if self.overrides else ''}: {error}. Its "
                f"options are {', '.join(known)}."
            ) from error
        for group in optimizer.param_groups:
            group["base_lr"] = float(group["lr"])
        return optimizer

    def moments(self) -> float:
        """Return how many bytes it keeps for each byte of a weight: 0 of SGD, 2 of AdamW.

        Of a large matrix; with overrides, of those weights for which it keeps most.
        """
        kept = []
        for extra in ({}, *(options for _, options in self.overrides)):
            weight = torch.nn.Parameter(torch.zeros(32, 32))
            optimizer = Optimizer(self.name, **{**self.options, **extra}).build({"": weight})
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            found = slots(optimizer, {id(weight): ""}).values()
            kept.append(sum(slot.nbytes for slot in found if slot.dim()) / weight.nbytes)
        return max(kept)

    def _group(self, name: str) -> int:
        for index, (pattern, _) in enumerate(self.overrides):
            if re.search(pattern, name):
                return index
        return -1

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "options": dict(self.options),
            "overrides": [[pattern, dict(options)] for pattern, options in self.overrides],
        }


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a factor of the optimizer's, by step.

    Attributes
    ----------
    kind : {"constant", "cosine", "linear"}
        After the warm-up the factor stays at 1, or falls to `final_factor` at `total_steps`.
    warmup_steps : int
        Steps over which the factor rises linearly from 1/warmup_steps to 1.
    total_steps : int | None
        Needed by cosine and linear; `dagflow.train` fills in its number of steps.
    """

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "linear"):
            raise OptimizerInvalid(
                f"No schedule {self.kind!r}; choose 'constant', 'cosine' or 'linear' (each with "
                "warmup_steps=)."
            )
        if self.warmup_steps < 0:
            raise OptimizerInvalid(f"warmup_steps must be at least 0; found {self.warmup_steps}.")

    def factor(self, step: int) -> float:
        """Return the factor for a step, counted from 0.

        >>> [Schedule("linear", warmup_steps=2, total_steps=6).factor(k) for k in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.total_steps is None:
            raise OptimizerInvalid(
                f"The schedule {self.kind!r} needs total_steps=, or train(steps=)."
            )
        length = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / length)
        falling = (
            0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        )
        return self.final_factor + (1 - self.final_factor) * falling


def slots(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Return the optimizer's state by ``PARAMETER:SLOT``; numbers become 0-d tensors.

    Parameters
    ----------
    optimizer
    names
        Parameter name by ``id`` of its tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for slot, value in state.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                value = torch.tensor(
                    value, dtype=torch.float64 if isinstance(value, float) else torch.int64
                )
            if isinstance(value, torch.Tensor):
                found[f"{names[id(parameter)]}:{slot}"] = value
    return found


def restore_slots(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> None:
    """Put back what `slots` returned; a slot's device and strides follow its parameter."""
    for key, value in stored.items():
        name, _, slot = key.rpartition(":")
        parameter = parameters[name]
        # 0-d slots (Adam's step) stay on the CPU, as torch keeps them.
        value = value.to(parameter.device) if value.dim() else value
        if value.shape == parameter.shape:  # Adafactor's aren't
            value = with_strides(value, parameter.stride())
        optimizer.state[parameter][slot] = value
