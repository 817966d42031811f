"""What dagflow checks before it calls operators that don't check it themselves.

torch trusts a model's own code: an operator may take strides, indices or weights as they come, and read
or write whatever memory they lead to, or end the process. A program may come from anybody. Which
operators need a fence was found by calling all that are allowed with hostile arguments:
``python -m tests.trust.hostile_calls``. A fence refuses with ValueError what no model asks for, and
changes no bit of what it lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch

from dagflow_tasks.program.allow_list import INTO, name_in_programs

Operator = Callable[..., Any]
_ATEN = torch.ops.aten
_MOST_SIZE = 1 << 62
# Up to here float64 holds every whole number.
_MOST_EXACT = 1 << 53


def fenced(op: str, operator: torch._ops.OpOverload, section: str) -> Operator:
    """Return what programs call in an operator's place: itself, if it needs no fence."""
    replaced = _REPLACED.get(op)
    if replaced is not None:
        return replaced
    if section == INTO:
        return _computed_first(operator)
    check = _CHECKS.get(op)
    return operator if check is None else _checked(operator, check)


def checked_operators() -> frozenset[str]:
    """Return the operators that have a fence of their own."""
    return frozenset({*_REPLACED, *_CHECKS})


def _checked(operator: torch._ops.OpOverload, check: Operator) -> Operator:
    formals = operator._schema.arguments
    names = [formal.name for formal in formals]
    defaults = {f.name: f.default_value for f in formals if f.has_default_value()}

    @wraps(operator.op)
    def call(*arguments: Any, **keywords: Any) -> Any:
        check(**{**defaults, **dict(zip(names, arguments, strict=False)), **keywords})
        return operator(*arguments, **keywords)

    return call


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


# Memory that nobody has written holds what was there before: another run's numbers, or a password.


def _zeroed(operator: torch._ops.OpOverload) -> Operator:
    @wraps(operator.op)
    def call(*arguments: Any, **keywords: Any) -> torch.Tensor:
        made: torch.Tensor = operator(*arguments, **keywords)
        with torch.no_grad():
            whole = made.untyped_storage()
            if whole.nbytes() != made.numel() * made.element_size():  # gaps between elements
                _bytes_of(made).zero_()
            else:
                made.zero_()
        return made

    return call


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


# Strides


def _check_strided(
    self: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
    **_: Any,
) -> None:
    """Stay between the tensor's own first element and its last, whatever else its storage holds."""
    begin = self.storage_offset()
    first = begin if storage_offset is None else storage_offset
    _demand(len(size) == len(stride), f"{len(size)} sizes, but {len(stride)} strides")
    _demand(min([*size, *stride, first], default=0) >= 0, "a size, stride or offset below 0")
    if 0 in size:
        return
    last = first + _reach(size, stride)
    end = begin + _reach(self.shape, self.stride())
    inside = self.numel() > 0 and begin <= first and last <= end
    _demand(inside, f"elements {first} to {last} of a tensor that has {begin} to {end}")


def _reach(size: Sequence[int], stride: Sequence[int]) -> int:
    return sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _check_bytes_of_bools(self: torch.Tensor, dtype: torch.dtype, **_: Any) -> None:
    """Kernels take a bool's byte for 0 or 1, and count with it."""
    _demand(dtype != torch.bool or self.dtype == torch.bool, "bytes of numbers aren't bools")


# Whole numbers


def _check_quotient(self: Any, other: Any, **_: Any) -> None:
    """The least whole number divided by -1 has no result, and ends the process."""
    for value in (self, other):
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
        whole = kind is int or (isinstance(kind, torch.dtype) and _is_whole(kind))
        if not whole and kind not in (bool, torch.bool):
            return
    if isinstance(other, torch.Tensor):
        by_minus_one = other.numel() > 0 and bool((other == -1).any())
    else:
        by_minus_one = other == -1
    if not by_minus_one:
        return
    if isinstance(self, torch.Tensor):
        least = torch.iinfo(self.dtype).min if _is_whole(self.dtype) else 0
        overflows = least < 0 and self.numel() > 0 and bool((self == least).any())
    else:
        overflows = self <= -(1 << 31)
    _demand(not overflows, "the least whole number divided by -1")


def _check_steps(
    end: Any, start: Any = 0, step: Any = 1, dtype: torch.dtype | None = None, **_: Any
) -> None:
    """What becomes whole numbers: a step that is 0 as one, or a way of 2^63 by -1, ends the process."""
    if dtype is None and any(isinstance(number, float) for number in (start, end, step)):
        return
    if dtype is None or _is_whole(dtype):
        near = all(abs(number) < _MOST_SIZE for number in (start, end, step))
        _demand(near, f"numbers from {start} to {end} by {step}, which 64 bits don't hold")
        _demand(int(step) != 0, f"steps of {step}, which is 0 as a whole number")


def _check_bounds(self: torch.Tensor, *bounds: Any, **named: Any) -> None:
    """Draws of floats from 2^63 - 1 on: torch looks for the next one that the dtype holds for ever."""
    if _is_whole(self.dtype):
        return
    given = [b for b in (*bounds, named.get("from"), named.get("to")) if isinstance(b, int)]
    held = all(abs(bound) <= _MOST_EXACT for bound in given)
    _demand(held, f"bounds {given}, which floats don't hold")


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


# Indices


def _check_groups(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None, **_: Any
) -> None:
    """Groups of rows of a matrix, each by a matrix of its own: other forms no model asks for.

    The kernel takes the groups' ends as they come, and leaves rows after the last one unwritten.
    """
    _demand(self.dim() == 2 and mat2.dim() == 3, "rows (S, N), and matrices (G, N, M)")
    _demand(self.shape[1] == mat2.shape[1], f"rows of {self.shape[1]} by {list(mat2.shape)}")
    if offs is None or offs.dtype != torch.int32 or tuple(offs.shape) != mat2.shape[:1]:
        raise ValueError(f"ends of {mat2.shape[0]} groups, int32")
    ends = [0, *offs.tolist()]
    is_sorted = all(a <= b for a, b in pairwise(ends))
    _demand(is_sorted and ends[-1] == len(self), f"ends of groups of {len(self)} rows")


def _check_ctc(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    **_: Any,
) -> None:
    _demand(log_probs.dim() in (2, 3), "log-probabilities must be (T, N, C) or (T, C)")
    steps, classes = log_probs.shape[0], log_probs.shape[-1]
    _demand(0 <= blank < classes, f"blank {blank} of {classes} classes")
    inputs, wanted = _numbers(input_lengths), _numbers(target_lengths)
    _demand(all(0 <= n <= steps for n in inputs), f"an input length outside of 0 to {steps}")
    rows = targets.dim() > 1
    most = targets.shape[-1] if targets.dim() else 0
    _demand(all(0 <= n <= most for n in wanted), f"a target length outside of 0 to {most}")
    _demand(rows or sum(wanted) <= targets.numel(), "fewer targets than their lengths say")
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    _demand(len(inputs) == len(wanted) == batch, f"lengths that aren't those of {batch} rows")
    _demand(not rows or targets.shape[0] == batch, f"targets that aren't those of {batch} rows")
    # What is behind them is padding, of any number, and isn't looked at.
    ends = torch.tensor(wanted, device=targets.device)[:, None]
    used = torch.arange(most, device=targets.device) < (ends if rows else sum(wanted))
    _demand(_within(targets[used], 0, classes - 1), f"a target outside of {classes} classes")


def _numbers(lengths: Any) -> list[int]:
    found = lengths.flatten().tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
    return [int(n) for n in found]


def _within(tensor: torch.Tensor, least: int, most: int) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low >= least) and bool(high <= most)


def _check_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> None:
    """One value for each key: the kernel for CPUs counts one of them only."""
    _demand(min(query.dim(), key.dim(), value.dim()) >= 2, "queries, keys and values are matrices")
    _demand(key.shape[-2] == value.shape[-2], f"{key.shape[-2]} keys and {value.shape[-2]} values")
    _demand(
        query.shape[-1] == key.shape[-1], f"queries {query.shape[-1]}, keys {key.shape[-1]} wide"
    )


def _check_modes(interpolation_mode: int, padding_mode: int, **_: Any) -> None:
    """With a mode that there isn't, nothing is written into the result."""
    _demand(0 <= interpolation_mode <= 2, f"interpolation {interpolation_mode} of 0 to 2")
    _demand(0 <= padding_mode <= 2, f"padding {padding_mode} of 0 to 2")


def _check_weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0, **_: Any) -> None:
    """One length for each slice of the weight; the kernel reads as many as it needs."""
    _demand(v.numel() > 0, "a weight without elements")
    _demand(-1 <= dim < v.dim(), f"dimension {dim} of {v.dim()}")
    wanted = 1 if dim == -1 else v.shape[dim]
    _demand(g.numel() == wanted, f"{g.numel()} lengths instead of {wanted}")


def _check_fractions(random_samples: torch.Tensor, **_: Any) -> None:
    """Where windows begin follows from these; they are taken for numbers of [0, 1)."""
    good = (random_samples >= 0) & (random_samples < 1)
    _demand(bool(good.all()), "samples outside of [0, 1)")


# Weights of layers that torch hands to oneDNN as they are


def _check_recurrent(gates: int, states: int) -> Operator:
    def check(
        input: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        **_: Any,
    ) -> None:
        hidden = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        _demand(len(hidden) == states, f"{len(hidden)} states instead of {states}")
        _demand(
            input.dim() == 3 and all(state.dim() == 3 for state in hidden) and input.numel() > 0,
            "input and states have 3 dimensions, and none is empty",
        )
        directions = 2 if bidirectional else 1
        kinds = 4 if has_biases else 2
        size = hidden[0].shape[2]
        projected = len(params) == (kinds + 1) * num_layers * directions and states == 2
        _demand(
            projected or len(params) == kinds * num_layers * directions,
            f"{len(params)} weights of {num_layers} layers in {directions} directions",
        )
        kinds += projected
        batch = input.shape[0 if batch_first else 1]
        layers = num_layers * directions
        _demand(
            all(state.numel() and state.shape[:2] == (layers, batch) for state in hidden),
            f"states of {layers} layers and {batch} rows",
        )
        width = input.shape[2]
        for layer in range(num_layers):
            for direction in range(directions):
                begin = (layer * directions + direction) * kinds
                own = params[begin : begin + kinds]
                rows = gates * hidden[-1].shape[2]
                wanted: list[tuple[int, ...]] = [(rows, width), (rows, size)]
                wanted += [(rows,), (rows,)] if has_biases else []
                wanted += [(size, hidden[-1].shape[2])] if projected else []
                found = [tuple(weight.shape) for weight in own]
                _demand(found == wanted, f"weights of shapes {found} instead of {wanted}")
            width = size * directions

    return check


def _computed_first(operator: torch._ops.OpOverload) -> Operator:
    """Compute, and copy: torch would resize `out`, which may be a part of something larger."""
    functional = _without_out(operator)

    @wraps(operator.op)
    def call(*arguments: Any, out: torch.Tensor, **keywords: Any) -> torch.Tensor:
        result = functional(*arguments, **keywords)
        _demand(
            result.shape == out.shape, f"{list(result.shape)} doesn't go into {list(out.shape)}"
        )
        return out.copy_(result)

    return call


def _without_out(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    def form(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments if a.name != "out"]

    packet = operator.overloadpacket
    for name in packet.overloads():
        found: torch._ops.OpOverload = getattr(packet, name)
        if found is not operator and "out" not in name and form(found) == form(operator):
            return found
    raise LookupError(f"{operator} has no form without `out`.")


_EMPTY = (
    *("empty.memory_format", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
)


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(_ATEN, packet), overload or "default")
    return found


_REPLACED: Mapping[str, Operator] = {
    name_in_programs(name): _zeroed(_overload(name)) for name in _EMPTY
}

_CHECKED: Mapping[str, Operator] = {
    "as_strided": _check_strided,
    "as_strided_scatter": _check_strided,
    "view.dtype": _check_bytes_of_bools,
    **dict.fromkeys(
        (
            *(
                "floor_divide",
                "floor_divide.Scalar",
                "floor_divide_.Tensor",
                "floor_divide_.Scalar",
            ),
            *("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor"),
            *("remainder_.Tensor", "remainder_.Scalar"),
            *("fmod.Tensor", "fmod.Scalar", "fmod_.Tensor", "fmod_.Scalar"),
            *("div.Tensor_mode", "div.Scalar_mode", "div_.Tensor_mode", "div_.Scalar_mode"),
            *("divide.Tensor_mode", "divide.Scalar_mode"),
            *("divide_.Tensor_mode", "divide_.Scalar_mode"),
        ),
        _check_quotient,
    ),
    **dict.fromkeys(("arange.start_step", "range", "range.step"), _check_steps),
    "random_.from": _check_bounds,
    "ctc_loss.Tensor": _check_ctc,
    "_grouped_mm": _check_groups,
    "ctc_loss.IntList": _check_ctc,
    "fractional_max_pool2d": _check_fractions,
    "fractional_max_pool3d": _check_fractions,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _check_modes),
    "scaled_dot_product_attention": _check_attention,
    "_weight_norm": _check_weight_norm,
    "lstm.input": _check_recurrent(4, 2),
    "gru.input": _check_recurrent(3, 1),
    "rnn_tanh.input": _check_recurrent(1, 1),
    "rnn_relu.input": _check_recurrent(1, 1),
}
_CHECKS: Mapping[str, Operator] = {name_in_programs(n): check for n, check in _CHECKED.items()}
