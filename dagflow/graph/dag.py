"""The operator DAG: a model's forward pass and loss as a list of operators with known shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dagflow_tasks.errors import ProgramInvalid
from dagflow_tasks.program.nodes import Node, dtype_of
from dagflow_tasks.program.sizes import evaluate_size
from dagflow_tasks.program.stage_program import Constant, ValueSpec, check_nodes, read_format

FORMAT = "dagflow-operator-dag"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Symbol:
    """A size that may differ from batch to batch.

    Attributes
    ----------
    input, dim
        The batch's tensor and the dimension that show the size.
    hint : int
        The size in the example batch.
    minimum, maximum : int, int | None
        The range for which the captured operators are right.
    """

    name: str
    input: str
    dim: int
    hint: int
    minimum: int
    maximum: int | None


@dataclass(frozen=True)
class Condition:
    """What a batch's sizes must meet for the captured operators to be those of the model.

    Attributes
    ----------
    expression
        A size expression that is true then.
    source : str
        The line of the model's code that decides by it. Empty for what an operator assumed of its
        result's shape; if that isn't met, the shapes are worked out anew and compared.
    """

    expression: Any
    source: str = ""


@dataclass(frozen=True)
class FixedSize:
    """A size that was to be open and that the model has fixed.

    Attributes
    ----------
    source : str
        That line; empty where it isn't known.
    by_operator : bool
        Whether an operator that it calls takes this size only; it makes a number of it otherwise.
    """

    input: str
    dim: int
    source: str
    by_operator: bool = False

    @property
    def reason(self) -> str:
        """What fixed it, and what to do."""
        if self.by_operator:
            return (
                f"an operator{self.source and ' at '}{self.source} takes this size only "
                "(a table or a weight of that size, a number in view(), an unbind). What to do: "
                "write it with x.shape, slice the table to it."
            )
        return (
            f"{self.source} makes a plain number of it. What to write instead: x.shape[0] for "
            "len(x), the size T itself for int(T) or float(T) (T ** -0.5 for float(T) ** -0.5), "
            "torch.arange(T) for range(T) or numpy.arange(T), operators on whole tensors for a loop "
            "over them (nn.LSTM, nn.GRU for a loop over cells), or pad all batches to one length; "
            "where the size never changes, leave it out of dynamic={'tensor': [dims "
            "that vary]}."
        )


@dataclass(frozen=True)
class Parameter:
    """A parameter by its first name in the model; `aliases` are further names (tied weights).

    `strides` is None where it is contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool
    uses: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    strides: tuple[int, ...] | None = None

    @property
    def num_elements(self) -> int:
        return _product(self.shape)


@dataclass(frozen=True)
class Buffer:
    """A buffer; `mutated` if the forward pass writes it, `persistent` if state dicts hold it.

    `strides` is None where it is contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    persistent: bool
    mutated: bool
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OperatorInfo:
    """What is known of one operator without running it.

    Attributes
    ----------
    outputs : tuple of (dtype, shape)
        One for each tensor it returns; shapes hold ints and size expressions.
    flops : int
        Floating-point operations of the forward pass at the example batch's sizes.
    bytes : int
        Bytes read and written at those sizes; 0 for views.
    source : str
        File and line of the model's code.
    """

    outputs: tuple[tuple[str, tuple[Any, ...]], ...]
    flops: int
    bytes: int
    source: str = ""


@dataclass(frozen=True)
class OperatorDag:
    """A model's operators in execution order, from the batch's tensors to the loss.

    Knows neither devices nor dask. ``print`` shows a table by module, `to_graphviz` a picture,
    `save` and `load` go through JSON.

    Attributes
    ----------
    conditions : tuple of Condition
        What `dagflow.graph.signature.match_batch` checks of every batch besides its form.
    dropped_columns : tuple of str
        Entries of a batch that the model's forward doesn't take, and `match_batch` passes over.
    fixed_sizes : tuple of FixedSize
        Where the model's code has fixed a size, to name the line when a batch has another.
    fixed_values : mapping
        Whole numbers that an input must hold, as nested lists by its name: what the model's code has
        decided by them is in the graph.
    numbers : tuple of str
        Values that come with every micro-batch as numbers, see `dagflow.microbatches.loss_weight`.
    """

    symbols: tuple[Symbol, ...]
    inputs: tuple[ValueSpec, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    constants: tuple[Constant, ...]
    nodes: tuple[Node, ...]
    info: Mapping[str, OperatorInfo]
    loss: str
    batch_constants: Mapping[str, Any]
    conditions: tuple[Condition, ...] = ()
    dropped_columns: tuple[str, ...] = ()
    fixed_sizes: tuple[FixedSize, ...] = ()
    fixed_values: Mapping[str, Any] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()

    @cached_property
    def checked_sizes(self) -> dict[tuple[int, ...], str]:
        """Answers of the check of sizes so far: "" or what is wrong, by the symbols' values."""
        return {}

    @cached_property
    def hints(self) -> dict[str, int]:
        """Sizes of the example batch by symbol."""
        return {symbol.name: symbol.hint for symbol in self.symbols}

    @cached_property
    def total_flops(self) -> int:
        """FLOPs of one forward pass at the example batch's sizes."""
        return sum(info.flops for info in self.info.values())

    @cached_property
    def parameter_bytes(self) -> int:
        return sum(p.num_elements * dtype_bytes(p.dtype) for p in self.parameters)

    def output_bytes(self, node_name: str) -> int:
        """Bytes of a node's tensors at the example batch's sizes."""
        return sum(self.tensor_bytes(*output) for output in self.info[node_name].outputs)

    def tensor_bytes(self, dtype: str, shape: tuple[Any, ...]) -> int:
        return dtype_bytes(dtype) * _product(tuple(evaluate_size(d, self.hints) for d in shape))

    def __str__(self) -> str:
        from dagflow.graph.show import table

        return table(self)

    def to_graphviz(self, stages: Mapping[str, int] | None = None) -> str:
        """Return the DAG in Graphviz's DOT language, modules boxed, coloured by stage if given."""
        from dagflow.graph.show import dot

        return dot(self, stages or {})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> OperatorDag:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "torch": torch.__version__,
            "symbols": [vars(symbol) for symbol in self.symbols],
            "inputs": [spec.to_json() for spec in self.inputs],
            "parameters": [vars(parameter) for parameter in self.parameters],
            "buffers": [vars(buffer) for buffer in self.buffers],
            "constants": [constant.to_json() for constant in self.constants],
            "nodes": [
                {**node.to_json(), "info": vars(self.info[node.name])} for node in self.nodes
            ],
            "loss": self.loss,
            "batch_constants": dict(self.batch_constants),
            "conditions": [vars(condition) for condition in self.conditions],
            "dropped_columns": list(self.dropped_columns),
            "fixed_sizes": [vars(fixed) for fixed in self.fixed_sizes],
            "fixed_values": dict(self.fixed_values),
            "numbers": list(self.numbers),
        }
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> OperatorDag:
        """Read an operator DAG and check that only allowed operators are in it.

        Raises
        ------
        ProgramInvalid, ProgramTooNew, OperatorNotAllowed
        """
        body = read_format(text, FORMAT, FORMAT_VERSION)
        try:
            dag = cls._from_body(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProgramInvalid(
                f"This operator DAG is incomplete or damaged: {type(error).__name__}: {error}."
            ) from error
        check_nodes(dag.nodes, dag.defined_values(), [symbol.name for symbol in dag.symbols])
        return dag

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> OperatorDag:
        return cls(
            symbols=tuple(Symbol(**symbol) for symbol in body["symbols"]),
            inputs=tuple(ValueSpec.from_json(spec) for spec in body["inputs"]),
            parameters=tuple(Parameter(**_tuples(p)) for p in body["parameters"]),
            buffers=tuple(Buffer(**_tuples(b)) for b in body["buffers"]),
            constants=tuple(Constant.from_json(constant) for constant in body["constants"]),
            nodes=tuple(Node.from_json(node) for node in body["nodes"]),
            info={raw["name"]: _info_from_json(raw["info"]) for raw in body["nodes"]},
            loss=body["loss"],
            batch_constants=body["batch_constants"],
            conditions=tuple(Condition(**condition) for condition in body.get("conditions", ())),
            dropped_columns=tuple(body.get("dropped_columns", ())),
            fixed_sizes=tuple(FixedSize(**fixed) for fixed in body.get("fixed_sizes", ())),
            fixed_values=body.get("fixed_values", {}),
            numbers=tuple(body.get("numbers", ())),
        )

    def defined_values(self) -> set[str]:
        """Names that are defined before the first node runs."""
        return {
            *(spec.name for spec in self.inputs),
            *(use for parameter in self.parameters for use in parameter.uses),
            *(buffer_value(buffer.name) for buffer in self.buffers),
            *(constant.name for constant in self.constants),
            *self.numbers,
        }


def input_value(name: str) -> str:
    """Name of the value that holds the batch's tensor `name`."""
    return f"in.{name}"


def buffer_value(name: str) -> str:
    """Name of the value that holds a buffer."""
    return f"b.{name}"


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return dtype_of(dtype).itemsize


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _tuples(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}


def _info_from_json(body: Mapping[str, Any]) -> OperatorInfo:
    outputs = tuple((dtype, tuple(shape)) for dtype, shape in body["outputs"])
    return OperatorInfo(outputs, body["flops"], body["bytes"], body["source"])
