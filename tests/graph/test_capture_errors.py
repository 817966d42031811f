"""What can't be captured is answered with place, operator and advice; the model stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from inline import assert_same_bits
from torch import nn
from torch.nn.functional import mse_loss
from zoo import build, captured

from dagflow.check.micro_batch import check_capture
from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.capture import capture

Body = Callable[[torch.Tensor], torch.Tensor]

LIBRARY = torch.library.Library("dagflow_tests", "DEF")
LIBRARY.define("twice(Tensor x) -> Tensor")
LIBRARY.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
LIBRARY.impl("twice", torch.empty_like, "Meta")


class Inner(nn.Module):
    """A linear layer, running statistics, and whatever the test wants to see fail."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = body

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.body(self.norm(self.linear(features)))


class Outer(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Inner(body)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            features = block(features)
        return features.sum()


def branches(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x
    return -x


def loops(x: torch.Tensor) -> torch.Tensor:
    for _ in range(int(x.abs().sum())):
        x = x + 1
    return x


def selects(x: torch.Tensor) -> torch.Tensor:
    return x[torch.nonzero(x[:, 0] > 0)[:, 0]]


def masks(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


def computes_with_an_item(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def calls_an_unknown_operator(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.dagflow_tests.twice(x)


def leaves_torch(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy())


class Casting(nn.Module):
    """As routers of experts do it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 4), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer = self.layer.to(self.dtype)
        return self.layer.float()(x)


def fits_badly(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(5, 5)


def looks_up_by_length(x: torch.Tensor) -> torch.Tensor:
    return x * {3: 1.0}.get(x.shape[0], 2.0)


def counts_with_numpy(x: torch.Tensor) -> torch.Tensor:
    return x * torch.from_numpy(np.arange(x.shape[0]))[:, None]


FAILURES = [
    (looks_up_by_length, "__get__", "an open size is no key"),
    (counts_with_numpy, "sym_float", "torch.arange for numpy.arange"),
    (branches, "__bool__", "torch.where or a mask"),
    (loops, "__int__", "outside of forward"),
    (selects, "aten.nonzero.default", "masks instead of selecting by value"),
    (masks, "aten.index.Tensor", "masks instead of selecting by value"),
    (computes_with_an_item, "aten.mul.Tensor", "tensors instead of .item()"),
    (calls_an_unknown_operator, "dagflow_tests.twice.default", "write it with public functions"),
    (leaves_torch, "numpy", "torch.export.export"),
    (fits_badly, "matmul", "torch.export.export"),
]


@pytest.mark.parametrize(("body", "operator", "advice"), FAILURES)
def test_a_failure_names_module_line_operator_and_what_to_do(
    body: Body, operator: str, advice: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureFailed) as caught:
        capture(Outer(body), torch.randn(3, 4))
    message = str(caught.value)
    assert "Module: 'blocks.1'." in message
    assert f"Source: {__file__}:" in message
    assert f"Operator: {operator}." in message
    assert advice in message.partition("What to do: ")[2]
    assert capfd.readouterr() == ("", "")  # torch.export would print the whole graph


def test_a_module_is_cast_in_forward_to_what_it_is_already() -> None:
    capture(Outer(Casting(torch.float32)), torch.randn(3, 4))


def test_a_failure_in_the_loss_says_that_it_is_outside_the_model() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output * float(target.sum())

    with pytest.raises(CaptureFailed, match='Module: "none, outside the model\'s forward"'):
        capture(Outer(torch.relu), (torch.randn(3, 4), torch.randn(3)), loss=loss)


def test_missing_labels_are_said_to_be_missing() -> None:
    with pytest.raises(BatchInvalid, match=r"tuple without a loss.*labels missing.*loss=function"):
        capture(nn.LSTM(4, 4), {"input": torch.randn(3, 5, 4)})
    with pytest.raises(BatchInvalid, match=r"Labels are missing.*'labels'"):
        capture(nn.Linear(4, 4), torch.randn(3, 4), loss=mse_loss)
    with pytest.raises(BatchInvalid, match=r"only \['input'\]"):
        capture(nn.Linear(4, 4), {"input": torch.randn(3, 4)}, loss=mse_loss)


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape() -> None:
    with pytest.raises(BatchInvalid, match=r"scalar.*the model returned shape \[.*, 4\]"):
        capture(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(BatchInvalid, match=r"loss\(output, target\) returned a float.*\.mean\(\)"):
        capture(nn.Linear(4, 4), (torch.randn(3, 4),) * 2, loss=lambda output, target: 1.0)


def test_a_batch_of_something_else_is_refused() -> None:
    with pytest.raises(BatchInvalid, match=r"a set at 'input\.1'"):
        capture(nn.Linear(4, 4), {"input": [torch.ones(2), {1}]})
    with pytest.raises(BatchInvalid, match="holds no tensor"):
        capture(nn.Linear(4, 4), {"input": None})


def test_parameters_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(CaptureFailed, match=r"several devices \(cpu, meta\)"):
        capture(model, torch.randn(3, 4))


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (name, dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training, sorted(vars(m)))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("body", [torch.relu, branches, selects, calls_an_unknown_operator])
def test_capturing_leaves_the_model_as_it_was_whether_it_succeeds_or_not(body: Body) -> None:
    model = Outer(body)
    model.blocks[1].register_forward_hook(lambda module, args, output: None)
    tensors = {name: (id(t), t.detach().clone()) for name, t in model.state_dict().items()}
    objects = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    hooks = hooks_of(model)
    failed = False
    try:
        capture(model, torch.randn(3, 4))
    except CaptureFailed:
        failed = True
    assert failed is (body is not torch.relu)
    assert hooks_of(model) == hooks
    assert {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())} == objects
    assert_same_bits(model.state_dict(), {name: t for name, (_, t) in tensors.items()})


def test_a_meta_model_with_real_buffers_is_captured_and_keeps_them() -> None:
    with torch.device("meta"):
        model = Outer(torch.relu)
    norm = model.blocks[1].norm
    norm.running_mean, norm.running_var = torch.ones(4), torch.full((4,), 2.0)
    norm.num_batches_tracked = torch.tensor(7)
    buffers = dict(model.named_buffers())
    dag = capture(model, torch.randn(3, 4))
    assert dag.nodes == capture(Outer(torch.relu), torch.randn(3, 4)).nodes
    assert {n: id(b) for n, b in model.named_buffers()} == {n: id(b) for n, b in buffers.items()}
    with pytest.raises(CaptureFailed, match="after"):
        capture_meta_then_fail(model)
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())


def capture_meta_then_fail(model: Outer) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("after the buffers were swapped")

    model.blocks[1].body = fail
    capture(model, torch.randn(3, 4))


def test_tensors_that_are_one_object_in_the_example_stay_two_inputs() -> None:
    batch = build("gpt2").batch(3)
    assert batch["labels"] is batch["input_ids"]
    dag = captured("gpt2")
    read = {name for node in dag.nodes for name in node.references()}
    assert [spec.name for spec in dag.inputs] == ["in.input_ids", "in.labels"]
    assert {"in.input_ids", "in.labels"} <= read


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-1, 1)


class MaskedSoftmax(torch.autograd.Function):
    """As DeBERTa's: what it has computed it writes into."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        found = torch.softmax(x.masked_fill(x > 1, -1e9), -1)
        found.masked_fill_(x > 1, 0.0)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (found,) = ctx.saved_tensors
        return found * (gradient - (gradient * found).sum(-1, keepdim=True))


def test_a_function_may_write_into_what_its_derivative_needs() -> None:
    model, batch = Outer(MaskedSoftmax.apply), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="MaskedSoftmax"):
        dag = capture(model, batch)
    _, report = check_capture(dag, model, batch)
    assert report.num_gradients
    assert not report.skipped


# Models keep `apply` under another name as often as they call it on the class.
KEPT_APPLY = Clipped.apply


@pytest.mark.parametrize("body", [lambda x: Clipped.apply(x), lambda x: KEPT_APPLY(x)])
def test_a_backward_of_the_models_own_is_warned_of(body: Body) -> None:
    with pytest.warns(UserWarning, match=r"'blocks.1' calls Clipped.*derivative of its forward"):
        dag = capture(Outer(body), torch.randn(3, 4))
    assert "aten.tanh.default" in {node.op for node in dag.nodes}


def test_one_function_is_warned_of_once_however_often_it_is_called() -> None:
    with pytest.warns(UserWarning, match="Clipped") as caught:
        capture(Outer(lambda x: Clipped.apply(Clipped.apply(x))), torch.randn(3, 4))
    assert len(caught) == 1


def test_torchs_own_autograd_functions_are_no_reason_to_warn(
    recwarn: pytest.WarningsRecorder,
) -> None:
    from torch.utils.checkpoint import checkpoint

    dag = capture(Outer(lambda x: checkpoint(torch.tanh, x, use_reentrant=True)), torch.ones(3, 4))
    assert [str(w.message) for w in recwarn if "autograd.Function" in str(w.message)] == []
    assert "aten.tanh.default" in {node.op for node in dag.nodes}


REFUSALS = [
    (lambda x: x * math.log2(x.shape[0]), rf"math.log2 of an open size \({__file__}:.*log2\(\)"),
    (Casting(torch.float64), r"'blocks.1.body'.*What to do: cast and move modules before training"),
    (nn.BatchNorm1d(4, momentum=None), r"'blocks.1.body' \(BatchNorm1d\).*give it a momentum"),
    (torch.jit.trace(nn.Tanh(), torch.ones(2)), r"'blocks.1.body' is a \w+.*the plain torch"),
]


@pytest.mark.parametrize(("body", "text"), REFUSALS)
def test_what_torch_has_no_words_for_is_refused_by_name_with_what_to_do(
    body: Body, text: str
) -> None:
    with pytest.raises(CaptureFailed, match=text) as caught:
        capture(Outer(body), torch.randn(3, 4))
    assert " at 0x" not in str(caught.value)


def test_a_mapped_tensor_beside_the_others_and_an_average_in_eval_are_captured() -> None:
    mapped = torch.vmap(lambda w, x: x @ w, in_dims=(0, None))
    capture(Outer(lambda x: mapped(torch.ones(2, 4, 4), x)), torch.randn(3, 4))
    capture(Outer(nn.BatchNorm1d(4, momentum=None)).eval(), torch.randn(3, 4))


def test_an_open_tensor_that_a_mapped_function_closes_over_is_refused_with_the_remedy() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda weight: x @ weight)(self.weights).mean()

    with pytest.raises(
        CaptureFailed, match=r"itself' maps a function with vmap.*in_dims=\(0, None\)"
    ):
        capture(Ensemble(), torch.randn(3, 4))


def test_columns_that_forward_needs_and_the_batch_lacks_are_named() -> None:
    with pytest.raises(BatchInvalid, match=r"needs 'features', .*columns 'inputs'\. .*: batch\}"):
        capture(Outer(torch.relu), {"inputs": torch.randn(3, 4)})
    with pytest.raises(BatchInvalid, match=r"needs 'input', .*columns 'x'"):
        capture(nn.Linear(4, 4), {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}, loss=mse_loss)
