"""Backward in two halves: the inputs' gradients at once, those of large weights later.

The stage before waits only for the first half, so the second can fill the pipeline's bubble (zero
bubble pipeline parallelism, arXiv 2401.10241, section 2). Each operator that multiplies by weights
gets an autograd graph of its own inside the stage's; both halves run the kernels that autograd
would run for the whole, so not a bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge


class DeferredWeights:
    """What is left of a backward: for each product the gradient that reached it, and its weights."""

    def __init__(self) -> None:
        self._left: list[tuple[GradientEdge, torch.Tensor, list[torch.Tensor]]] = []

    def run(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        weights: frozenset[int],
    ) -> torch.Tensor:
        """Run an operator so that its backward leaves its weights' gradients for `finish`.

        Parameters
        ----------
        weights
            Positions of the arguments that are leaves of the autograd graph.
        """
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

        def later(product: GradientEdge, gradient: torch.Tensor) -> None:
            self._left.append((product, gradient, leaves))

        output: torch.Tensor = _Halved.apply(  # type: ignore[no-untyped-call]
            on, later, *(arguments[i] for i in inputs)
        )
        return output

    def finish(self) -> None:
        """Add the weights' gradients to their `grad`, and let go of what was kept for them."""
        while self._left:
            product, gradient, leaves = self._left.pop()
            torch.autograd.backward(product, gradient, inputs=leaves)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on: Any, later: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output: torch.Tensor = on(*ctx.inputs)
        # Its place in the graph, not the tensor itself: whoever needs its memory keeps it.
        ctx.product = get_gradient_edge(output)
        ctx.later = later
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        found = torch.autograd.grad(ctx.product, ctx.inputs, gradient, retain_graph=True)
        ctx.later(ctx.product, gradient)
        return (None, None, *found)
