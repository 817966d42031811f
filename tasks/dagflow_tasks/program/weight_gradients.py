"""How the gradients of large weights are made: now or later, added in the product that makes them.

Later is the second half of a backward: the stage before waits only for the inputs' gradients, so
the weights' can fill the pipeline's bubble (zero bubble pipeline parallelism, arXiv 2401.10241,
section 2). Both halves run the kernels that the whole would run, so not a bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from dagflow_tasks.kernels.onednn import LEAST_ELEMENTS, LEAST_ROWS, linear, trains_here
from dagflow_tasks.program.operators import LINEAR, resolve


class WeightGradients:
    """Runs a stage's products with weights, and adds up what their backwards find for the weights.

    Parameters
    ----------
    later : bool
        Whether a backward leaves that to `finish`.
    """

    def __init__(self, later: bool = False) -> None:
        self.later = later
        self._left: list[Callable[[], None]] = []

    def run(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        weights: frozenset[int],
    ) -> torch.Tensor:
        """Run an operator.

        Parameters
        ----------
        weights
            Positions of the arguments that are leaves of the autograd graph.
        """
        if function is resolve(LINEAR) and not keywords and _is_layer(arguments, weights):
            x, weight, bias = (*arguments, None)[:3]
            output: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, self._take
            )
            return output
        if not self.later:
            return function(*arguments, **keywords)
        return self._halved(function, arguments, keywords, weights)

    def finish(self) -> None:
        """Add the weights' gradients to their `grad`, and let go of what was kept for them."""
        while self._left:
            self._left.pop()()

    def _take(self, add: Callable[[], None]) -> None:
        if self.later:
            self._left.append(add)
        else:
            add()

    def _halved(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        weights: frozenset[int],
    ) -> torch.Tensor:
        """Give an operator an autograd graph of its own inside the stage's."""
        inputs = [
            position
            for position, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor)
            and argument.requires_grad
            and position not in weights
        ]
        if not inputs:  # no gradient would come by
            return function(*arguments, **keywords)
        leaves = [arguments[position] for position in sorted(weights)]

        def on(*tensors: torch.Tensor) -> torch.Tensor:
            filled = list(arguments)
            for position, tensor in zip(inputs, tensors, strict=True):
                filled[position] = tensor
            return function(*filled, **keywords)

        def take(product: GradientEdge, gradient: torch.Tensor) -> None:
            self._take(partial(torch.autograd.backward, product, gradient, inputs=leaves))

        output: torch.Tensor = _Halved.apply(  # type: ignore[no-untyped-call]
            on, take, *(arguments[i] for i in inputs)
        )
        return output


def _is_layer(arguments: Sequence[Any], weights: frozenset[int]) -> bool:
    """Tell whether `_Linear` serves: a large weight, and a bias if any, that are leaves on a CPU."""
    x, weight, bias = (*arguments, None)[:3]
    return (
        weights == ({1} if bias is None else {1, 2})
        and weight.device.type == "cpu"
        and weight.dtype == x.dtype == torch.float32
        and weight.numel() >= LEAST_ELEMENTS
        and x.numel() >= LEAST_ROWS * x.shape[-1]
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, weight, bias) if trains_here() else functional.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer on the kernels that are fastest here.

    Its weights' gradients don't go through autograd: they are added to those of the micro-batches
    before within the product, and never exist apart.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, take: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.take = weight, bias, take
        product = _product(x, weight, bias)
        # Of more than two dimensions it is a view, and autograd lets nobody write into one of those
        # that a function like this returns: nn.ReLU(inplace=True), say.
        if product._is_view():
            product = torch.ops.aten._unsafe_view(product, product.shape)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        ctx.take(partial(_add_to, ctx.weight, ctx.bias, x, gradient))
        back = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        return back, None, None, None


@torch.no_grad()
def _add_to(
    weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Add a layer's gradients to its leaves'."""
    rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    if weight.grad is None:
        weight.grad = out.t() @ rows
    else:
        weight.grad.addmm_(out.t(), rows)
    if bias is not None:
        total = out.sum(0)
        bias.grad = total if bias.grad is None else bias.grad.add_(total)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on: Any, take: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output: torch.Tensor = on(*ctx.inputs)
        # Its place in the graph, not the tensor itself: whoever needs its memory keeps it.
        ctx.product = get_gradient_edge(output)
        ctx.take = take
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        found = torch.autograd.grad(ctx.product, ctx.inputs, gradient, retain_graph=True)
        ctx.take(ctx.product, gradient)
        return (None, None, *found)
