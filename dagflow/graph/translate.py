"""Translates an exported program into an operator DAG: names, arguments, shapes, costs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dagflow.errors import CaptureFailed, DagflowError
from dagflow.graph.autocasts import devices_of
from dagflow.graph.dag import (
    Buffer,
    Condition,
    OperatorDag,
    OperatorInfo,
    Parameter,
    Symbol,
    buffer_value,
)
from dagflow.graph.data_sizes import (
    DataSizes,
    are_of_data,
    number_in_tensor,
    puts_at_rows,
    takes_numbers_in_tensors,
)
from dagflow.graph.flops import is_view, operator_flops
from dagflow.graph.fx_nodes import (
    _RANGE_CHECKS,
    SYMBOLIC,
    bytes_of,
    is_dropout_off,
    is_node,
    is_number,
    is_unread_selection,
    symbolic_sizes,
)
from dagflow.graph.origins import Origin, _place, depends_on_data, not_allowed, origin_of
from dagflow.graph.sharing import check_sharing
from dagflow.graph.sizes import Decision, SizeUnknown, SizeWriter, conditions
from dagflow.graph.whole import TRACED_AS
from dagflow.graph.writes import check_frozen, check_writes, early, read_from_copies, written
from dagflow_tasks.layout import odd_strides
from dagflow_tasks.program.nodes import Argument, Node, encode_literal
from dagflow_tasks.program.operators import is_allowed, mutated_arguments, storages
from dagflow_tasks.program.sizes import evaluate_size
from dagflow_tasks.program.stage_program import Constant, ValueSpec


def translate(
    exported: ExportedProgram,
    model: torch.nn.Module,
    inputs: Sequence[ValueSpec],
    batch_constants: Mapping[str, Any],
    *,
    scalar: bool = True,
    decisions: Sequence[Decision] = (),
) -> OperatorDag:
    """Build the operator DAG of an exported module whose model is its child `model`.

    Parameters
    ----------
    scalar : bool
        Whether the result is a loss; a decoder's logits otherwise. Either is the DAG's `loss`.
    decisions
        What the model's code decided by sizes while it was traced.
    """
    translator = _Translator(exported, model, inputs, batch_constants, scalar, decisions)
    try:
        dag = translator.dag()
    except DagflowError:
        raise
    except Exception as error:
        raise CaptureFailed(
            f"The model's graph can't be written as a program: {type(error).__name__}: {error}. "
            f"{translator.origin} What to do: write that line with plain operators of torch."
        ) from error
    check_writes(dag)
    if scalar:
        check_frozen(dag)
        check_sharing(model, written(dag), _named_constants(exported))
    return dag


def _named_constants(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return the graph's constants by the attributes' names, or the tracer's names if none."""
    return {
        name.removeprefix("model."): constant
        for name, constant in exported.constants.items()
        if isinstance(constant, torch.Tensor)
    }


@dataclass(frozen=True)
class _Setting:
    """Flags of the nodes in a region of the model's code."""

    grad: bool = True
    autocast: bool = True
    autocast_dtype: str = ""


class _Translator:
    def __init__(
        self,
        exported: ExportedProgram,
        model: torch.nn.Module,
        inputs: Sequence[ValueSpec],
        batch_constants: Mapping[str, Any],
        scalar: bool,
        decisions: Sequence[Decision],
    ) -> None:
        self.scalar = scalar
        self.decisions = decisions
        self.exported = exported
        self.model = model
        self.inputs = inputs
        self.batch_constants = dict(batch_constants)
        self.environment: dict[torch.fx.Node, Any] = {}
        self.sizes = SizeWriter(nodes=self.environment)
        self.of_data = DataSizes(exported.graph_module, _place, self.sizes.of_value)
        # What is known of results may be an estimate; what operators are given must be known.
        self.shapes = replace(self.sizes, estimates=self.of_data.estimates)
        self.symbols: dict[str, Symbol] = {}
        self.uses: dict[str, list[str]] = {}
        self.nodes: list[Node] = []
        self.info: dict[str, OperatorInfo] = {}
        # Where rows are selected whose number data decides, by what is computed of them.
        self.selected: dict[str, Origin] = {}
        self.constants: list[Constant] = []
        self.canonical, self.aliases = _tied_names(model)
        self.devices = devices_of(model)  # regions of autocast are for one kind of device
        self.buffer_names: list[str] = []
        self.origin = Origin("", "", "none yet")

    def dag(self) -> OperatorDag:
        specs = self._placeholders()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self._call(node, "", _Setting())
        self._without_unread_rows()
        self._read_from_copies()
        self.nodes = early(self.nodes)
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
            conditions=self._conditions(),
        )

    def _placeholders(self) -> list[ValueSpec]:
        graph_nodes = {node.name: node for node in self.exported.graph.nodes}
        batch = iter(self.inputs)
        given: list[tuple[ValueSpec, torch.Tensor]] = []
        for spec in self.exported.graph_signature.input_specs:
            node = graph_nodes[spec.arg.name]
            target = str(spec.target or "").removeprefix("model.")
            if spec.kind == InputKind.USER_INPUT:
                given.append((next(batch), node.meta["val"]))
                self.environment[node] = given[-1][0].name
            elif spec.kind == InputKind.PARAMETER:
                self.environment[node] = ("parameter", self.canonical[target])
            elif spec.kind == InputKind.BUFFER:
                name = self.canonical.get(target, target)
                if name not in self.buffer_names:
                    self.buffer_names.append(name)
                self.environment[node] = buffer_value(name)
            else:
                self.environment[node] = self._constant(self.exported.constants[str(spec.target)])
        for value, traced in given:
            for dim, size in enumerate(traced.shape):
                self._open_size(size, value.name, dim, value.shape[dim])
        return [
            ValueSpec(value.name, value.dtype, self._input_shape(value.name, traced))
            for value, traced in given
        ]

    def _open_size(self, size: Any, input_name: str, dim: int, hint: int) -> None:
        """Make a symbol of a dimension that torch has left open."""
        if isinstance(size, int) or not size.node.expr.is_symbol:
            return
        expression = size.node.expr
        name = str(expression)
        if name not in self.symbols:
            bounds = self.exported.range_constraints.get(expression)
            upper = None if bounds is None or not bounds.upper.is_Integer else int(bounds.upper)
            lower = 2 if bounds is None else int(bounds.lower)
            self.symbols[name] = Symbol(name, input_name, dim, int(hint), lower, upper)
            self.sizes.symbols.add(name)

    def _input_shape(self, input_name: str, traced: torch.Tensor) -> tuple[Any, ...]:
        """Return an input's shape; sizes that follow from others' are expressions over these."""
        try:
            return tuple(self.sizes.of_value(size) for size in traced.shape)
        except SizeUnknown as error:
            raise CaptureFailed(
                f"A dimension of {input_name.removeprefix('in.')!r} must be {error} for this model, "
                "which no other size of the batch gives. Pass dynamic={...} to fix one of them."
            ) from error

    def _conditions(self) -> tuple[Condition, ...]:
        sizes = [s for spec in self.exported.graph.nodes for s in symbolic_sizes(spec)]
        environment = sizes[0].node.shape_env if sizes else None
        try:
            return conditions(environment, list(self.decisions), self.sizes)
        except SizeUnknown as error:
            raise CaptureFailed(
                f"The model's code decides by {error}, which can't be checked for other batches. "
                "What to do: pass dynamic={'tensor': []} to fix the tensor's sizes to those of the "
                "example batch."
            ) from error

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

    def _call(self, node: torch.fx.Node, prefix: str, setting: _Setting) -> None:
        name = prefix + node.name
        target = str(getattr(node.target, "__name__", node.target))
        if "wrap_with_set_grad_enabled" in target:
            enabled, region, *operands = node.args
            grad = setting.grad and bool(enabled)
            self._region(node, region, operands, name, replace(setting, grad=grad))
            return
        if "wrap_with_autocast" in target:
            device, dtype, enabled, _, region, *operands = node.args
            if device not in self.devices:
                autocast = setting  # which has no effect here, as in the model itself
            else:
                own = str(dtype).removeprefix("torch.") if enabled else ""
                autocast = replace(setting, autocast=bool(enabled), autocast_dtype=own)
            self._region(node, region, operands, name, autocast)
            return
        if node.target is operator.getitem:
            source, index = cast("tuple[torch.fx.Node, int]", node.args)
            if isinstance(self.environment.get(source), tuple):  # a region's results
                self.environment[node] = self.environment[source][index]
                return
        if is_number(node) or any(word in target for word in _RANGE_CHECKS):
            return  # sizes are carried as expressions where they are used
        if is_unread_selection(node):
            return
        if is_dropout_off(node):
            self.environment[node] = self.environment[cast("torch.fx.Node", node.args[0])]
            return
        self._operator(node, name, setting)

    def _region(
        self,
        node: torch.fx.Node,
        region: Any,
        operands: Sequence[Any],
        prefix: str,
        setting: _Setting,
    ) -> None:
        """Inline a region's nodes; its settings become flags of its nodes."""
        graph_module = getattr(node.graph.owning_module, region.target)
        placeholders = [inner for inner in graph_module.graph.nodes if inner.op == "placeholder"]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            self.environment[placeholder] = self.environment.get(operand, operand)
        for inner in graph_module.graph.nodes:
            if inner.op == "call_function":
                self._call(inner, f"{prefix}__", setting)
            elif inner.op == "output":
                # A size that a region returns is the node that computes it.
                results = inner.args[0]
                self.environment[node] = tuple(self.environment.get(r, r) for r in results)

    def _operator(self, node: torch.fx.Node, name: str, setting: _Setting) -> None:
        op = "getitem" if node.target is operator.getitem else str(node.target)
        op = TRACED_AS.get(op, op)
        self.origin = origin = origin_of(node, op)
        if not is_allowed(op):
            raise not_allowed(op, origin)
        self.of_data.learn(node)
        given = self._with_tensors(node.args) if takes_numbers_in_tensors(op) else node.args
        args = tuple(self._argument(argument, origin) for argument in given)
        kwargs = {
            key: self._argument(value, origin)
            for key, value in node.kwargs.items()
            if key != "pin_memory"
        }
        outputs = self._outputs(node.meta.get("val"), origin)
        self.environment[node] = name
        flags = (setting.grad, setting.autocast, origin.module, setting.autocast_dtype)
        self.nodes.append(Node(name, op, args, kwargs, *flags))
        self.info[name] = self._info(node, outputs, origin)
        self._check_rows(self.nodes[-1], origin)

    def _without_unread_rows(self) -> None:
        """Leave out what data selects and nobody reads: lists of experts that were hit, above all."""
        kept: list[Node] = []
        read: set[str] = set()
        for node in reversed(self.nodes):
            is_index = node.name in self.selected and all(
                "int" in dtype for dtype, _ in self.info[node.name].outputs
            )
            if is_index and node.name not in read and not mutated_arguments(node):
                del self.info[node.name]
                continue
            read.update(node.references())
            kept.append(node)
        self.nodes = kept[::-1]

    def _with_tensors(self, arguments: Any) -> Any:
        """Return arguments with numbers that are read out of tensors as these tensors."""
        if isinstance(arguments, (list, tuple)):
            return [self._with_tensors(argument) for argument in arguments]
        inner = self.environment.get(arguments, arguments) if is_node(arguments) else arguments
        return number_in_tensor(inner) or arguments

    def _check_rows(self, node: Node, origin: Origin) -> None:
        """Refuse what is computed of rows that data selects, and isn't put back at rows."""
        outputs = self.info[node.name].outputs
        selected = [self.selected[name] for name in node.references() if name in self.selected]
        if are_of_data(outputs):
            self.selected[node.name] = selected[0] if selected else origin
        elif selected and outputs and not puts_at_rows(node.op):
            number = f"of rows that {origin.op} ({origin.source}) gets"
            raise depends_on_data(number, selected[0])

    def _argument(self, argument: Any, origin: Origin) -> Argument:
        if isinstance(argument, torch.fx.Node):
            if is_number(argument):
                return self._size(lambda: self.sizes.of_node(argument), origin)
            return self._reference(self.environment[argument])
        if isinstance(argument, (list, tuple)):
            return [self._argument(item, origin) for item in argument]
        if isinstance(argument, SYMBOLIC):
            return self._size(lambda: self.sizes.of_value(argument), origin)
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

    def _size(self, write: Callable[[], Any], origin: Origin) -> Argument:
        expression = self._written(write, origin)
        plain = isinstance(expression, (bool, int, float))
        return encode_literal(expression) if plain else {"size": expression}

    def _written(self, write: Callable[[], Any], origin: Origin) -> Any:
        try:
            return write()
        except SizeUnknown as error:
            if error.depends_on_data:
                raise depends_on_data(str(error), origin) from error
            raise CaptureFailed(
                f"The size {error} can't be written in a program. {origin} What to do: pass "
                "dynamic={'tensor': []} to fix the tensor's sizes to those of the example batch."
            ) from error

    # What is known of an operator

    def _outputs(self, value: Any, origin: Origin) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        tensors = [value] if isinstance(value, torch.Tensor) else list(value or ())
        return tuple(
            (
                str(tensor.dtype).removeprefix("torch."),
                tuple(
                    self._written(partial(self.shapes.of_value, size), origin)
                    for size in tensor.shape
                ),
            )
            for tensor in tensors
            if isinstance(tensor, torch.Tensor)
        )

    def _info(self, node: torch.fx.Node, outputs: Any, origin: Origin) -> OperatorInfo:
        def concrete(item: Any) -> Any:
            if isinstance(item, torch.fx.Node):
                return concrete(item.meta.get("val"))
            if isinstance(item, torch.Tensor):
                shape = [self._hint(size, origin) for size in item.shape]
                return torch.empty(shape, dtype=item.dtype, device="meta")
            if isinstance(item, SYMBOLIC):
                return self._hint(item, origin)
            if isinstance(item, (list, tuple)):
                return [concrete(element) for element in item]
            return torch.device("meta") if isinstance(item, torch.device) else item

        args = [concrete(argument) for argument in node.args]
        kwargs = {key: concrete(value) for key, value in node.kwargs.items()}
        result = concrete(node.meta.get("val"))
        flops = operator_flops(origin.op, args, kwargs, result)
        moved = 0 if is_view(origin.op) else bytes_of([args, list(kwargs.values()), result])
        return OperatorInfo(outputs, flops, moved, origin.source)

    def _hint(self, size: Any, origin: Origin) -> Any:
        hints = {symbol.name: symbol.hint for symbol in self.symbols.values()}
        return evaluate_size(self._written(lambda: self.shapes.of_value(size), origin), hints)

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
                    odd_strides(tensor),
                )
            )
        return tuple(found)

    def _read_from_copies(self) -> None:
        trained = {
            use
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            for use in self.uses.get(name, ())
        }
        self.nodes, copies = read_from_copies(self.nodes, trained)
        for name in self.buffer_names:
            for copy in (c for c, value in copies.items() if value == buffer_value(name)):
                tensor = self.model.get_buffer(name)
                dtype = str(tensor.dtype).removeprefix("torch.")
                outputs = ((dtype, tuple(tensor.shape)),)
                self.info[copy] = OperatorInfo(outputs, 0, 2 * bytes_of(tensor), "")

    def _buffer(self, name: str, mutated: bool) -> Buffer:
        tensor = self.model.get_buffer(name)
        owner, _, leaf = name.rpartition(".")
        persistent = leaf not in self.model.get_submodule(owner)._non_persistent_buffers_set
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Buffer(name, dtype, tuple(tensor.shape), persistent, mutated, odd_strides(tensor))

    def _mutated_buffers(self) -> set[str]:
        root = storages(self.nodes)
        written = {root.get(name, name) for node in self.nodes for name in mutated_arguments(node)}
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
