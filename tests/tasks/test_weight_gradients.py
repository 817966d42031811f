"""Gradients of weights: in one backward or two halves, the same bits; added as they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from dagflow_tasks.kernels import onednn
from dagflow_tasks.program import weight_gradients
from dagflow_tasks.program.operators import LINEAR, resolve
from dagflow_tasks.program.weight_gradients import WeightGradients


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


PRODUCTS: list[tuple[str, Callable[..., torch.Tensor], tuple[int, ...], list[tuple[int, ...]]]] = [
    ("linear", functional.linear, (3, 5, 8), [(16, 8), (16,)]),
    ("linear without bias", functional.linear, (5, 8), [(16, 8)]),
    ("matmul", torch.matmul, (3, 5, 8), [(8, 16)]),
    ("conv2d", functional.conv2d, (2, 3, 9, 9), [(4, 3, 3, 3), (4,)]),
]


@pytest.mark.parametrize(
    ("function", "shape", "weights"),
    [row[1:] for row in PRODUCTS],
    ids=[row[0] for row in PRODUCTS],
)
def test_both_halves_make_the_gradients_of_one_backward(
    function: Any, shape: tuple[int, ...], weights: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    features, leaves = leaf(*shape), [leaf(*size) for size in weights]
    output = torch.tanh(function(torch.tanh(features), *leaves))
    seed = torch.randn_like(output)
    wanted = torch.autograd.grad(output, [features, *leaves], seed)

    deferred = WeightGradients(later=True)
    arguments = [torch.tanh(features), *leaves]
    product = deferred.run(function, arguments, {}, frozenset(range(1, len(arguments))))
    halved = torch.tanh(product)
    assert torch.equal(halved, output)
    halved.backward(seed)
    assert features.grad is not None
    assert torch.equal(features.grad, wanted[0])
    assert [weight.grad for weight in leaves] == [None] * len(leaves)
    deferred.finish()
    for weight, gradient in zip(leaves, wanted[1:], strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient)


def test_a_product_whose_input_needs_no_gradient_is_not_deferred() -> None:
    weight = leaf(4, 8)
    deferred = WeightGradients(later=True)
    output = deferred.run(functional.linear, [torch.randn(2, 8), weight], {}, frozenset({1}))
    output.sum().backward()
    assert weight.grad is not None
    before = weight.grad.clone()
    deferred.finish()
    assert torch.equal(weight.grad, before)


def test_what_was_finished_is_finished_once() -> None:
    features, weight = leaf(2, 8), leaf(4, 8)
    deferred = WeightGradients(later=True)
    deferred.run(functional.linear, [features, weight], {}, frozenset({1})).sum().backward()
    deferred.finish()
    assert weight.grad is not None
    before = weight.grad.clone()
    deferred.finish()
    assert torch.equal(weight.grad, before)


# Large linear layers

LINEAR_LAYER = resolve(LINEAR)
ROWS, INNER, OUTER = 32, 256, 320


@pytest.fixture(params=["onednn", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor: both kinds."""
    monkeypatch.setattr(weight_gradients, "trains_here", lambda: request.param == "onednn")


def layer(with_bias: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [leaf(OUTER, INNER), *([leaf(OUTER)] if with_bias else [])]


def backward(
    gradients: WeightGradients, x: torch.Tensor, leaves: list[torch.Tensor], seed: torch.Tensor
) -> torch.Tensor:
    weights = frozenset(range(1, len(leaves) + 1))
    output = gradients.run(LINEAR_LAYER, [x, *leaves], {}, weights)
    output.backward(seed)
    return output.detach()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_large_layer_has_torchs_gradients_to_rounding(with_bias: bool) -> None:
    x, leaves = leaf(4, ROWS // 4, INNER), layer(with_bias)
    # As attention's reshaping leaves it: not contiguous.
    seed = torch.randn(OUTER, 4, ROWS // 4).permute(1, 2, 0)
    expected = functional.linear(x, *leaves)
    wanted = torch.autograd.grad(expected, [x, *leaves], seed)
    output = backward(WeightGradients(), x, leaves, seed)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    for tensor, gradient in zip([x, *leaves], wanted, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, INNER), (4, ROWS // 4, INNER)])
def test_whoever_comes_next_may_write_into_a_large_layers_result(
    shape: tuple[int, ...], with_bias: bool, later: bool
) -> None:
    x, leaves = leaf(*shape), layer(with_bias)
    expected = functional.linear(x, *leaves).add(1.0).relu()
    wanted = torch.autograd.grad(expected.sum(), [x, *leaves])
    gradients = WeightGradients(later)
    weights = frozenset(range(1, len(leaves) + 1))
    output = gradients.run(LINEAR_LAYER, [x, *leaves], {}, weights).add_(1.0).relu_()
    output.sum().backward()
    gradients.finish()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    for tensor, gradient in zip([x, *leaves], wanted, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_a_large_layers_halves_make_the_gradients_of_one_backward() -> None:
    x, seed, leaves = torch.randn(ROWS, INNER), torch.randn(ROWS, OUTER), layer()
    whole = x.clone().requires_grad_()
    backward(WeightGradients(), whole, leaves, seed)
    wanted = [tensor.grad for tensor in leaves]

    halved, others, later = x.clone().requires_grad_(), layer(), WeightGradients(later=True)
    backward(later, halved, others, seed)
    assert [tensor.grad for tensor in others] == [None, None]
    later.finish()
    assert halved.grad is not None
    assert whole.grad is not None
    assert torch.equal(halved.grad, whole.grad)
    for tensor, gradient in zip(others, wanted, strict=True):
        assert tensor.grad is not None
        assert gradient is not None
        assert torch.equal(tensor.grad, gradient)
        assert not tensor.grad.requires_grad  # or it would keep the layer's input


@pytest.mark.usefixtures("kernels")
def test_a_large_layer_adds_to_the_sums_in_place() -> None:
    leaves = layer()
    pairs = [(leaf(ROWS, INNER), torch.randn(ROWS, OUTER)) for _ in range(3)]
    backward(WeightGradients(), pairs[0][0], leaves, pairs[0][1])
    sums = [tensor.grad for tensor in leaves]
    for x, seed in pairs[1:]:
        backward(WeightGradients(), x, leaves, seed)
    assert all(tensor.grad is total for tensor, total in zip(leaves, sums, strict=True))
    wanted = sum(seed.t() @ x.detach() for x, seed in pairs)
    torch.testing.assert_close(leaves[0].grad, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_a_large_layer_without_gradient_below_still_has_its_own() -> None:
    leaves = layer()
    later = WeightGradients(later=True)
    backward(later, torch.randn(ROWS, INNER), leaves, torch.randn(ROWS, OUTER))
    later.finish()
    assert all(tensor.grad is not None for tensor in leaves)


@pytest.mark.parametrize(
    "arguments",
    [
        [torch.randn(2, INNER), leaf(OUTER, INNER)],  # too few rows
        [torch.randn(ROWS, 8), leaf(16, 8)],
        [torch.randn(ROWS, INNER).bfloat16(), torch.randn(OUTER, INNER).bfloat16()],
        [torch.randn(ROWS, INNER).double(), torch.randn(OUTER, INNER).double()],
    ],
    ids=["few rows", "small", "bfloat16", "float64"],
)
def test_other_layers_are_torchs_own(arguments: list[torch.Tensor]) -> None:
    weight = arguments[1].detach().requires_grad_()
    output = WeightGradients().run(LINEAR_LAYER, [arguments[0], weight], {}, frozenset({1}))
    assert torch.equal(output, functional.linear(arguments[0], weight))


def test_a_layer_whose_bias_is_frozen_is_torchs_own() -> None:
    x, (weight, bias) = torch.randn(ROWS, INNER), layer()
    bias.requires_grad_(False)
    output = WeightGradients().run(LINEAR_LAYER, [x, weight, bias], {}, frozenset({1}))
    output.sum().backward()
    assert bias.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("processor", "has_onednn", "wanted"),
    [
        ("vendor_id\t: AuthenticAMD\n", True, True),
        ("vendor_id\t: AuthenticAMD\n", False, False),
        ("vendor_id\t: GenuineIntel\n", True, False),
        ("arm", True, True),
    ],
)
def test_the_kernels_follow_from_the_processor(
    processor: str, has_onednn: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn.trains_here.__wrapped__() is wanted
