"""The instruction set of dagflow programs: operators named by data, resolved from an allow-list.

A node says ``aten.linear.default`` and gives its arguments as JSON. Whoever loads a program,
a volunteer's worker above all, runs nothing but the operators of the allow-list and the few extensions
below: no pickled code, no attribute look-ups on anything but ``torch.ops.aten``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from dagflow_tasks.errors import OperatorNotAllowed, ProgramInvalid, SizeInvalid
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
from dagflow_tasks.program.sizes import check_size, evaluate_size

Argument = Any
"""JSON: None, bool, int, float, str, a list, or a one-key mapping (`ref`, `size`, `dtype`, ...)."""

LINEAR = "aten.linear.default"
WEIGHTED = "dagflow.weighted"
WHOLE = "dagflow.whole"
_ATEN_NAME = re.compile(r"aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")

ASSERTIONS = frozenset({"aten._assert_tensor_metadata.default"})
"""Carried by the operator DAG for the reader; not executed: shapes are checked on the batch."""

CHECKS = frozenset({"aten._assert_async.msg", "aten._assert_async.default"})
"""What the model's code demands of values, and raises about: they have no result."""


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes
    ----------
    name : str
        Unique in the operator DAG that the node was captured in. It is also the operator's part of
        the address of its random numbers, so it never changes when the DAG is cut.
    op : str
        ``aten.<operator>.<overload>``, ``getitem`` or an extension.
    args, kwargs
        Encoded arguments, see `Argument`.
    grad : bool
        False inside the model's ``no_grad`` regions.
    autocast : bool
        False inside regions that switch autocast off.
    module : str
        Path of the module whose forward called the operator, "" for the model itself.
    autocast_dtype : str
        The dtype of an autocast region of the model's own, "" outside of these.
    """

    name: str
    op: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument] = field(default_factory=dict)
    grad: bool = True
    autocast: bool = True
    module: str = ""
    autocast_dtype: str = ""

    def references(self) -> Iterator[str]:
        """Names of the values the node reads, in argument order, repeated if read twice."""
        for argument in (*self.args, *self.kwargs.values()):
            yield from argument_references(argument)

    def reading(self, renamed: Mapping[str, str]) -> Node:
        """Return the node with values read by other names."""
        if not any(name in renamed for name in self.references()):
            return self

        def rename(argument: Argument) -> Argument:
            if isinstance(argument, Mapping):
                name = str(argument.get("ref"))
                return {"ref": renamed[name]} if name in renamed else argument
            if isinstance(argument, (list, tuple)):
                return [rename(item) for item in argument]
            return argument

        keywords = {name: rename(argument) for name, argument in self.kwargs.items()}
        return replace(self, args=tuple(map(rename, self.args)), kwargs=keywords)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"name": self.name, "op": self.op, "args": list(self.args)}
        if self.kwargs:
            body["kwargs"] = dict(self.kwargs)
        if not self.grad:
            body["grad"] = False
        if not self.autocast:
            body["autocast"] = False
        if self.module:
            body["module"] = self.module
        if self.autocast_dtype:
            body["autocast_dtype"] = self.autocast_dtype
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Node:
        try:
            node = cls(
                name=body["name"],
                op=body["op"],
                args=tuple(body["args"]),
                kwargs=dict(body.get("kwargs", {})),
                grad=body.get("grad", True),
                autocast=body.get("autocast", True),
                module=body.get("module", ""),
                autocast_dtype=body.get("autocast_dtype", ""),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProgramInvalid(
                f"A node of a program needs 'name', 'op' and 'args'; found {body!r:.200}."
            ) from error
        texts = (node.name, node.op, node.module, node.autocast_dtype, *node.kwargs)
        flags = (node.grad, node.autocast)
        if any(type(text) is not str for text in texts) or any(type(f) is not bool for f in flags):
            raise ProgramInvalid(
                f"A node of a program has texts for names and true or false for flags; found "
                f"{body!r:.200}."
            )
        return node


def argument_references(argument: Argument) -> Iterator[str]:
    """Yield the value names inside one encoded argument."""
    if isinstance(argument, Mapping):
        if "ref" in argument:
            yield argument["ref"]
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from argument_references(item)


def mentions_size(argument: Argument) -> bool:
    """Tell whether an encoded argument depends on the batch's sizes."""
    if isinstance(argument, Mapping):
        return "size" in argument
    return isinstance(argument, (list, tuple)) and any(map(mentions_size, argument))


def encode_literal(value: Any) -> Argument:
    """Encode a Python or torch constant that appears as an operator's argument.

    Raises
    ------
    TypeError
        For anything but numbers, strings, dtypes, devices, layouts and memory formats.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode_literal(value.real), encode_literal(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "stage"}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} can't be an argument in a program")


# fmt: off
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
)
# fmt: on

_TORCH_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {name: getattr(torch, name) for name in _DTYPES},
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}


def decode_literal(
    argument: Mapping[str, Any], sizes: Mapping[str, int], device: torch.device
) -> Any:
    """Decode a one-key mapping that isn't a reference.

    `{"device": ...}` always becomes the stage's own device: no program chooses where it runs.
    """
    try:
        ((kind, value),) = argument.items()
        if kind == "size":
            return evaluate_size(value, sizes)
        if kind == "device":
            return device
        if kind == "float":
            return float(value)
        if kind == "complex":
            parts = (
                decode_literal(p, sizes, device) if isinstance(p, Mapping) else p for p in value
            )
            return complex(*parts)
        return _TORCH_CONSTANTS[kind][value]
    except SizeInvalid:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError):
        raise ProgramInvalid(f"A program holds the unknown argument {argument!r:.200}.") from None


# Lists of lists are the deepest that operators take; texts are names of modes, and einsum's equations.
_MOST_NESTING, _MOST_TEXT = 6, 4096
_MOST_NUMBER = 1 << 64


def check_argument(argument: Argument, symbols: Collection[str]) -> None:
    """Refuse what isn't an argument as `Argument` says, or is too deep or too large for one.

    Raises
    ------
    ProgramInvalid
    """
    waiting = [(argument, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, (list, tuple)) and depth < _MOST_NESTING:
            waiting += [(item, depth + 1) for item in part]
        elif isinstance(part, Mapping):
            _check_encoded(part, symbols)
        elif not (
            part is None
            or isinstance(part, (bool, float))
            or (isinstance(part, int) and abs(part) < _MOST_NUMBER)
            or (isinstance(part, str) and len(part) <= _MOST_TEXT)
        ):
            raise ProgramInvalid(f"A program holds the unknown argument {part!r:.200}.")


def _check_encoded(argument: Mapping[str, Any], symbols: Collection[str]) -> None:
    kind, value = next(iter(argument.items())) if len(argument) == 1 else ("", None)
    if kind == "size":
        check_size(value, symbols)
    elif kind == "ref" and type(value) is str:
        pass  # whether it is defined is asked where the nodes are known
    else:
        decode_literal(argument, {}, _CPU)


_CPU = torch.device("cpu")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that a program names; nothing else of torch can be reached by name."""
    dtype = _TORCH_CONSTANTS["dtype"].get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ProgramInvalid(f"A program holds the unknown dtype {name!r:.80}.")
    return dtype


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
