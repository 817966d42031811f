"""Idioms that meddle with gradients: checkpoints, functions with a backward, hooks, detaching."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .case import EITHER, WARNED
from .idioms import WIDTH, idiom


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


@idiom()
class CheckpointWithoutReentrance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.after = _layers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.after(checkpoint(self.layers, h, use_reentrant=False))


@idiom(expected=EITHER)
class CheckpointWithReentrance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.after = _layers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.after(checkpoint(self.layers, h, use_reentrant=True))


@idiom(expected=EITHER)
class CheckpointSequentialWithReentrance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.after = _layers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.after(checkpoint_sequential(self.layers, 2, h, use_reentrant=True))


@idiom()
class CheckpointOfDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layers, h, use_reentrant=False) + h


class _WithoutGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class _OwnSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@idiom(expected=WARNED)
class FunctionWithoutGradInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.after(_WithoutGrad.apply(h))


@idiom(expected=WARNED)
def function_straight_through(h: torch.Tensor) -> torch.Tensor:
    return _StraightThrough.apply(h * 3)


@idiom(expected=WARNED)
def function_reverses_the_gradient(h: torch.Tensor) -> torch.Tensor:
    return _ReversedGradient.apply(h)


@idiom()
def function_whose_backward_is_the_derivative(h: torch.Tensor) -> torch.Tensor:
    return _OwnSquare.apply(h)


@idiom()
def straight_through_by_detach(h: torch.Tensor) -> torch.Tensor:
    return h + (h.round() - h).detach()


@idiom()
def detached_half(h: torch.Tensor) -> torch.Tensor:
    return h * h.detach().sigmoid()


@idiom()
class NoGradInTheMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.frozen(h).sigmoid()
        return self.after(h * scale)


@idiom()
class NoGradWithGradInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mean = h.mean(1, keepdim=True)
            with torch.enable_grad():
                out = self.layer(h - mean)
        return out


@idiom()
class NoGradAsADecorator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    @torch.no_grad()
    def target(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h) - 0.5 * self.target(h)


@idiom(expected=EITHER)
class InferenceModeInTheMiddle(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scale = h.abs().mean()
        return h * scale.clone()


@idiom(expected=WARNED)
def hook_on_a_tensor(h: torch.Tensor) -> torch.Tensor:
    h = h * 1.5
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return h


@idiom(expected=WARNED)
class HookOnAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.weight.register_hook(lambda gradient: gradient * 2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


@idiom(expected=WARNED)
class HookOnAModulesBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(2 * gradient for gradient in inputs)
        )

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


@idiom()
class HookOnForwardChangesTheOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.layer.register_forward_hook(lambda module, inputs, output: output * 2)
        self.layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)


@idiom()
class FrozenLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(self.frozen(h))


@idiom()
class UnusedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.square()


@idiom()
class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            h = torch.tanh(self.layer(h)) + h
        return h


@idiom()
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(h)))


@idiom()
class TiedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(h)) @ self.layer.weight


@idiom(expected=EITHER)
class GradientPenaltyByAutogradGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = self.layer(h).square()
        (gradient,) = torch.autograd.grad(out.sum(), h, create_graph=True)
        return out + gradient.square().sum(1, keepdim=True)


@idiom(expected=EITHER)
def functional_gradient(h: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda x: (x**3).sum())(h)


@idiom(expected=EITHER)
def functional_vmap(h: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: row * row.norm())(h)


@idiom(expected=EITHER)
class VmapOverAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.vmap(self.layer)(h)


@idiom(expected=EITHER)
class FunctionalCallWithOtherWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        weights = {name: value * 0.5 for name, value in self.layer.named_parameters()}
        found: torch.Tensor = torch.func.functional_call(self.layer, weights, (h,))
        return found
