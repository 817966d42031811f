"""The stage program: what a worker is told to compute, as JSON.

A stage program lists operators with their arguments and names everything that goes in and out:
the batch's tensors, boundary values from other stages, parameters, buffers, constants. It holds
no weights and no code.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dagflow_storage.place.bounded_json import JsonLimits, JsonRefused, parse_json
from dagflow_tasks.errors import OperatorNotAllowed, ProgramInvalid, ProgramTooNew
from dagflow_tasks.layout import odd_strides, with_strides
from dagflow_tasks.program.nodes import Node, check_argument, dtype_of
from dagflow_tasks.program.operators import is_allowed, multiplies
from dagflow_tasks.program.sizes import LIMIT, check_size

FORMAT = "dagflow-stage-program"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ValueSpec:
    """Name, dtype and shape of a tensor; sizes are ints or size expressions over symbols."""

    name: str
    dtype: str
    shape: tuple[Any, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ValueSpec:
        spec = cls(body["name"], body["dtype"], tuple(body["shape"]))
        check_form(spec.name, spec.dtype, (), None)
        check_dims(spec.name, spec.shape)
        return spec


@dataclass(frozen=True)
class StageInput:
    """A value that comes from outside the stage.

    Attributes
    ----------
    value : ValueSpec
    source : int | None
        The stage that produces it, None for a tensor of the batch.
    gradient_from : int | None
        The stage whose backward already holds part of this value's gradient, because it reads the
        value, too, and comes later. Gradients are relayed from the last reader to the first, so
        that the sum has the same order as without cuts.
    differentiable : bool
        Whether a gradient may flow back through it.
    """

    value: ValueSpec
    source: int | None = None
    gradient_from: int | None = None
    differentiable: bool = False


@dataclass(frozen=True)
class StageOutput:
    """A boundary value that other stages read, in the order of the stages."""

    value: ValueSpec
    readers: tuple[int, ...]
    differentiable: bool = True


@dataclass(frozen=True)
class ParameterUse:
    """One place where a stage reads a parameter.

    Every use has a value (`p.NAME`, `p.NAME#1`, ...) and a gradient of its own: a tied
    parameter's gradients are added up once a step, last use first, wherever its uses are.

    `strides` are those of the model's own tensor, None where it is contiguous.
    """

    value: str
    parameter: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool
    owner: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BufferUse:
    """A buffer that the stage reads, and writes if `mutated` (running statistics).

    `owner` is the stage that puts it into snapshots, the first that reads it. `strides` are those
    of the model's own tensor, None where it is contiguous.
    """

    value: str
    buffer: str
    dtype: str
    shape: tuple[int, ...]
    mutated: bool
    owner: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor that is part of the program, with its bytes; `strides` None where it is contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)
    strides: tuple[int, ...] | None = None

    def tensor(self) -> torch.Tensor:
        dtype = dtype_of(self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        data = bytearray(self.data)
        if dtype == torch.bool:  # kernels take any other byte than 0 and 1 for a number
            tensor = (torch.frombuffer(data, dtype=torch.uint8) != 0).reshape(self.shape)
        else:  # a copy, in memory of torch's own, aligned as every other tensor's
            tensor = torch.frombuffer(data, dtype=dtype).reshape(self.shape).clone()
        return with_strides(tensor, self.strides)

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Constant:
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, dtype, tuple(tensor.shape), data, odd_strides(tensor))

    def to_json(self) -> dict[str, Any]:
        data = base64.b64encode(self.data).decode("ascii")
        body = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "data": data}
        return {**body, **_strides_json(self.strides)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Constant:
        strides = _strides(body)["strides"]
        shape = tuple(body["shape"])
        check_form(body["name"], body["dtype"], shape, strides)
        constant = cls(body["name"], body["dtype"], shape, base64.b64decode(body["data"]), strides)
        wanted_bytes = math.prod(constant.shape) * dtype_of(constant.dtype).itemsize
        if len(constant.data) != wanted_bytes:
            raise ValueError(
                f"the constant {constant.name!r} has {len(constant.data)} bytes, its shape needs "
                f"{wanted_bytes}"
            )
        return constant


@dataclass(frozen=True)
class StageProgram:
    """Everything a worker needs to know to run one stage's forward and backward.

    Attributes
    ----------
    stage, num_stages : int
    symbols : tuple[str, ...]
        Sizes that differ from batch to batch; their values come with every task.
    loss : str | None
        Name of the scalar to minimise, in the stage that computes it.
    numbers : tuple of str
        Values that come with every micro-batch as numbers, see `Microbatch`.
    """

    stage: int
    num_stages: int
    symbols: tuple[str, ...]
    inputs: tuple[StageInput, ...]
    outputs: tuple[StageOutput, ...]
    parameters: tuple[ParameterUse, ...]
    buffers: tuple[BufferUse, ...]
    constants: tuple[Constant, ...]
    nodes: tuple[Node, ...]
    loss: str | None = None
    numbers: tuple[str, ...] = ()

    @cached_property
    def mutated_buffers(self) -> tuple[str, ...]:
        return tuple(use.buffer for use in self.buffers if use.mutated)

    @cached_property
    def owned_parameters(self) -> tuple[ParameterUse, ...]:
        """One use for each parameter that this stage updates."""
        owned: dict[str, ParameterUse] = {}
        for use in self.parameters:
            if use.owner == self.stage:
                owned.setdefault(use.parameter, use)
        return tuple(owned.values())

    @cached_property
    def held_parameters(self) -> tuple[ParameterUse, ...]:
        """One use for each parameter that this stage reads from the run's snapshots.

        Its own, and frozen ones of others: what never changes needn't be lent.
        """
        held = {use.parameter: use for use in self.owned_parameters}
        for use in self.parameters:
            if not use.trainable:
                held.setdefault(use.parameter, use)
        return tuple(held.values())

    @cached_property
    def multiplies_weights(self) -> bool:
        """Whether an operator is a product with a trainable parameter."""
        trainable = {use.value for use in self.parameters if use.trainable}
        return any(multiplies(node) and trainable & set(node.references()) for node in self.nodes)

    @cached_property
    def lenders(self) -> tuple[int, ...]:
        """Stages that own and update parameters which this stage uses, too, ascending."""
        return tuple(sorted({use.owner for use in self.parameters if use.trainable} - {self.stage}))

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Stages whose boundary values this stage reads, ascending."""
        return tuple(sorted({i.source for i in self.inputs if i.source is not None}))

    @cached_property
    def batch_inputs(self) -> tuple[str, ...]:
        return tuple(i.value.name for i in self.inputs if i.source is None)

    @cached_property
    def gradient_sources(self) -> tuple[int, ...]:
        """Stages whose backward results this stage's backward needs, ascending.

        Each value's gradient comes from the next stage that reads it, complete with those of
        later readers.
        """
        later = {i.gradient_from for i in self.inputs if i.gradient_from is not None}
        return tuple(sorted(later | {o.readers[0] for o in self.outputs if o.differentiable}))

    def values_from(self, source: int) -> list[str]:
        """Return the boundary values that this stage reads from another."""
        return [i.value.name for i in self.inputs if i.source == source]

    def values_for(self, reader: int) -> list[str]:
        """Return the boundary values that another stage reads."""
        return [output.value.name for output in self.outputs if reader in output.readers]

    def gradients_from(self, source: int) -> list[str]:
        """Return the values whose gradients another stage's backward sends to this one."""
        names = [o.value.name for o in self.outputs if o.differentiable and o.readers[0] == source]
        return names + [i.value.name for i in self.inputs if i.gradient_from == source]

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "num_stages": self.num_stages,
            "symbols": list(self.symbols),
            "inputs": [
                {
                    **i.value.to_json(),
                    "source": i.source,
                    "gradient_from": i.gradient_from,
                    "differentiable": i.differentiable,
                }
                for i in self.inputs
            ],
            "outputs": [
                {
                    **o.value.to_json(),
                    "readers": list(o.readers),
                    "differentiable": o.differentiable,
                }
                for o in self.outputs
            ],
            "parameters": [
                {
                    "value": p.value,
                    "parameter": p.parameter,
                    "dtype": p.dtype,
                    "shape": list(p.shape),
                    "trainable": p.trainable,
                    "owner": p.owner,
                    **_strides_json(p.strides),
                }
                for p in self.parameters
            ],
            "buffers": [
                {
                    "value": b.value,
                    "buffer": b.buffer,
                    "dtype": b.dtype,
                    "shape": list(b.shape),
                    "mutated": b.mutated,
                    "owner": b.owner,
                    **_strides_json(b.strides),
                }
                for b in self.buffers
            ],
            "constants": [constant.to_json() for constant in self.constants],
            "nodes": [node.to_json() for node in self.nodes],
            "loss": self.loss,
        }
        if self.numbers:  # else as it was before there were any
            body["numbers"] = list(self.numbers)
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> StageProgram:
        """Read a stage program and check it.

        Raises
        ------
        ProgramInvalid
            If it isn't a complete program, or a node reads a value that nothing defines.
        ProgramTooNew
            If a newer dagflow wrote it.
        OperatorNotAllowed
            If a node names an operator outside the allow-list.
        """
        body = read_format(text, FORMAT, FORMAT_VERSION)
        try:
            program = cls(
                stage=body["stage"],
                num_stages=body["num_stages"],
                symbols=tuple(body["symbols"]),
                inputs=tuple(
                    StageInput(
                        ValueSpec.from_json(i), i["source"], i["gradient_from"], i["differentiable"]
                    )
                    for i in body["inputs"]
                ),
                outputs=tuple(
                    StageOutput(ValueSpec.from_json(o), tuple(o["readers"]), o["differentiable"])
                    for o in body["outputs"]
                ),
                parameters=tuple(ParameterUse(**_form(p)) for p in body["parameters"]),
                buffers=tuple(BufferUse(**_form(b)) for b in body["buffers"]),
                constants=tuple(Constant.from_json(c) for c in body["constants"]),
                nodes=tuple(Node.from_json(node) for node in body["nodes"]),
                loss=body["loss"],
                numbers=tuple(body.get("numbers", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProgramInvalid(
                f"This stage program is incomplete or damaged: {type(error).__name__}: {error}."
            ) from error
        loss = [program.loss] if program.loss is not None else []
        check_texts((*program.symbols, *program.numbers, *loss))
        check_nodes(program.nodes, program.defined_values(), program.symbols)
        for spec in (*(i.value for i in program.inputs), *(o.value for o in program.outputs)):
            for size in spec.shape:
                check_size(size, program.symbols)
        computed = {node.name for node in program.nodes}
        results = [output.value.name for output in program.outputs]
        for name in (*results, *loss):
            if name not in computed:
                raise ProgramInvalid(f"This stage program returns {name!r} but doesn't compute it.")
        return program

    def defined_values(self) -> set[str]:
        """Names that are defined before the first node runs."""
        return {
            *(i.value.name for i in self.inputs),
            *(use.value for use in self.parameters),
            *(use.value for use in self.buffers),
            *(constant.name for constant in self.constants),
            *self.numbers,
        }


def _strides_json(strides: tuple[int, ...] | None) -> dict[str, Any]:
    """Say strides where they are odd only: what is contiguous reads as it did before they were said."""
    return {} if strides is None else {"strides": list(strides)}


def _strides(body: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    found = body.get("strides")
    return {"strides": None if found is None else tuple(found)}


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a parameter's or buffer's use, its form checked."""
    fields = {**body, "shape": tuple(body["shape"]), **_strides(body)}
    check_form(fields["value"], fields["dtype"], fields["shape"], fields["strides"])
    return fields


# The most that any part of a program has. Zoo's programs have up to a thousand nodes and half a megabyte;
# a model of a hundred layers that is unrolled over hundreds of steps stays below these, too.
MOST_NODES, MOST_DIMS = 200_000, 64
_LIMITS = JsonLimits(num_bytes=1 << 31, depth=256, num_values=16_000_000)


def read_format(text: str, expected: str, version: int) -> dict[str, Any]:
    """Parse JSON that begins with a format name and version, and refuse anything else."""
    try:
        body = parse_json(text, _LIMITS, finite=False)  # masks are filled with -inf
    except JsonRefused as error:
        raise ProgramInvalid(f"Not a {expected} file: it isn't JSON ({error}).") from error
    found = body.get("format") if isinstance(body, dict) else None
    if found != expected:
        raise ProgramInvalid(f"Not a {expected} file: its format is {found!r:.80}.")
    if type(body.get("format_version")) is not int:
        raise ProgramInvalid(f"This {expected} doesn't say its format version.")
    if body["format_version"] > version:
        raise ProgramTooNew(
            f"This {expected} has format version {body['format_version']}; this dagflow reads up "
            f"to {version}. Upgrade dagflow on this machine."
        )
    return dict(body)


def check_nodes(nodes: Sequence[Node], defined: set[str], symbols: Collection[str]) -> None:
    """Refuse unknown operators, what are no arguments, and values that don't exist yet."""
    if len(nodes) > MOST_NODES:
        raise ProgramInvalid(f"A program has {len(nodes)} nodes, and may have {MOST_NODES}.")
    known = set(defined)
    sizes = frozenset(symbols)
    for node in nodes:
        if not is_allowed(node.op):
            raise OperatorNotAllowed(
                f"Node {node.name!r} names the operator {node.op!r:.80}, which is not on the "
                "allow-list of dagflow programs (dagflow_tasks/program/allowed_operators.toml)."
            )
        for argument in (*node.args, *node.kwargs.values()):
            check_argument(argument, sizes)
        for name in node.references():
            if name not in known:
                raise ProgramInvalid(
                    f"Node {node.name!r} ({node.op}) reads {name!r}, which nothing before it "
                    "defines."
                )
        if node.name in known:
            raise ProgramInvalid(f"Two values of a program are named {node.name!r}.")
        known.add(node.name)


def check_texts(found: Iterable[Any]) -> None:
    for text in found:
        if not isinstance(text, str):
            raise ProgramInvalid(f"A program has {text!r:.80} where a name belongs.")


def check_dims(name: Any, shape: Sequence[Any]) -> None:
    """Refuse a value's name that is none, and a shape of too many dimensions."""
    check_texts([name])
    if len(shape) > MOST_DIMS:
        raise ProgramInvalid(
            f"The value {name!r} has {len(shape)} dimensions; torch has {MOST_DIMS}."
        )


def check_form(name: Any, dtype: Any, shape: Sequence[Any], strides: Sequence[Any] | None) -> None:
    """Refuse a tensor's form that none can have: sizes and strides are whole numbers from 0 on.

    Raises
    ------
    ProgramInvalid
    """
    check_dims(name, shape)
    dtype_of(dtype)
    numbers = [*shape, *(strides or ())]
    whole = all(type(number) is int and 0 <= number < LIMIT for number in numbers)
    if not whole or (strides is not None and not _is_near(shape, strides)):
        raise ProgramInvalid(
            f"The value {name!r} can't have the shape {list(shape)!r:.200} with strides "
            f"{strides!r:.200}."
        )


# Elements that a tensor's strides may reach over: a slice of something wider leaves gaps.
_WIDEST, _WIDER = 1 << 26, 64


def _is_near(shape: Sequence[int], strides: Sequence[int]) -> bool:
    if len(strides) != len(shape):
        return False
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    return reach < max(_WIDEST, _WIDER * math.prod(shape))
