"""Runs a stage program's operators on one micro-batch.

The program is compiled once to a list of instructions over numbered slots, those that mention sizes
once more for every combination of these (size expressions become plain integers), and then executed
in order; a value is dropped after its last reader, so that memory follows the program's own needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from time import monotonic
from typing import Any

import torch

from dagflow_tasks.errors import LimitReached, TaskFailed
from dagflow_tasks.program.limits import DEFAULT_LIMITS, Limits, Watch
from dagflow_tasks.program.nodes import Argument, Node, decode_literal, dtype_of, mentions_size
from dagflow_tasks.program.operators import (
    ASSERTIONS,
    device_parameters,
    draws_random_numbers,
    multiplies,
    mutated_arguments,
    resolve,
    storages,
)
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.program.writes import parameter_writes

# Seeding torch's generator and drawing from it must not be torn apart by another thread of this
# process: whoever does either holds this.
RANDOM_LOCK = threading.Lock()

# Micro-batches have a few sizes, passes of sessions any: instructions are kept for the latest.
_MOST_SIZES = 64
# With how many forms of its inputs a program is known to take no more than it may.
_MOST_FORMS = 4096

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RandomAddress:
    """Where in a run random numbers are drawn: they depend on nothing else.

    With an operator's name, which the cut doesn't change, this addresses every random tensor of a
    run; a task that is run again, anywhere, draws the same numbers.
    """

    seed: int
    step: int
    microbatch: int

    def of(self, operator_name: str) -> int:
        """Return the 64-bit seed for one operator."""
        text = f"{self.seed}/{self.step}/{self.microbatch}/{operator_name}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Slot:
    index: int


@dataclass(slots=True)
class _Instruction:
    """One operator call, its arguments given but for those that are values.

    Attributes
    ----------
    arguments, keywords
        Templates.
    holes : tuple of (position, slot)
        Arguments that are values.
    nested, keyword_holes
        Arguments that are lists of values, and keywords that are either.
    plain : bool
        Whether nothing but the call is to be done.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    output: int
    free: tuple[int, ...]
    node: Node
    random: bool
    weights: frozenset[int]
    holes: tuple[tuple[int, int], ...] = field(init=False)
    nested: tuple[tuple[int, Any], ...] = field(init=False)
    keyword_holes: tuple[tuple[str, Any], ...] = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        templates = list(enumerate(self.arguments))
        self.holes = tuple((at, t.index) for at, t in templates if type(t) is _Slot)
        self.nested = tuple((at, t) for at, t in templates if type(t) is list and _has_slot(t))
        self.keyword_holes = tuple(h for h in self.keywords.items() if _has_slot(h[1]))
        node = self.node
        self.plain = node.grad and node.autocast and not node.autocast_dtype and not self.random

    def filled(self, slots: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the call."""
        arguments, keywords = self.arguments.copy(), self.keywords
        for position, index in self.holes:
            arguments[position] = slots[index]
        for position, template in self.nested:
            arguments[position] = _fill(template, slots)
        if self.keyword_holes:
            keywords = {**keywords, **{k: _fill(t, slots) for k, t in self.keyword_holes}}
        return arguments, keywords


def _fill(template: Any, slots: Sequence[Any]) -> Any:
    if type(template) is _Slot:
        return slots[template.index]
    if type(template) is list:
        return [_fill(item, slots) for item in template]
    return template


def _has_slot(template: Any) -> bool:
    return type(template) is _Slot or (type(template) is list and any(map(_has_slot, template)))


class Executable:
    """A stage program made ready to run on one device.

    Parameters
    ----------
    program : StageProgram
    device : torch.device
    precision : {"fp32", "bf16", "fp16"}
        Other than fp32, operators run under autocast with fp32 weights.
    limits : Limits
        Of the memory and the time that a run may take.
    """

    def __init__(
        self,
        program: StageProgram,
        device: torch.device,
        precision: str = "fp32",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.program = program
        self.limits = limits
        self.device = device
        self.precision = precision
        self.autocast_dtype = AUTOCAST_DTYPES.get(precision)
        self.constants = {c.name: c.tensor().to(device) for c in program.constants}
        self._nodes = [node for node in program.nodes if node.op not in ASSERTIONS]
        self._slots = {name: i for i, name in enumerate(sorted(program.defined_values()))}
        for node in self._nodes:
            self._slots[node.name] = len(self._slots)
        self._free = self._last_reads()
        self._draws = any(draws_random_numbers(node.op) for node in self._nodes)
        # Whatever a node writes, if only through a view of it.
        root = storages(self._nodes)
        written = {root.get(name, name) for n in self._nodes for name in mutated_arguments(n)}
        inputs = {i.value.name for i in program.inputs} | set(self.constants)
        self._written_inputs = [self._slots[name] for name in sorted(written & inputs)]
        self.written_parameters = frozenset(
            use.parameter for use in program.parameters if use.value in written
        )
        unwritten = {
            use.value for use in program.parameters if use.parameter not in self.written_parameters
        }
        # Parameters that autocast would cast in every micro-batch; each use has one reader.
        self.cast_uses = {
            name
            for node in self._nodes
            if node.autocast and not node.autocast_dtype and multiplies(node)
            for name in node.references()
        } & unwritten
        self._trainable = {use.value for use in program.parameters if use.trainable}
        # In the order of their last use.
        self._compiled: dict[tuple[int, ...], list[_Instruction]] = {}
        self._without_sizes: dict[str, _Instruction] = {}
        self._inputs = tuple(i.value.name for i in program.inputs)
        # What the program has been run with without taking too much.
        self._watched: dict[Hashable, None] = {}

    @cached_property
    def _writes(self) -> Executable:
        uses = {use.value: use for use in self.program.parameters}
        nodes = parameter_writes(self._nodes, uses)
        read = {name for node in nodes for name in node.references()}
        program = replace(
            self.program,
            symbols=(),
            inputs=(),
            outputs=(),
            parameters=tuple(use for name, use in uses.items() if name in read),
            buffers=tuple(use for use in self.program.buffers if use.value in read),
            constants=tuple(c for c in self.program.constants if c.name in read),
            nodes=tuple(nodes),
            loss=None,
        )
        return Executable(program, self.device, self.precision, self.limits)

    @torch.no_grad()
    def write_parameters(
        self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        """Do to a stage's parameters, by name, what its program writes into them in place."""
        if self.written_parameters:
            program = self._writes.program
            values = {use.value: parameters[use.parameter] for use in program.parameters}
            values |= {use.value: buffers[use.buffer] for use in program.buffers}
            self._writes.run(values, {}, RandomAddress(0, 0, 0))

    def _last_reads(self) -> dict[str, list[int]]:
        keep = {output.value.name for output in self.program.outputs} | {self.program.loss}
        last: dict[str, str] = {}
        for node in self._nodes:
            last[node.name] = node.name
            for name in node.references():
                last[name] = node.name
        free: dict[str, list[int]] = {}
        for name, reader in last.items():
            if name not in keep:
                free.setdefault(reader, []).append(self._slots[name])
        return free

    def run(
        self,
        values: Mapping[str, Any],
        sizes: Mapping[str, int],
        random: RandomAddress,
        gradients: WeightGradients | None = None,
    ) -> dict[str, Any]:
        """Execute the program and return its outputs, and its loss, by name.

        Parameters
        ----------
        values
            Inputs, parameter uses and buffers by value name. Mutated buffers are written in place.
        sizes
            The micro-batch's value for each of the program's symbols.
        gradients
            If given, makes the gradients of large weights; otherwise autograd does.

        Raises
        ------
        TaskFailed
            If an operator fails; names the operator, its module and the stage.
        """
        instructions = self._specialise(sizes)
        slots: list[Any] = [None] * len(self._slots)
        for name, value in (*self.constants.items(), *values.items()):
            slots[self._slots[name]] = value
        form = self._form(values, sizes)
        watch = None if form in self._watched else Watch(self.limits.memory_on(self.device))
        if watch is not None:
            watch.given(slots)
        for index in self._written_inputs:
            slots[index] = slots[index].clone()  # inputs belong to the caller
        untouched = _restored_generator(self.device) if self._draws else nullcontext()
        deadline = self.limits.deadline()
        with self._autocast(), untouched:
            for instruction in instructions:
                try:
                    if monotonic() > deadline:
                        raise LimitReached(f"{self.limits.seconds:.0f} seconds are over")
                    slots[instruction.output] = self._execute(
                        instruction, slots, random, gradients, watch
                    )
                except Exception as error:
                    kind = LimitReached if isinstance(error, LimitReached) else TaskFailed
                    raise kind(self._describe(instruction, slots, error)) from error
                for index in instruction.free:
                    slots[index] = None
        if watch is not None and not watch.is_of_data:
            self._remember(form)
        names = [output.value.name for output in self.program.outputs]
        names += [self.program.loss] if self.program.loss else []
        return {name: slots[self._slots[name]] for name in names}

    def _form(self, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Hashable:
        """Return what the memory that a run takes follows from."""
        shapes = [getattr(values.get(name), "shape", None) for name in self._inputs]
        return (*sizes.values(), *shapes, torch.is_grad_enabled())

    def _remember(self, form: Hashable) -> None:
        if len(self._watched) == _MOST_FORMS:
            del self._watched[next(iter(self._watched))]
        self._watched[form] = None

    def _execute(
        self,
        instruction: _Instruction,
        slots: list[Any],
        random: RandomAddress,
        gradients: WeightGradients | None,
        watch: Watch | None,
    ) -> Any:
        arguments, keywords = instruction.filled(slots)
        if watch is None:
            return self._call(instruction, arguments, keywords, random, gradients)
        watch.before(instruction.node.op, arguments, keywords)
        result = self._call(instruction, arguments, keywords, random, gradients)
        watch.after(result)
        return result

    def _call(
        self,
        instruction: _Instruction,
        arguments: list[Any],
        keywords: dict[str, Any],
        random: RandomAddress,
        gradients: WeightGradients | None,
    ) -> Any:
        if instruction.plain:
            if gradients is not None and instruction.weights:
                return gradients.run(instruction.function, arguments, keywords, instruction.weights)
            return instruction.function(*arguments, **keywords)
        node = instruction.node
        grad = nullcontext() if node.grad else torch.no_grad()
        cast = self._own_autocast(node)
        draw = _seeded(self.device, random.of(node.name)) if instruction.random else nullcontext()
        with grad, cast, draw:
            return instruction.function(*arguments, **keywords)

    def _own_autocast(self, node: Node) -> AbstractContextManager[Any]:
        """Return the setting of the model's own autocast region that the node is in."""
        if not node.autocast:
            return torch.autocast(self.device.type, enabled=False)
        if node.autocast_dtype:
            dtype = dtype_of(node.autocast_dtype)
            return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        # No cache of cast weights: it would add up the gradients of a weight's or boundary value's
        # uses in half precision, and so depend on the cut. Weights are cast once a step instead.
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    def _specialise(self, sizes: Mapping[str, int]) -> list[_Instruction]:
        key = tuple(sizes[symbol] for symbol in self.program.symbols)
        found = self._compiled.pop(key, None)
        if found is None:
            found = [self._instruction(node, sizes) for node in self._nodes]
            if len(self._compiled) == _MOST_SIZES:
                del self._compiled[next(iter(self._compiled))]
        self._compiled[key] = found
        return found

    def _instruction(self, node: Node, sizes: Mapping[str, int]) -> _Instruction:
        if mentions_size([*node.args, *node.kwargs.values()]):
            return self._compile(node, sizes)
        if node.name not in self._without_sizes:
            self._without_sizes[node.name] = self._compile(node, sizes)
        return self._without_sizes[node.name]

    def _compile(self, node: Node, sizes: Mapping[str, int]) -> _Instruction:
        def template(argument: Argument) -> Any:
            if isinstance(argument, Mapping):
                if "ref" in argument:
                    return _Slot(self._slots[argument["ref"]])
                return decode_literal(argument, sizes, self.device)
            if isinstance(argument, (list, tuple)):
                return [template(item) for item in argument]
            return argument

        devices = device_parameters(node.op)

        def placed(where: int | str, argument: Argument) -> Any:
            # Whatever a program says: torch takes strings for devices, too.
            return self.device if where in devices and argument is not None else template(argument)

        return _Instruction(
            function=resolve(node.op),
            arguments=[placed(i, argument) for i, argument in enumerate(node.args)],
            keywords={name: placed(name, argument) for name, argument in node.kwargs.items()},
            output=self._slots[node.name],
            free=tuple(self._free.get(node.name, ())),
            node=node,
            random=draws_random_numbers(node.op),
            weights=self._weights(node),
        )

    def _weights(self, node: Node) -> frozenset[int]:
        """Return the positions of the trainable weights that an operator's gradients may wait for."""
        if not multiplies(node):
            return frozenset()
        return frozenset(
            position
            for position, argument in enumerate(node.args)
            if isinstance(argument, Mapping) and argument.get("ref") in self._trainable
        )

    def _describe(self, instruction: _Instruction, slots: list[Any], error: Exception) -> str:
        shapes = [
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            for template in instruction.arguments
            if isinstance(value := _fill(template, slots), torch.Tensor)
        ]
        node = instruction.node
        return (
            f"Stage {self.program.stage} failed at operator {node.name!r} ({node.op}) of module "
            f"{node.module or 'the model itself'!r} on {', '.join(shapes) or 'no tensors'}: "
            f"{type(error).__name__}: {error}"
        )


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator


class _seeded:
    """Hold the generator's lock, with the generator seeded."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device, self._seed = device, seed

    def __enter__(self) -> None:
        RANDOM_LOCK.acquire()
        # torch takes 64-bit seeds but reserves the sign; 63 bits are plenty.
        _generator(self._device).manual_seed(self._seed >> 1)

    def __exit__(self, *exception: object) -> None:
        RANDOM_LOCK.release()


class _restored_generator:
    """Leave the process's random state as it was: it may be the user's own process."""

    def __init__(self, device: torch.device) -> None:
        self._generator = _generator(device)

    def __enter__(self) -> None:
        with RANDOM_LOCK:
            self._state = self._generator.get_state()

    def __exit__(self, *exception: object) -> None:
        with RANDOM_LOCK:
            self._generator.set_state(self._state)
