"""Losses in the forms in which they are written: modules, dictionaries, tuples, weights, sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .case import EITHER, RIGHT
from .idioms import WIDTH, whole

CLASSES = 4


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(torch.tanh(self.layer(x)))


def _classes(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(0, CLASSES, (rows,))


def _named(rows: int) -> dict[str, torch.Tensor]:
    x, labels = _classes(rows)
    return {"x": x, "labels": labels}


def _loss(name: str, make: Any, expected: str = RIGHT) -> None:
    body = type(name, (_Classifier,), {"__module__": __name__})
    globals()[name] = body  # deepcopy and pickle look a class up by its name
    whole(expected=expected, batch=_classes, loss=make)(body)


def _weighted() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.5]), label_smoothing=0.1)


class _LearntTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prior", torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits + self.prior.log(), target)


def _focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    each = functional.cross_entropy(logits, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def _as_dict(logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = functional.cross_entropy(logits, target)
    return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}


def _as_tuple(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.cross_entropy(logits, target), logits


def _contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    scores = functional.normalize(output) @ functional.normalize(output.flip(1)).t()
    return functional.cross_entropy(scores / 0.1, torch.arange(output.shape[0]))


def _triplets(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    distance = torch.cdist(output, output)
    same = target[:, None] == target[None]
    positive = distance.masked_fill(~same, -1e9).amax(1)
    negative = distance.masked_fill(same, 1e9).amin(1)
    return functional.relu(positive - negative + 1).mean()


def _redundancy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    a = (output - output.mean(0)) / (output.std(0) + 1e-5)
    correlation = a.t() @ a.flip(1) / output.shape[0]
    return (correlation - torch.eye(CLASSES)).square().sum()


def _masked_mean(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    each = functional.cross_entropy(logits, target, reduction="none")
    kept = (target != 0).float()
    return (each * kept).sum() / kept.sum().clamp(min=1)


for _name, _make in (
    ("CrossEntropyModule", nn.CrossEntropyLoss),
    ("CrossEntropyModuleWithWeights", _weighted),
    ("CrossEntropySummed", lambda: nn.CrossEntropyLoss(reduction="sum")),
    ("CrossEntropyIgnoringAClass", lambda: nn.CrossEntropyLoss(ignore_index=0)),
    ("LossModuleWithABuffer", _LearntTemperature),
    ("FocalLoss", lambda: _focal),
    ("ContrastiveLoss", lambda: _contrastive),
    ("TripletsInTheBatch", lambda: _triplets),
    ("RedundancyOfFeatures", lambda: _redundancy),
    ("MeanOfMaskedLosses", lambda: _masked_mean),
):
    _loss(_name, _make)
for _name, _make in (("LossAsADict", lambda: _as_dict), ("LossAsATuple", lambda: _as_tuple)):
    _loss(_name, _make, EITHER)


@whole(batch=_named)
class ModelReturnsADict(_Classifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@whole(batch=_named)
class ModelReturnsATuple(_Classifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return functional.cross_entropy(logits, labels), logits


@whole(batch=_named)
class ModelReturnsAnObject(_Classifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = super().forward(x)
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


@whole(batch=_named)
class LossOfShapeOne(_Classifier):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(super().forward(x), labels)


@whole(
    expected=EITHER,
    batch=lambda rows: (torch.randn(rows, 12, WIDTH), torch.randint(1, CLASSES, (rows, 4))),
)
class Ctc(_Classifier):
    """Its loss is in the model, and reads lengths as tensors."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = super().forward(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.shape[0],), 12), torch.full((x.shape[0],), 4)
        return functional.ctc_loss(scores, labels, *lengths)


@whole(batch=lambda rows: (torch.randn(rows, 12, WIDTH), torch.randint(0, CLASSES, (rows, 4))))
class CtcOfSelectedTargets(_Classifier):
    """As in transformers: labels are checked, and those that aren't padding selected."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.max() >= CLASSES:
            raise ValueError("no such class")
        scores = super().forward(x).log_softmax(-1).transpose(0, 1)
        mask = labels > 0
        lengths = torch.full((x.shape[0],), 12)
        selected = labels.masked_select(mask)
        return functional.ctc_loss(scores, selected, lengths, mask.sum(-1), reduction="sum")


def _two_targets(rows: int) -> dict[str, torch.Tensor]:
    return {**_named(rows), "regression": torch.randn(rows)}


@whole(batch=_two_targets)
class TwoHeadsAndLosses(_Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.regressor = nn.Linear(WIDTH, 1)
        self.uncertainty = nn.Parameter(torch.zeros(2))

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, regression: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.tanh(self.layer(x))
        first = functional.cross_entropy(self.head(hidden), labels)
        second = functional.smooth_l1_loss(self.regressor(hidden)[:, 0], regression)
        weights = torch.exp(-self.uncertainty)
        return weights[0] * first + weights[1] * second + self.uncertainty.sum()


class _WithParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - self.centres[target]).square().mean()


_loss("LossModuleWithParameters", _WithParameters, EITHER)
