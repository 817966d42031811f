"""Idioms that leave something behind in Python: counters, logs, tables, hooks, closures."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import random
from typing import Any

import torch
from torch import nn

from .case import REFUSED
from .idioms import WIDTH, idiom

SEEN: dict[str, Any] = {}


class Kept(nn.Module):
    """A layer, and things that code keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.calls, self.total, self.average = 0, 0.0, None
        self.log: dict[str, list[Any]] = collections.defaultdict(list)
        self.steps = [itertools.count()]


@idiom()
class CountsAndPrintsNowAndThen(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls % 1000 == 0:
            print(f"step {self.calls}")
        return self.layer(h)


@idiom()
class LogsByName(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        found = self.layer(h)
        self.log["norm"].append(found.detach().norm())
        self.log["mean"].append(found.mean().item())
        self.total += found.detach().mean()
        return found


@idiom()
class KeepsAMovingAverageForLogging(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        found = self.layer(h)
        now = found.detach().abs().mean()
        self.average = now if self.average is None else 0.9 * self.average + 0.1 * now
        return found


@idiom(expected=REFUSED)
class ScalesByAMovingAverage(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        now = h.detach().abs().mean()
        self.average = now if self.average is None else 0.9 * self.average + 0.1 * now
        return self.layer(h) / self.average


@idiom(expected=REFUSED)
class ChangesAfterTheHundredthCall(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(h) if self.calls < 100 else h


@idiom(expected=REFUSED)
class TakesTheNextOfAnIteratorInAList(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h) if next(self.steps[0]) < 100 else h


@idiom()
class LambdaOverTheModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.through = lambda h: self.layer(h)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.through(h)


@idiom()
class HookUsesAnotherLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer.register_forward_hook(lambda module, given, found: self.other(found))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


@idiom()
class HookRecordsGlobally(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.register_forward_hook(functools.partial(recorded, "layer"))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


def recorded(name: str, module: nn.Module, given: Any, found: torch.Tensor) -> None:
    SEEN[name] = found.detach()


class Interfering:
    """A hook that lets the first hundred calls pass."""

    def __init__(self) -> None:
        self.calls = 0

    def hook(self, module: nn.Module, given: Any, found: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return found if self.calls < 100 else 2 * found


@idiom(expected=REFUSED)
class HookInterferesLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.register_forward_hook(Interfering().hook)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


@idiom()
class CachedProperties(nn.Module):
    @functools.cached_property
    def scale(self) -> float:
        return 1 / math.sqrt(WIDTH)

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return torch.arange(WIDTH).float().cos()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.table * self.scale


@idiom(expected=REFUSED)
class FirstCallIsAnotherOne(Kept):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if not self.calls:
            self.calls = 1
            return h
        return self.layer(h)


@idiom(expected=REFUSED)
def python_random_lies_between(h: torch.Tensor) -> torch.Tensor:
    return h * 2 if 0.49 < random.random() < 0.5 else h


@idiom()
class AutocastForAnotherDevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", enabled=False):
            return self.layer(h).float()
