"""Losses of every form: functions, modules with tensors of their own, in dictionaries and tuples."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.capture import capture

FEATURES, CLASSES = torch.randn(3, 4), torch.randint(0, 4, (3,))
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Weighted(nn.Module):
    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=trainable)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output * self.scale + self.offset, target)

    def negative(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -self(output, target)


@pytest.mark.parametrize(
    ("loss", "num_constants"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHT), 1),
        (Weighted(trainable=False), 2),
        (Weighted(trainable=False).negative, 2),
        (partial(functional.cross_entropy, weight=WEIGHT, label_smoothing=0.1), 1),
        (lambda output, target: functional.cross_entropy(output, target, WEIGHT), 1),
        (lambda output, target: {"loss": functional.cross_entropy(output, target)}, 0),
        (lambda output, target: (functional.cross_entropy(output, target), output), 0),
    ],
)
def test_a_loss_is_any_callable_and_its_tensors_are_constants(
    loss: Any, num_constants: int
) -> None:
    dag = capture(nn.Linear(4, 4), (FEATURES, CLASSES), loss=loss)
    assert [parameter.name for parameter in dag.parameters] == ["weight", "bias"]
    assert dag.buffers == ()
    assert len(dag.constants) == num_constants


CENTRES = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (Weighted(trainable=True), "parameter 'scale' of Weighted"),
        (Weighted(trainable=True).negative, "parameter 'scale' of Weighted"),
        (lambda output, target: (output * CENTRES).mean(), r"tensor of shape \[4\]"),
    ],
)
def test_a_loss_with_parameters_to_train_is_refused_by_name(loss: Any, name: str) -> None:
    with pytest.raises(CaptureFailed, match=f"{name}.*submodule of the model"):
        capture(nn.Linear(4, 4), (FEATURES, CLASSES), loss=loss)


def test_a_method_of_the_model_is_a_loss_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(output * self.gain, target)

    model = Model()
    dag = capture(model, (FEATURES, CLASSES), loss=model.loss)
    assert {p.name: len(p.uses) for p in dag.parameters} == {
        "gain": 1,
        "layer.weight": 1,
        "layer.bias": 1,
    }


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.layer(x)
        return self.wrap(functional.cross_entropy(logits, labels), logits)


BATCH = {"x": FEATURES, "labels": CLASSES}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss, logits: loss,
        lambda loss, logits: {"loss": loss, "logits": logits},
        lambda loss, logits: (loss, logits),
    ],
)
def test_a_models_own_loss_is_found_in_mappings_and_tuples(wrap: Any) -> None:
    dag = capture(Returns(wrap), BATCH)
    assert [n.op for n in dag.nodes if n.name == dag.loss] == ["aten.cross_entropy_loss.default"]


def test_a_tuple_that_begins_with_something_else_has_no_loss() -> None:
    with pytest.raises(BatchInvalid, match="a tuple without a loss"):
        capture(Returns(lambda loss, logits: (logits, loss)), BATCH)


def test_columns_that_forward_does_not_take_are_dropped_with_one_warning() -> None:
    batch = {**BATCH, "idx": torch.arange(3), "text": ["a", "b", "c"]}
    with pytest.warns(UserWarning, match="columns 'idx', 'text' are dropped") as caught:
        dag = capture(Returns(lambda loss, logits: loss), batch)
    assert len(caught) == 1
    assert dag.dropped_columns == ("idx", "text")
    assert [spec.name for spec in dag.inputs] == ["in.x", "in.labels"]
    assert dag.batch_constants == {}


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda x: {"loss_box": x, "loss_cls": x}, r"output\['loss_box'\] \+ output\['loss_cls'\]"),
        (
            lambda x: {"total_loss": x, "a": x},
            r"keys are 'total_loss', 'a'.*output\['total_loss'\]",
        ),
        (lambda x: (x[None], x), r"items are a tensor of 1 dim.*, a scalar tensor.*output\[1\]"),
    ],
)
def test_a_loss_under_another_name_is_found_and_how_to_pass_it_said(output: Any, text: str) -> None:
    class Model(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return output(super().forward(input).mean())

    with pytest.raises(BatchInvalid, match=text):
        capture(Model(4, 4), FEATURES)
