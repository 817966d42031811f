"""Translates an exported program into an operator DAG: names, arguments, shapes, costs."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from dagflow.errors import CaptureFailed
from dagflow.graph.dag import (
    Buffer,
    OperatorDag,
    OperatorInfo,
    Parameter,
    Symbol,
    buffer_value,
    dtype_bytes,
)
from dagflow.graph.flops import is_view, operator_flops
from dagflow_tasks.operators import (
    Argument,
    Node,
    encode_literal,
    evaluate_size,
    is_allowed,
    mutated_arguments,
)
from dagflow_tasks.program import Constant, ValueSpec

# Nodes that only say what the ranges of the symbols say already.
_RANGE_CHECKS = ("sym_constrain_range", "_assert_scalar", "sym_constrain_range_for_size")


def translate(
    exported: ExportedProgram,
    model: torch.nn.Module,
    inputs: Sequence[ValueSpec],
    batch_constants: Mapping[str, Any],
    *,
    scalar: bool = True,
) -> OperatorDag:
    """Build the operator DAG of an exported module whose model is its child `model`.

    Parameters
    ----------
    scalar : bool
        Whether the result is a loss; a decoder's logits otherwise. Either is the DAG's `loss`.
    """
    return _Translator(exported, model, inputs, batch_constants, scalar).dag()


@dataclass(frozen=True)
class _Origin:
    """Where in the model's code an operator comes from."""

    module: str
    source: str
    op: str

    def __str__(self) -> str:
        module = self.module or "the model itself"
        return f"Module: {module!r}. Source: {self.source or 'unknown'}. Operator: {self.op}."


class _Translator:
    def __init__(
        self,
        exported: ExportedProgram,
        model: torch.nn.Module,
        inputs: Sequence[ValueSpec],
        batch_constants: Mapping[str, Any],
        scalar: bool,
    ) -> None:
        self.scalar = scalar
        self.exported = exported
        self.model = model
        self.inputs = inputs
        self.batch_constants = dict(batch_constants)
        self.environment: dict[torch.fx.Node, Any] = {}
        self.symbols: dict[str, Symbol] = {}
        self.uses: dict[str, list[str]] = {}
        self.nodes: list[Node] = []
        self.info: dict[str, OperatorInfo] = {}
        self.constants: list[Constant] = []
        self.canonical, self.aliases = _tied_names(model)
        self.buffer_names: list[str] = []

    def dag(self) -> OperatorDag:
        specs = self._placeholders()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self._call(node, "", grad=True, autocast=True)
        loss = self._loss()
        mutated = self._mutated_buffers()
        return OperatorDag(
            symbols=tuple(self.symbols.values()),
            inputs=tuple(specs),
            parameters=self._parameters(),
            buffers=tuple(self._buffer(name, name in mutated) for name in self.buffer_names),
            constants=tuple(self.constants),
            nodes=tuple(self.nodes),
            info=self.info,
            loss=loss,
            batch_constants=self.batch_constants,
        )

    def _placeholders(self) -> list[ValueSpec]:
        graph_nodes = {node.name: node for node in self.exported.graph.nodes}
        batch = iter(self.inputs)
        specs = []
        for spec in self.exported.graph_signature.input_specs:
            node = graph_nodes[spec.arg.name]
            target = str(spec.target or "").removeprefix("model.")
            if spec.kind == InputKind.USER_INPUT:
                given = next(batch)
                shape = tuple(
                    self._input_size(size, given.name, dim, given.shape[dim])
                    for dim, size in enumerate(node.meta["val"].shape)
                )
                specs.append(ValueSpec(given.name, given.dtype, shape))
                self.environment[node] = given.name
            elif spec.kind == InputKind.PARAMETER:
                self.environment[node] = ("parameter", self.canonical[target])
            elif spec.kind == InputKind.BUFFER:
                name = self.canonical.get(target, target)
                if name not in self.buffer_names:
                    self.buffer_names.append(name)
                self.environment[node] = buffer_value(name)
            else:
                self.environment[node] = self._constant(self.exported.constants[str(spec.target)])
        return specs

    def _input_size(self, size: Any, input_name: str, dim: int, hint: int) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        name = str(expression)
        if not expression.is_symbol:
            raise CaptureFailed(
                f"Dimension {dim} of {input_name.removeprefix('in.')!r} must be {expression} for "
                "this model; sizes of the batch that depend on each other aren't supported. Pass "
                "dynamic={...} to fix one of them."
            )
        if name not in self.symbols:
            bounds = self.exported.range_constraints.get(expression)
            upper = None if bounds is None or not bounds.upper.is_Integer else int(bounds.upper)
            lower = 2 if bounds is None else int(bounds.lower)
            self.symbols[name] = Symbol(name, input_name, dim, int(hint), lower, upper)
        return name

    def _constant(self, tensor: torch.Tensor) -> str:
        name = f"c.{len(self.constants)}"
        if tensor.is_meta and tensor.numel():
            raise CaptureFailed(
                f"The model computes with a constant of shape {list(tensor.shape)} that is on the "
                "meta device and so has no value. Build the model under dagflow.empty_weights(), "
                "which leaves all but parameters real."
            )
        self.constants.append(
            Constant.of(
                name, tensor if not tensor.is_meta else torch.empty_like(tensor, device="cpu")
            )
        )
        return name

    # Nodes

    def _call(self, node: torch.fx.Node, prefix: str, *, grad: bool, autocast: bool) -> None:
        name = prefix + node.name
        target = str(getattr(node.target, "__name__", node.target))
        if "wrap_with_set_grad_enabled" in target:
            enabled, region, *operands = node.args
            self._region(node, region, operands, name, grad and bool(enabled), autocast)
            return
        if "wrap_with_autocast" in target:
            _, _, enabled, _, region, *operands = node.args
            self._region(node, region, operands, name, grad, autocast and bool(enabled))
            return
        if node.target is operator.getitem:
            source, index = cast("tuple[torch.fx.Node, int]", node.args)
            if isinstance(self.environment.get(source), tuple):  # a region's results
                self.environment[node] = self.environment[source][index]
                return
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat, int)) or any(
            word in target for word in _RANGE_CHECKS
        ):
            return  # sizes are carried as expressions where they are used
        self._operator(node, name, grad, autocast)

    def _region(
        self,
        node: torch.fx.Node,
        region: Any,
        operands: Sequence[Any],
        prefix: str,
        grad: bool,
        autocast: bool,
    ) -> None:
        """Inline a region's nodes; its settings become flags of its nodes."""
        graph_module = getattr(node.graph.owning_module, region.target)
        placeholders = [inner for inner in graph_module.graph.nodes if inner.op == "placeholder"]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            self.environment[placeholder] = self.environment.get(operand, operand)
        for inner in graph_module.graph.nodes:
            if inner.op == "call_function":
                self._call(inner, f"{prefix}__", grad=grad, autocast=autocast)
            elif inner.op == "output":
                results = inner.args[0]
                self.environment[node] = tuple(self.environment[result] for result in results)

    def _operator(self, node: torch.fx.Node, name: str, grad: bool, autocast: bool) -> None:
        op = "getitem" if node.target is operator.getitem else str(node.target)
        origin = _origin(node, op)
        if not is_allowed(op):
            raise CaptureFailed(
                f"The model calls {op}, which is not on the allow-list of operators that workers "
                f"run. {origin} What to do: write it with ATen operators (torch.* and "
                "torch.nn.functional.*)."
            )
        args = tuple(self._argument(argument, origin) for argument in node.args)
        kwargs = {
            key: self._argument(value, origin)
            for key, value in node.kwargs.items()
            if key != "pin_memory"
        }
        outputs = self._outputs(node.meta.get("val"), origin)
        self.environment[node] = name
        self.nodes.append(Node(name, op, args, kwargs, grad, autocast, origin.module))
        self.info[name] = self._info(node, outputs, origin)

    def _argument(self, argument: Any, origin: _Origin) -> Argument:
        if isinstance(argument, torch.fx.Node):
            value = argument.meta.get("val")
            if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
                return self._size(value, origin)
            return self._reference(self.environment[argument])
        if isinstance(argument, (list, tuple)):
            return [self._argument(item, origin) for item in argument]
        if isinstance(argument, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return self._size(argument, origin)
        try:
            return encode_literal(argument)
        except TypeError as error:
            raise CaptureFailed(
                f"The argument {argument!r:.80} can't be written in a program: {error}. {origin} "
                "What to do: make it a tensor."
            ) from error

    def _reference(self, value: Any) -> Argument:
        """Refer to a value; every reference to a parameter is a use of its own."""
        if isinstance(value, tuple) and value[0] == "parameter":
            uses = self.uses.setdefault(value[1], [])
            uses.append(f"p.{value[1]}" + (f"#{len(uses)}" if uses else ""))
            return {"ref": uses[-1]}
        return {"ref": value}

    def _size(self, size: Any, origin: _Origin) -> Argument:
        expression = self._expression(size.node.expr, origin)
        return expression if isinstance(expression, int) else {"size": expression}

    def _expression(self, expression: Any, origin: _Origin) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_symbol:
            if str(expression) in self.symbols:
                return str(expression)
            raise CaptureFailed(
                f"The number {expression} depends on the data, not on the batch's shape. {origin} "
                "What to do: use masks instead of selecting by value (nonzero, boolean indexing), "
                "and tensors instead of .item()."
            )
        operands = [self._expression(operand, origin) for operand in expression.args]
        for kind, operation in _OPERATIONS:
            if isinstance(expression, kind):
                return [operation, *operands]
        raise CaptureFailed(
            f"The size {expression} can't be written in a program. {origin} What to do: pass "
            "dynamic={'tensor': []} to fix the tensor's sizes to those of the example batch."
        )

    # What is known of an operator

    def _outputs(self, value: Any, origin: _Origin) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        tensors = [value] if isinstance(value, torch.Tensor) else list(value or ())
        return tuple(
            (
                str(tensor.dtype).removeprefix("torch."),
                tuple(
                    size if isinstance(size, int) else self._expression(size.node.expr, origin)
                    for size in tensor.shape
                ),
            )
            for tensor in tensors
            if isinstance(tensor, torch.Tensor)
        )

    def _info(self, node: torch.fx.Node, outputs: Any, origin: _Origin) -> OperatorInfo:
        def concrete(item: Any) -> Any:
            if isinstance(item, torch.fx.Node):
                return concrete(item.meta.get("val"))
            if isinstance(item, torch.Tensor):
                shape = [self._hint(size, origin) for size in item.shape]
                return torch.empty(shape, dtype=item.dtype, device="meta")
            if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return self._hint(item, origin)
            if isinstance(item, (list, tuple)):
                return [concrete(element) for element in item]
            return torch.device("meta") if isinstance(item, torch.device) else item

        args = [concrete(argument) for argument in node.args]
        kwargs = {key: concrete(value) for key, value in node.kwargs.items()}
        result = concrete(node.meta.get("val"))
        flops = operator_flops(origin.op, args, kwargs, result)
        moved = 0 if is_view(origin.op) else _bytes([args, list(kwargs.values()), result])
        return OperatorInfo(outputs, flops, moved, origin.source)

    def _hint(self, size: Any, origin: _Origin) -> int:
        if isinstance(size, int):
            return size
        hints = {symbol.name: symbol.hint for symbol in self.symbols.values()}
        return evaluate_size(self._expression(size.node.expr, origin), hints)

    # Parameters and buffers

    def _parameters(self) -> tuple[Parameter, ...]:
        found = []
        for name, tensor in self.model.named_parameters():
            found.append(
                Parameter(
                    name,
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    tensor.requires_grad,
                    tuple(self.uses.get(name, ())),
                    tuple(self.aliases.get(name, ())),
                )
            )
        return tuple(found)

    def _buffer(self, name: str, mutated: bool) -> Buffer:
        tensor = self.model.get_buffer(name)
        owner, _, leaf = name.rpartition(".")
        persistent = leaf not in self.model.get_submodule(owner)._non_persistent_buffers_set
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Buffer(name, dtype, tuple(tensor.shape), persistent, mutated)

    def _mutated_buffers(self) -> set[str]:
        written = {name for node in self.nodes for name in mutated_arguments(node)}
        return {name for name in self.buffer_names if buffer_value(name) in written}

    def _loss(self) -> str:
        output = next(node for node in self.exported.graph.nodes if node.op == "output")
        for value in output.args[0]:
            name = self.environment.get(value)
            if not isinstance(name, str) or name not in self.info:
                continue
            if not self.scalar or not self.info[name].outputs[0][1]:
                return name
        raise CaptureFailed("The model's result isn't computed by any operator: is it a constant?")


_OPERATIONS: tuple[tuple[Any, str], ...] = (
    (sympy.Add, "add"),
    (sympy.Mul, "mul"),
    (sympy.Pow, "pow"),
    (FloorDiv, "floordiv"),
    ((Mod, PythonMod, sympy.Mod), "mod"),
    ((Max, sympy.Max), "max"),
    ((Min, sympy.Min), "min"),
)


def _tied_names(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Map every name of a parameter or buffer to its first one, and first names to further ones."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        canonical[name] = first.setdefault(id(tensor), name)
        if canonical[name] != name:
            aliases.setdefault(canonical[name], []).append(name)
    return canonical, aliases


def _origin(node: torch.fx.Node, op: str) -> _Origin:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"^L\['self'\]\.?", "", path).removeprefix("model").removeprefix(".")
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    source = f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""
    return _Origin(path, source, op)


def _bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * dtype_bytes(str(tree.dtype).removeprefix("torch."))
    if isinstance(tree, (list, tuple)):
        return sum(_bytes(item) for item in tree)
    return 0
