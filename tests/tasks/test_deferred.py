"""Backward in two halves: first the inputs' gradients, then the weights', to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from dagflow_tasks.deferred import DeferredWeights


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

    deferred = DeferredWeights()
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
    deferred = DeferredWeights()
    output = deferred.run(functional.linear, [torch.randn(2, 8), weight], {}, frozenset({1}))
    output.sum().backward()
    assert weight.grad is not None
    before = weight.grad.clone()
    deferred.finish()
    assert torch.equal(weight.grad, before)


def test_what_was_finished_is_finished_once() -> None:
    features, weight = leaf(2, 8), leaf(4, 8)
    deferred = DeferredWeights()
    deferred.run(functional.linear, [features, weight], {}, frozenset({1})).sum().backward()
    deferred.finish()
    assert weight.grad is not None
    before = weight.grad.clone()
    deferred.finish()
    assert torch.equal(weight.grad, before)
