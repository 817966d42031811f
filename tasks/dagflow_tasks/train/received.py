"""What a stage gets from others, or is about to send, that can't be right."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dagflow_tasks.errors import GarbageReceived
from dagflow_tasks.program.operators import countable, has_gradients
from dagflow_tasks.program.sizes import evaluate_size
from dagflow_tasks.program.stage_program import ValueSpec
from dagflow_tasks.train.arguments import BackwardArguments
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.references import Microbatch, StageRef, action
from dagflow_tasks.train.results import ForwardResult


def check_received(
    ref: StageRef,
    value: ValueSpec,
    source: int,
    given: Mapping[str, torch.Tensor],
    microbatch: Microbatch,
) -> None:
    """Refuse a boundary value that can't be right, so that it is computed again by somebody else.

    Raises
    ------
    GarbageReceived
        Naming the stage it came from.
    """
    tensor = _check_form(ref, value, source, given, microbatch)
    what = _sent_to(ref, source, microbatch)
    if microbatch.least_weight:
        check_numbers(ref, tensor, f"{what} NaN in {value.name!r}.", source)


def check_gradient(
    work: BackwardArguments, gradient: torch.Tensor, value: torch.Tensor, name: str
) -> None:
    """Refuse a gradient that can't be right, as `check_received` does a value."""
    ref = work.ref
    if not ref.journal:
        return
    program = CACHE.executable(ref).program
    source = next(
        (s for s in program.gradient_sources if name in program.gradients_from(s)), ref.stage
    )
    label = work.label("I" if work.halved else "B")
    what = f"Stage {source} sent {label} a gradient of {name!r} with"
    if gradient.shape != value.shape:
        raise GarbageReceived(
            f"{what} shape {list(gradient.shape)} instead of {list(value.shape)}.", source
        )
    check_numbers(ref, gradient, f"{what} NaN.", source)


def will_be_refused(
    ref: StageRef, result: ForwardResult, microbatch: Microbatch, finite: bool
) -> bool:
    """Tell whether its readers will refuse a result, whose values are all finite or not.

    The journal mustn't keep it: whoever would have it disowned may be gone by then.
    """
    if not ref.journal:
        return False
    try:
        for output in CACHE.executable(ref).program.outputs:
            tensor = _check_form(ref, output.value, ref.stage, result.values, microbatch)
            if not finite and microbatch.least_weight:
                check_numbers(ref, tensor, output.value.name, ref.stage)
    except GarbageReceived:
        return True
    return False


def _check_form(
    ref: StageRef,
    value: ValueSpec,
    source: int,
    given: Mapping[str, torch.Tensor],
    microbatch: Microbatch,
) -> torch.Tensor:
    """Return a boundary value if it is there and has the form that the program says."""
    tensor = given.get(value.name)
    what = _sent_to(ref, source, microbatch)
    if tensor is None:
        raise GarbageReceived(f"{what} no {value.name!r}.", source)
    sizes = dict(microbatch.sizes)
    shape = tuple(evaluate_size(size, sizes) for size in value.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    # Under autocast values are in half precision that the program, captured without, has in fp32.
    other_dtype = dtype != value.dtype and ref.settings.precision == "fp32"
    if tuple(tensor.shape) != shape or other_dtype:
        raise GarbageReceived(
            f"{what} {value.name!r} as {dtype}{list(tensor.shape)} instead of "
            f"{value.dtype}{list(shape)}.",
            source,
        )
    return tensor


def _sent_to(ref: StageRef, source: int, microbatch: Microbatch) -> str:
    receiver = action("F", ref.stage, microbatch.step, microbatch.index)
    return f"Stage {source} sent {receiver}"


def check_numbers(ref: StageRef, tensor: torch.Tensor, message: str, source: int) -> None:
    """Refuse NaN."""
    # Infinities are no garbage (masks have them); under loss scaling, NaN isn't either.
    scaled = ref.settings.precision == "fp16"
    if has_gradients(tensor.dtype) and not scaled and bool(torch.isnan(countable(tensor)).any()):
        raise GarbageReceived(message, source, True)
