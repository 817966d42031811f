"""Idioms that keep something from one step to the next, or write into what they are given."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .case import EITHER, REFUSED
from .idioms import TOKENS, WIDTH, idiom, weighted_square, whole


@idiom()
class BufferWrittenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h - self.mean


@idiom()
class BufferAssigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


@idiom()
class BufferAssignedAfterItIsRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = h + self.last
        self.last = h.detach().amax(0)
        return out


@idiom()
class BufferAssignedThroughSetattr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        setattr(self, "scale", self.scale * 0.5 + h.detach().abs().mean())  # noqa: B010
        return h / self.scale


@idiom()
class BufferOfASubmoduleAssignedByItsParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("count", torch.zeros(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.inner.count = self.inner.count + 1
        return h * (1 + 0.1 * self.inner.count)


@idiom()
class BufferNotPersistent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(WIDTH).float().cos(), persistent=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.table


@idiom(expected=EITHER)
class BufferReplacedByAnotherShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.table.shape[1] != h.shape[1]:
            self.table = torch.arange(h.shape[1], dtype=h.dtype)[None].sin()
        return h * self.table


@idiom()
class BufferOfIntegersCounts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return h * (1.0 / self.step)


@idiom()
class BufferIndexPut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(6, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = h @ self.queue.clone().t()
        with torch.no_grad():
            self.queue[:2] = h[:2].detach()
        return out


@idiom(expected=REFUSED)
class AttributeCountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h * (1.0 / self.calls)


@idiom(expected=REFUSED)
class AttributeOfADictChanges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"temperature": 1.0}

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.state["temperature"] *= 0.5
        return h * self.state["temperature"]


@idiom(expected=REFUSED)
class AttributeHoldsTheLastTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.previous: torch.Tensor | None = None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = h if self.previous is None else h + self.previous
        self.previous = h.detach().mean(0)
        return out


@idiom(expected=EITHER)
class AttributeForLogging(nn.Module):
    """What is kept is read by nobody in the model; capture must leave it readable."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.last = h.mean().item()
        return h


@idiom(expected=EITHER)
class AttributeForLoggingMadeInForward(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.last = h.mean().item()
        return h.square()


@idiom(expected=EITHER)
class AttributeHoldsActivationsForLogging(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.activations = h.detach()
        return h.square()


@idiom()
class ListCollectsLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary: list[torch.Tensor] = []

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.auxiliary.clear()
        self.auxiliary.append(h.square().mean())
        return h + self.auxiliary[-1]


@idiom()
class CacheMadeOnFirstCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.arange(WIDTH).float().cos()
        return h * self.mask


@idiom(expected=REFUSED)
def python_random_scales(h: torch.Tensor) -> torch.Tensor:
    return h * (1 + random.random())


@idiom(expected=REFUSED)
def python_random_decides(h: torch.Tensor) -> torch.Tensor:
    return h.square() if random.random() < 0.5 else h


@idiom(expected=REFUSED)
def numpy_random_scales(h: torch.Tensor) -> torch.Tensor:
    return h * float(1 + np.random.rand())


@idiom(expected=REFUSED)
def python_random_permutes(h: torch.Tensor) -> torch.Tensor:
    order = list(range(WIDTH))
    random.shuffle(order)
    return h[:, order]


@whole(loss=lambda: weighted_square)
class InputWrittenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return self.layer(x) * x


@whole(loss=lambda: weighted_square)
class InputsViewWrittenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, :2] = 0.0
        return self.layer(x) * x


@whole(loss=lambda: weighted_square)
class InputsViewMaskedInPlaceAfterUse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x.clone())
        x.view(-1, 2, WIDTH // 2)[:, 0].mul_(0.5)
        return self.second(hidden * x)


@idiom()
def view_of_hidden_written_in_place(h: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[:, ::2].mul_(2.0)
    return h


@idiom()
def zeros_filled_by_slices(h: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(h.shape[0], 2 * WIDTH)
    out[:, :WIDTH] = h
    out[:, WIDTH:] = h.square()
    return out


@idiom()
def empty_like_filled(h: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(h)
    out.copy_(h)
    out[:, 0].zero_()
    return out


@idiom(expected=EITHER)
class ParameterClampedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((WIDTH,), 0.4))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0.3, 0.35)
        return h / self.temperature


@idiom(expected=EITHER)
class ParameterDataClamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((WIDTH,), 0.4))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.temperature.data.clamp_(0.3, 0.35)
        return h / self.temperature


@idiom(expected=EITHER)
class ParameterNormalisedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(WIDTH, 4, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = self.prototypes.weight
            weight.copy_(functional.normalize(weight, dim=1))
        return self.prototypes(functional.normalize(h, dim=1))


@idiom(expected=EITHER)
class ParametersRowZeroedThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight[0].zero_()
        return h @ self.weight


@whole("tokens", EITHER, loss=lambda: weighted_square)
class EmbeddingWithMaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, max_norm=1.0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


@whole("tokens", EITHER, loss=lambda: weighted_square)
class EmbeddingBagWithMaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(TOKENS, WIDTH, max_norm=1.0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


@whole("tokens", loss=lambda: weighted_square)
class EmbeddingWithPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids % 4))


@whole("tokens", EITHER, loss=lambda: weighted_square)
class EmbeddingScaledByFrequency(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, scale_grad_by_freq=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids % 4))


@idiom()
class ExponentialMovingAverageOfAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slow", torch.zeros(WIDTH, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.slow.lerp_(self.layer.weight, 0.1)
        return self.layer(h) - h @ self.slow.clone().t()
