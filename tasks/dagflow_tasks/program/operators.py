"""The instruction set of dagflow programs: operators named by data, resolved from an allow-list.

A node says ``aten.linear.default`` and gives its arguments as JSON. Whoever loads a program,
a volunteer's worker above all, runs nothing but the operators of the allow-list and the few extensions
below: no pickled code, no attribute look-ups on anything but ``torch.ops.aten``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from dagflow_tasks.errors import OperatorNotAllowed
from dagflow_tasks.kernels.attention import ATTEND, attend
from dagflow_tasks.kernels.linear_attention import (
    LIGHTNING,
    MATRIX_MEMORY,
    lightning_blocks,
    matrix_memory,
)
from dagflow_tasks.kernels.onednn import LINEAR_PACKED, linear_packed
from dagflow_tasks.kernels.quantised import LINEAR_INT4, LINEAR_INT8, linear_int4, linear_int8
from dagflow_tasks.kernels.recurrence import RUNNING_MAX, SCAN, WINDOW, running_max, scan, window
from dagflow_tasks.kernels.whole_sequences import (
    DELTA_RULE,
    KIMI_DELTA,
    LINEAR_RECURRENCE,
    SELECTIVE_SCAN,
    STATE_SPACE,
    WEIGHTED_SUMS,
    delta_rule_chunks,
    kimi_delta_chunks,
    linear_recurrence,
    selective_scan,
    state_space_chunks,
    weighted_sums,
)
from dagflow_tasks.program.allow_list import allowed, unlike
from dagflow_tasks.program.fences import fenced
from dagflow_tasks.program.nodes import Node, argument_references

LINEAR = "aten.linear.default"
WEIGHTED = "dagflow.weighted"
WHOLE = "dagflow.whole"
_ATEN_NAME = re.compile(r"aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")

ASSERTIONS = frozenset({"aten._assert_tensor_metadata.default"})
"""Carried by the operator DAG for the reader; not executed: shapes are checked on the batch."""

CHECKS = frozenset({"aten._assert_async.msg", "aten._assert_async.default"})
"""What the model's code demands of values, and raises about: they have no result."""


class _GroupedMatmul(torch.autograd.Function):
    """Rows sorted by expert, each group times its expert's matrix; any device, any dtype."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends.tolist()
        output = rows.new_zeros(rows.size(0), weight.size(2))
        for expert, begin, end in _groups(ctx.ends):
            torch.mm(rows[begin:end], weight[expert], out=output[begin:end])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        rows_gradient, weight_gradient = torch.zeros_like(rows), torch.zeros_like(weight)
        for expert, begin, end in _groups(ctx.ends):
            torch.mm(gradient[begin:end], weight[expert].T, out=rows_gradient[begin:end])
            torch.mm(rows[begin:end].T, gradient[begin:end], out=weight_gradient[expert])
        return rows_gradient, weight_gradient, None


def _groups(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            yield expert, begin, end
        begin = max(begin, end)


def _grouped_matmul(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Matrix product by group of rows, as mixture-of-experts layers need it.

    Parameters
    ----------
    rows : Tensor (S, K), sorted by group
    weight : Tensor (G, K, N)
    ends : integer Tensor (G,), cumulative number of rows up to and including each group

    Returns
    -------
    Tensor (S, N)
    """
    result: torch.Tensor = _GroupedMatmul.apply(rows, weight, ends)  # type: ignore[no-untyped-call]
    return result


def _item(results: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    """Return one of an operator's several results."""
    if type(results) not in (tuple, list) or type(index) is not int:
        raise TypeError(f"item {index!r:.80} of a {type(results).__name__}")
    return results[index]


def _demand(truth: torch.Tensor, message: str = "a check of the model's code") -> None:
    """Fail where ATen would on a CPU; on a GPU ATen's own would end the whole process's context."""
    if not bool(truth):
        raise ValueError(f"what the model's code demands of the values doesn't hold ({message})")


def _histc(values: torch.Tensor, *bins: Any, **more: Any) -> torch.Tensor:
    """ATen's, for integers on CPUs as well: expert layers that were captured elsewhere count them."""
    if values.is_floating_point() or values.device.type != "cpu":
        return torch.histc(values, *bins, **more)
    return torch.histc(values.float(), *bins, **more).to(values.dtype)


def _weighted(part: torch.Tensor, weight: float) -> torch.Tensor:
    """Return a part of the loss times the weight that came with the micro-batch.

    A mean over nothing is NaN: a part of which nothing counts is 0, and no gradient starts there.
    """
    return part * weight if weight else torch.zeros_like(part)


def _whole(
    numbers: Any, shape: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return what the whole batch has been summed up to, which came with the micro-batch."""
    return torch.tensor(numbers, dtype=dtype, device=device).reshape(shape)


_EXTENSIONS: dict[str, Callable[..., Any]] = {
    "getitem": _item,
    "aten.histc.default": _histc,
    **dict.fromkeys(CHECKS, _demand),
    # transformers exports its expert layers with this custom operator; the meaning is kept, so
    # that a worker needs no transformers.
    "transformers.grouped_mm_fallback.default": _grouped_matmul,
    ATTEND: attend,
    WINDOW: window,
    SCAN: scan,
    RUNNING_MAX: running_max,
    SELECTIVE_SCAN: selective_scan,
    STATE_SPACE: state_space_chunks,
    DELTA_RULE: delta_rule_chunks,
    KIMI_DELTA: kimi_delta_chunks,
    LINEAR_RECURRENCE: linear_recurrence,
    WEIGHTED_SUMS: weighted_sums,
    WEIGHTED: _weighted,
    WHOLE: _whole,
    LIGHTNING: lightning_blocks,
    MATRIX_MEMORY: matrix_memory,
    LINEAR_INT8: linear_int8,
    LINEAR_INT4: linear_int4,
    LINEAR_PACKED: linear_packed,
}


def own_operators() -> frozenset[str]:
    """Return the operators that are functions of dagflow's, and no operators of torch's."""
    return frozenset(_EXTENSIONS)


@cache
def resolve(op: str) -> Callable[..., Any]:
    """Return what an operator's name in a program stands for.

    Raises
    ------
    OperatorNotAllowed
        If the name isn't on the allow-list, or no operator of this torch.
    """
    extension = _EXTENSIONS.get(op)
    if extension is not None:
        return extension
    overload = _overload(op)
    assert overload is not None  # it is no extension
    return fenced(op, overload, allowed()[op])


@cache
def _overload(op: str) -> torch._ops.OpOverload | None:
    """Return torch's operator, None for `getitem` and the extensions."""
    if op in _EXTENSIONS:
        return None
    section = allowed().get(op)
    match = _ATEN_NAME.fullmatch(op)
    if section is None or match is None:
        raise OperatorNotAllowed(
            f"The operator {op!r} is not on the allow-list of dagflow programs "
            "(dagflow_tasks/program/allowed_operators.toml)."
        )
    packet = getattr(torch.ops.aten, match[1], None)
    overload = getattr(packet, match[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise OperatorNotAllowed(
            f"This worker's torch {torch.__version__} has no operator {op!r}; the program was made "
            "with another torch. Install the torch version that the run's settings name."
        )
    problem = unlike(section, overload)
    if problem:
        raise OperatorNotAllowed(
            f"The operator {op!r} is on the allow-list of dagflow programs as one of {section!r}, "
            f"which in this worker's torch {torch.__version__} it isn't: {problem}. Install the "
            "torch version that the run's settings name."
        )
    return overload


def is_allowed(op: str) -> bool:
    """Tell whether `resolve` would succeed."""
    try:
        resolve(op)
    except OperatorNotAllowed:
        return False
    return True


_PRODUCTS = frozenset(
    ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d")
)


def linear_weights(nodes: Iterable[Node]) -> set[str]:
    """Return the values that nothing reads but linear operators, as their weights.

    >>> x, w, v = ({"ref": name} for name in "xwv")
    >>> nodes = [Node("a", LINEAR, (x, w)), Node("b", LINEAR, (x, v)), Node("c", "aten.t.default", (v,))]
    >>> linear_weights(nodes)
    {'w'}
    """
    weights, others = set(), set()
    for node in nodes:
        names = list(node.references())
        if node.op == LINEAR:
            weights.add(names.pop(1))  # after its input
        others.update(names)
    return weights - others


def multiplies(node: Node) -> bool:
    """Tell whether the operator is a product of matrices or a convolution.

    These are what autocast runs in half precision, on CPUs and GPUs alike, and where a backward
    spends its time.
    """
    return node.op.startswith("aten.") and node.op.split(".")[1] in _PRODUCTS


def schema_of(op: str) -> torch.FunctionSchema | None:
    """Return the operator's schema, or None for `getitem` and the extensions."""
    overload = _overload(op)
    return None if overload is None else overload._schema


@cache
def device_parameters(op: str) -> frozenset[int | str]:
    """Positions and names of the operator's parameters that choose a device."""
    schema = schema_of(op)
    formals = enumerate(schema.arguments) if schema is not None else ()
    found = [(i, formal.name) for i, formal in formals if "Device" in str(formal.type)]
    return frozenset(key for pair in found for key in pair)


def has_gradients(dtype: torch.dtype) -> bool:
    """Tell whether autograd differentiates tensors of this dtype: floating-point or complex ones."""
    return dtype.is_floating_point or dtype.is_complex


def countable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a dtype whose numbers torch can look at: float8 has few operators."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def draws_random_numbers(op: str) -> bool:
    """Tell whether the operator may draw from the random generator."""
    overload = _overload(op)
    return overload is not None and torch.Tag.nondeterministic_seeded in overload.tags


_NORMS = ("aten.batch_norm.default", "aten.instance_norm.default")


def mutated_arguments(node: Node) -> list[str]:
    """Names of the values that the node writes in place, by its schema.

    ATen's schemas say nothing of the running statistics of batch and instance normalisation, which
    they do write.
    """
    schema = schema_of(node.op)
    if schema is None:
        return []
    names: list[str] = []
    for position, formal in enumerate(schema.arguments):
        writes = formal.alias_info is not None and formal.alias_info.is_write
        if writes or (node.op in _NORMS and position in (3, 4) and node.args[5]):
            actual = (
                node.args[position] if position < len(node.args) else node.kwargs.get(formal.name)
            )
            names.extend(argument_references(actual))
    return names


def aliased_arguments(node: Node) -> list[str]:
    """Names of the values whose memory the node's output may share (views and in-place results)."""
    if node.op == "getitem":
        return list(argument_references(node.args[0]))
    schema = schema_of(node.op)
    if schema is None:
        return []
    names: list[str] = []
    for position, formal in enumerate(schema.arguments):
        if formal.alias_info is None and _MAYBE_VIEW.get(node.op) != position:
            continue
        actual = node.args[position] if position < len(node.args) else node.kwargs.get(formal.name)
        names.extend(argument_references(actual))
    return names


def storages(nodes: Iterable[Node]) -> dict[str, str]:
    """Return, for every node's result, the first value whose memory it may share.

    >>> nodes = [Node("v", "aten.t.default", ({"ref": "x"},)), Node("w", "aten.neg.default", ({"ref": "v"},))]
    >>> storages(nodes)
    {'v': 'x', 'w': 'w'}
    """
    root: dict[str, str] = {}
    for node in nodes:
        shared = aliased_arguments(node)
        root[node.name] = root.get(shared[0], shared[0]) if shared else node.name
    return root


# Composite operators that return their input itself when there is nothing to do, which their
# schemas don't say (position of that input).
_MAYBE_VIEW = {
    "aten.dropout.default": 0,
    "aten.feature_dropout.default": 0,
    "aten.alpha_dropout.default": 0,
    "aten.feature_alpha_dropout.default": 0,
    "aten.flatten.using_ints": 0,
    "aten.type_as.default": 0,
}
