"""Sizes of the batch: what programs compute with them, and which batches the graph is right for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dagflow.errors import BatchInvalid
from dagflow.graph.batch import flatten_batch
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.plan.partition import partition
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.train.exchange import tensors_of


class Calls(nn.Module):
    """A linear layer and a function of its output and the batch."""

    def __init__(self, body: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.body(self.layer(x), *more).square().mean()


def sequences(length: int, *more: int) -> Any:
    torch.manual_seed(length)
    tensors = tuple(torch.randn(3, size, 4) for size in (length, *more))
    return tensors if more else tensors[0]


def losses(model: nn.Module, dag: OperatorDag, batch: Any) -> tuple[float, float]:
    """The captured loss and the eager one, for a batch that must pass the check."""
    program = partition(OperatorDag.from_json(dag.to_json()), num_stages=1)[0]
    tensors, constants = flatten_batch(batch)
    sizes = dict(match_batch(dag, tensors, constants, "the test"))
    values = {use.value: model.get_parameter(use.parameter) for use in program.parameters}
    executable = Executable(program, torch.device("cpu"))
    values |= {name: t for name, t in tensors_of(tensors).items() if name in program.batch_inputs}
    found = executable.run(values, sizes, RandomAddress(0, 0, 0))[str(program.loss)]
    eager = model(*batch) if isinstance(batch, tuple) else model(batch)
    return found.item(), eager.item()


def returns_a_size(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        length = min(h.shape[1], 8)
        mask = torch.arange(length).float()
    return h[:, :length] * mask[:, None]


OPEN = [
    lambda h: h * h.shape[1] ** -0.5,
    lambda h: h / math.sqrt(h.shape[1]),
    lambda h: h[:, : math.ceil(h.shape[1] / 2)],
    lambda h: h[:, : round(h.shape[1] * 0.3)],
    lambda h: h.sum() / (h.shape[0] * h.shape[1] * 0.7),
    lambda h: h[:, : min(h.shape[1], 8)],
    returns_a_size,
    lambda h: h[:, : torch.div(h.shape[1], 2, rounding_mode="floor") + 1],
    lambda h: h.view(h.shape[0], torch.div(h.shape[1] * 4, 2, rounding_mode="trunc"), 2),
    lambda h: h.new_ones(1 + 2 * torch.tensor(h.shape[1])).sum() * h,
    lambda h: h[:, : (torch.tensor(h.shape[1]) // 2 + 1).item()],
]


@pytest.mark.parametrize("body", OPEN)
def test_sizes_with_floats_are_computed_for_every_batch_as_python_does(
    body: Callable[..., torch.Tensor],
) -> None:
    model = Calls(body)
    dag = capture(model, sequences(10))
    for length in (10, 17, 3):
        found, wanted = losses(model, dag, sequences(length))
        assert found == wanted


def attends(h: torch.Tensor) -> torch.Tensor:
    """Leave it to the length whether attention is causal, as transformers' Moonshine does."""
    is_causal = h.dim() == 3 and h.shape[1] > 7
    return functional.scaled_dot_product_attention(h, h, h, is_causal=is_causal)


DECIDED = [
    (attends, 8, 7, r" > 7|7 < "),
    (lambda h: h[:, : int(h.shape[1] * 0.8)], 11, 12, r"trunc\(0.8\*float\("),
    (lambda h: h if h.shape[1] % 2 == 0 else h * 2, 12, 11, r"%2\) == 0"),
    (lambda h: h if h.shape[1] > 7 else h * 2, 8, 7, r" > 7|7 < "),
]


@pytest.mark.parametrize(("body", "alike", "otherwise", "text"), DECIDED)
def test_a_batch_for_which_the_code_decides_otherwise_is_refused_with_the_line(
    body: Callable[..., torch.Tensor], alike: int, otherwise: int, text: str
) -> None:
    model = Calls(body)
    dag = OperatorDag.from_json(capture(model, sequences(10)).to_json())
    found, wanted = losses(model, dag, sequences(alike))
    assert found == wanted
    with pytest.raises(BatchInvalid, match=text) as caught:
        match_batch(dag, {"input": sequences(otherwise)}, {}, "step 3")
    assert f"{__file__}:" in str(caught.value)
    assert "step 3" in str(caught.value)


def test_sizes_that_follow_from_others_are_expressions_of_them() -> None:
    model = Calls(lambda h, other: h + other.repeat(1, 2, 1))
    dag = capture(model, sequences(10, 5))
    found, wanted = losses(model, dag, sequences(14, 7))
    assert found == wanted
    with pytest.raises(BatchInvalid, match=r"'0' of step 1 has size 13 in dimension 1.*= 14"):
        match_batch(dag, flatten_batch(sequences(13, 7))[0], {}, "step 1")


def test_what_an_operator_assumed_of_its_shape_is_worked_out_anew() -> None:
    model = Calls(lambda h, other: h[:, : other.shape[1]].sum(1) * other.shape[1])
    dag = capture(model, sequences(10, 5))
    for shape in ((10, 9), (4, 3)):
        found, wanted = losses(model, dag, sequences(*shape))
        assert found == wanted
    with pytest.raises(BatchInvalid, match=r"aten.slice.Tensor .*was taken to have.*Pad or drop"):
        match_batch(dag, flatten_batch(sequences(4, 9))[0], {}, "step 1")


def test_a_dag_from_before_conditions_is_read() -> None:
    dag = capture(Calls(torch.relu), sequences(10))
    body = json.loads(dag.to_json())
    del body["conditions"], body["dropped_columns"]
    assert OperatorDag.from_json(json.dumps(body)) == dag


FIXED = [
    (lambda h: h.sum() / len(h), 0, "makes a plain number"),
    (lambda h: h if len(h) > 1 else h * 2, 0, "makes a plain number"),
    (lambda h: h * float(h.shape[1]) ** -0.5, 1, "makes a plain number"),
    (lambda h: h * h.new_tensor(range(h.shape[1]))[:, None], 1, "makes a plain number"),
    (lambda h: h.view(3, -1), 0, "takes this size only"),
]


@pytest.mark.parametrize(("body", "dim", "reason"), FIXED)
def test_a_size_that_the_code_fixes_is_told_at_once_and_with_the_batch_that_doesnt_fit(
    body: Callable[..., torch.Tensor], dim: int, reason: str
) -> None:
    with pytest.warns(UserWarning, match=rf"'input' in dimension {dim} is fixed.*{reason}") as told:
        dag = OperatorDag.from_json(capture(Calls(body), sequences(10)).to_json())
    assert f"{__file__}:" in str(told[0].message)
    shape = [3, 10, 4]
    shape[dim] += 1
    with pytest.raises(BatchInvalid, match=f"in dimension {dim}.*{__file__}:.*{reason}"):
        match_batch(dag, {"input": torch.randn(shape)}, {}, "step 1")


def test_a_size_that_the_caller_fixes_or_a_table_of_positions_is_no_reason_to_warn() -> None:
    capture(Calls(lambda h: h.sum() / len(h)), sequences(10), dynamic={"input": [1]})
    dag = capture(Calls(lambda h: h + torch.ones(10, 4)), sequences(10))
    with pytest.raises(BatchInvalid, match=f"an operator at {__file__}:"):
        match_batch(dag, {"input": sequences(11)}, {}, "step 1")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(4, 5, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0].square().mean()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True, "num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 2}),
        (nn.GRU, {"batch_first": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.LSTM, {"bias": False}),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {"bias": False, "batch_first": True}),
    ],
)
def test_recurrent_layers_take_sequences_of_any_length(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    model = Recurrent(kind, **options)
    dag = capture(model, sequences(10))
    assert len([node for node in dag.nodes if node.op.endswith(".input")]) == 1
    for length in (10, 4):
        found, wanted = losses(model, dag, sequences(length))
        assert found == wanted
