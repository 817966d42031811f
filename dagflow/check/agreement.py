"""How closely a captured graph must agree with its model, and with which weights that is tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dagflow.errors import DagflowError, ResultsDiffer

# Other kernels or another order of sums differ by some units in the last place of each operator.
ROUNDING = 1e-5
# Where that isn't enough: so many times what the model's own results change when its parameters
# change by a unit in the last place. Gradients that are zero but for rounding change by all of it.
TIMES_OWN_NOISE = 16
NUM_NUDGES = 2
# Parameters that are all alike (zeros, ones) are changed by up to this: behind a layer of zeros
# nothing could be seen.
_WAKE = 0.02
TURN_OFF = "Config(check=False) trains without this check."


@contextmanager
def no_bare_errors() -> Iterator[None]:
    """Say what it means for a run if the check comes to no end.

    Raises
    ------
    ResultsDiffer
    """
    try:
        yield
    except DagflowError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ResultsDiffer(
            "The check before the first step comes to no end, though model and graph run on the first "
            f"micro-batch: {type(error).__name__}: {reason}. What to do: see that forward can run "
            "several times in turn, also where parameters differ by rounding and on other rows of the "
            f"batch. {TURN_OFF}"
        ) from error


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def awake(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return other values for parameters whose numbers are all the same."""
    awake: dict[str, torch.Tensor] = {}
    for name, tensor in parameters_of(model).items():
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        if bool((tensor == tensor.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(len(awake))
            noise = _WAKE * torch.rand(tensor.shape, generator=generator)
            awake[name] = tensor + noise.to(tensor.dtype)
    return awake


def how_it_differs(ours: torch.Tensor | None, theirs: torch.Tensor | None, noise: float) -> str:
    """Say how a result differs from the model's; "" if it doesn't, but for rounding."""
    if ours is None or theirs is None:
        there = theirs if ours is None else ours
        if there is None or not bool((there != 0).any()):
            return ""
        return "is missing" if ours is None else "should be none at all"
    if ours.shape != theirs.shape:
        return f"has shape {list(ours.shape)} instead of {list(theirs.shape)}"
    error, size = error_of(ours, theirs), float(_finite(theirs).norm())
    if error <= ROUNDING * size + TIMES_OWN_NOISE * noise:
        return ""
    if theirs.numel() == 1:
        return f"is {float(ours):.6g} instead of {float(theirs):.6g}"
    return f"is {percent(error, size)} off"


def error_of(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    """Return the norm of the difference; infinite if one is finite where the other isn't."""
    if ours is None or ours.shape != theirs.shape:
        return math.inf
    if torch.equal(ours, theirs):
        return 0.0
    same = (ours == theirs) | ((ours != ours) & (theirs != theirs))
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    error = float(torch.where(same, 0.0, ours.to(wide) - theirs.to(wide)).norm())
    return error if math.isfinite(error) else math.inf


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return torch.where(torch.isfinite(wide), wide, 0.0)


def percent(error: float, size: float) -> str:
    if not math.isfinite(error) or not size:
        return "entirely"
    return f"{100 * error / size:.3g} %" if error < 10 * size else f"{error / size:.0f} times"
