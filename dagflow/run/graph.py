"""The dask graph of one training step.

For step k, stage s, micro-batch m: ``forward(s,k,m)``, ``backward(s,k,m)``, ``update(s,k)``, and a
``report(k)`` that ends the step. The last stage has ``backward(s,k,m)`` only, which includes the
forward; a backward that comes in two halves is followed by ``weights(s,k,m)``. The only links
between steps are a stage's own updates, so there is no barrier: a stage goes on with the next step
as soon as its weights are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dagflow.plan.schedule import BACKWARD, FORWARD, WEIGHTS, Schedule
from dagflow.run.dask_internals import StepTask, Task, TaskRef
from dagflow_tasks import tasks
from dagflow_tasks.program import StageProgram
from dagflow_tasks.references import Microbatch, StageRef, StateRef
from dagflow_tasks.results import Decision

Key = tuple[str | int, ...]

_ACTIONS = {"forward": FORWARD, "backward": BACKWARD, "weights": WEIGHTS}


@dataclass(frozen=True)
class StepInputs:
    """What a step is computed from.

    Attributes
    ----------
    step : int
    microbatches : tuple of Microbatch
    batch : callable
        ``batch(stage, microbatch_index)`` gives the graph argument (a literal or a `TaskRef`) that
        holds the batch's tensors for that stage.
    learning_rate_factor : float
    saved : bool
        True if the state before this step is being written to the store, which its update must
        wait for.
    first : bool
        True if nothing before this step is in flight: the weights are in the workers' caches or in
        the store, and no earlier task has to be waited for.
    decision : Decision | None
        The latest decision, if `first` in a run that clips or scales.
    """

    step: int
    microbatches: tuple[Microbatch, ...]
    batch: Callable[[int, int], Any]
    learning_rate_factor: float
    first: bool
    saved: bool = False
    decision: Decision | None = None


@dataclass(frozen=True)
class StepGraph:
    """Builds the graph of one step after the other for one plan.

    Attributes
    ----------
    prefix : str
        Eight hexadecimal digits that tell this attempt at the run from any other.
    programs, refs
        The stages.
    limits, halved_from : tuple of int
        Micro-batches in flight, and the first whose backward comes in two halves, by stage.
    clip_norm : float | None
    scaled : bool
        Whether the loss is scaled (fp16).
    parameter_order : tuple of str
        Names of the trainable parameters in the model's order.
    """

    prefix: str
    programs: Sequence[StageProgram]
    refs: Sequence[StageRef]
    limits: Sequence[int]
    halved_from: Sequence[int]
    clip_norm: float | None = None
    scaled: bool = False
    parameter_order: tuple[str, ...] = field(default=())

    def key(self, kind: str, step: int, stage: int, *more: str | int) -> Key:
        return (f"{kind}-{self.prefix}", step, stage, *more)

    def update_keys(self, step: int) -> list[Key]:
        return [self.key("update", step, stage) for stage in range(len(self.programs))]

    def report_key(self, step: int) -> Key:
        return self.key("report", step, self.loss_stage)

    def decision_key(self, step: int) -> Key:
        return self.key("decide", step, self.loss_stage)

    @cached_property
    def loss_stage(self) -> int:
        return next(p.stage for p in self.programs if p.loss is not None)

    @cached_property
    def decides(self) -> bool:
        return self.clip_norm is not None or self.scaled

    @cached_property
    def loans(self) -> dict[int, dict[int, tuple[list[str], list[str]]]]:
        """For each owner the borrowing stages, with the parameters' names and the uses' names."""
        found: dict[int, dict[int, tuple[list[str], list[str]]]] = {}
        for program in self.programs:
            for use in program.parameters:
                if use.owner != program.stage:
                    names, uses = found.setdefault(use.owner, {}).setdefault(
                        program.stage, ([], [])
                    )
                    uses.append(use.value)
                    if use.parameter not in names:
                        names.append(use.parameter)
        return found

    def step(self, inputs: StepInputs) -> dict[Key, Task]:
        """Return the tasks of one step by key."""
        return _StepBuilder(self, inputs).build()

    def save(self, step: int, *, after_update: bool) -> dict[Key, Task]:
        """Return the tasks that write every stage's state after `step` steps to the store.

        `after_update` tells whether the last step is still in flight, so that they wait for it.
        """
        dsk = {}
        for ref in self.refs:
            key = self.key("save", step, ref.stage)
            after = [self.key("update", step - 1, ref.stage)] if after_update else []
            dsk[key] = task(key, tasks.save, ref, StateRef(step), after=after)
        return dsk


class _StepBuilder:
    def __init__(self, graph: StepGraph, inputs: StepInputs) -> None:
        self.graph = graph
        self.inputs = inputs
        self.k = inputs.step
        self.dsk: dict[Key, Task] = {}

    def build(self) -> dict[Key, Task]:
        for owner, borrowers in self.graph.loans.items():
            for borrower, (names, _) in borrowers.items():
                self._add(
                    "lend",
                    owner,
                    borrower,
                    call=(tasks.lend_parameters, self._ref(owner), self._state, names),
                    after=self._weights_ready(owner),
                )
        for program in self.graph.programs[:-1]:
            for microbatch in self.inputs.microbatches:
                self._forward(program, microbatch)
        for program in reversed(self.graph.programs):
            for microbatch in self.inputs.microbatches:
                self._backward(program, microbatch)
        self._return_loans()
        if self.graph.decides:
            self._decide()
        for program in self.graph.programs:
            self._update(program)
        self._report()
        return self.dsk

    # Building blocks

    def _add(
        self, kind: str, stage: int, *more: str | int, call: tuple[Any, ...], after: Any = ()
    ) -> Key:
        key = self.graph.key(kind, self.k, stage, *more)
        self.dsk[key] = task(key, *call, after=after)
        return key

    def _at(self, kind: str, stage: int, *more: str | int) -> TaskRef:
        return TaskRef(self.graph.key(kind, self.k, stage, *more))

    def _ref(self, stage: int) -> StageRef:
        return self.graph.refs[stage]

    @property
    def _state(self) -> StateRef:
        return StateRef(self.k)

    def _weights_ready(self, stage: int) -> list[Key]:
        """Keys to wait for before a stage's weights are those of this step."""
        return [] if self.inputs.first else [self.graph.key("update", self.k - 1, stage)]

    def _values(self, program: StageProgram, index: int) -> list[Any]:
        parts: list[Any] = [self.inputs.batch(program.stage, index)] if program.batch_inputs else []
        parts += [self._boundary(source, program.stage, index) for source in program.sources]
        return [*parts]

    def _boundary(self, source: int, reader: int, index: int) -> TaskRef:
        """Refer to the part of a stage's forward result that a reader needs."""
        outputs = self.graph.programs[source].outputs
        names = [output.value.name for output in outputs if reader in output.readers]
        if len(names) == len(outputs):
            return self._at("forward", source, index)
        key = self.graph.key("select", self.k, source, index, FORWARD, reader)
        if key not in self.dsk:
            result = self._at("forward", source, index)
            self._add(
                "select", source, index, FORWARD, reader, call=(tasks.select_values, result, names)
            )
        return TaskRef(key)

    def _gradient(self, source: int, reader: int, index: int) -> TaskRef:
        """Refer to the part of a stage's backward result that another stage's backward needs."""
        program, wanted = self.graph.programs[source], self.graph.programs[reader]
        names = [
            o.value.name for o in wanted.outputs if o.differentiable and o.readers[0] == source
        ]
        names += [i.value.name for i in wanted.inputs if i.gradient_from == source]
        boundary = [i for i in program.inputs if i.source is not None and i.differentiable]
        if len(names) == len(boundary):
            return self._at("backward", source, index)
        key = self.graph.key("select", self.k, source, index, BACKWARD, reader)
        if key not in self.dsk:
            result = self._at("backward", source, index)
            self._add(
                "select",
                source,
                index,
                BACKWARD,
                reader,
                call=(tasks.select_gradients, result, names),
            )
        return TaskRef(key)

    def _before(self, program: StageProgram, index: int) -> TaskRef | None:
        if not program.mutated_buffers or index == 0:
            return None
        return self._there(program.stage, index - 1)

    def _there(self, stage: int, index: int) -> TaskRef:
        """Refer to the result that holds a forward's."""
        last = stage == len(self.graph.programs) - 1
        return self._at("backward" if last else "forward", stage, index)

    def _is_halved(self, stage: int, index: int) -> bool:
        return index >= self.graph.halved_from[stage]

    def _tied(self, program: StageProgram) -> list[Any]:
        owners = sorted(set(program.borrowed_parameters.values()))
        return [self._at("lend", owner, program.stage) for owner in owners]

    # Tasks

    def _forward(self, program: StageProgram, microbatch: Microbatch) -> None:
        stage, index = program.stage, microbatch.index
        after = self._weights_ready(stage)
        if index >= self.graph.limits[stage]:
            after.append(
                self.graph.key("backward", self.k, stage, index - self.graph.limits[stage])
            )
        call = (
            tasks.forward,
            self._ref(stage),
            self._state,
            microbatch,
            self._values(program, index),
            self._before(program, index),
            self._tied(program),
            self._is_halved(stage, index),
        )
        self._add("forward", stage, index, call=call, after=after)

    def _backward(self, program: StageProgram, microbatch: Microbatch) -> None:
        stage, index = program.stage, microbatch.index
        halved = self._is_halved(stage, index)
        where = (self._ref(stage), self._state, microbatch, self._values(program, index))
        gradients = [self._gradient(source, stage, index) for source in program.gradient_sources]
        previous = self._sums(stage, index - 1) if index else None
        recompute = (self._before(program, index), self._tied(program), self._scaling(stage))
        last = stage == len(self.graph.programs) - 1
        call: tuple[Any, ...]
        if last:
            before = None if halved else previous
            call = (tasks.forward_backward, *where, before, *recompute, halved)
        elif halved:
            call = (tasks.backward, *where, [*gradients], None, None, *recompute, True)
        else:
            this = self._there(stage, index)
            call = (tasks.backward, *where, [*gradients], this, previous, *recompute)
        after = self._weights_ready(stage) if last else []
        self._add("backward", stage, index, call=call, after=after)
        if halved:
            this = self._there(stage, index)
            call = (tasks.backward_weights, *where, [*gradients], this, previous, *recompute)
            first_half = self.graph.key("backward", self.k, stage, index)
            self._add("weights", stage, index, call=call, after=[first_half])

    def _scaling(self, stage: int) -> Any:
        if not self.graph.scaled or stage != self.graph.loss_stage:
            return None
        return self._previous_decision()

    def _previous_decision(self) -> Any:
        if self.inputs.first:
            return self.inputs.decision or Decision(
                loss_scale=tasks.INITIAL_LOSS_SCALE if self.graph.scaled else 1.0
            )
        return TaskRef(self.graph.decision_key(self.k - 1))

    def _sums(self, stage: int, index: int = -1) -> TaskRef:
        """Refer to the gradient sums up to a micro-batch, the step's last by default."""
        index %= len(self.inputs.microbatches)
        return self._at("weights" if self._is_halved(stage, index) else "backward", stage, index)

    def _return_loans(self) -> None:
        for owner, borrowers in self.graph.loans.items():
            for borrower, (_, uses) in borrowers.items():
                call = (tasks.return_gradients, self._ref(borrower), self._sums(borrower), uses)
                self._add("return", borrower, owner, call=call)

    def _borrowed(self, stage: int) -> list[Any]:
        return [self._at("return", b, stage) for b in self.graph.loans.get(stage, {})]

    def _decide(self) -> None:
        norms = []
        for program in self.graph.programs:
            stage = program.stage
            call = (
                tasks.gradient_norms,
                self._ref(stage),
                self._sums(stage),
                self._borrowed(stage),
            )
            norms.append(TaskRef(self._add("norms", stage, call=call)))
        order = list(self.graph.parameter_order)
        self._add(
            "decide",
            self.graph.loss_stage,
            call=(
                tasks.decide,
                [*norms],
                order,
                self.graph.clip_norm,
                self._previous_decision(),
                self.graph.scaled,
            ),
        )

    def _decision(self) -> TaskRef | None:
        return TaskRef(self.graph.decision_key(self.k)) if self.graph.decides else None

    def _update(self, program: StageProgram) -> None:
        stage = program.stage
        last = len(self.inputs.microbatches) - 1
        call = (
            tasks.update,
            self._ref(stage),
            self._state,
            self._sums(stage),
            self.inputs.learning_rate_factor,
            self._borrowed(stage),
            self._there(stage, last) if program.mutated_buffers else None,
            self._decision(),
        )
        saved = [self.graph.key("save", self.k, stage)] if self.inputs.saved else []
        self._add("update", stage, call=call, after=saved)

    def _report(self) -> None:
        stage = self.graph.loss_stage
        weights = [microbatch.weight for microbatch in self.inputs.microbatches]
        updates = [self._at("update", p.stage) for p in self.graph.programs]
        call = (tasks.report, self.k, weights, self._sums(stage), [*updates], self._decision())
        self._add("report", stage, call=call)


def task(key: Key, function: Callable[..., Any], *args: Any, after: Sequence[Key] = ()) -> Task:
    """Return a dask task whose arguments may hold `TaskRef`s inside lists.

    dask would make a task of every list; a step has tens of thousands of tasks, so references are
    passed side by side instead, and put back into place on the worker.
    """
    references: list[TaskRef] = []

    def template(argument: Any) -> Any:
        if isinstance(argument, TaskRef):
            references.append(argument)
            return tasks.result_slot(len(references) - 1)
        if isinstance(argument, list):
            return tuple(template(item) for item in argument)
        return argument

    layout = tuple(template(argument) for argument in args)
    waited_for = [TaskRef(name) for name in after]
    return StepTask(key, tasks.call, function, layout, *references, *waited_for)


class Priorities:
    """Gives every key its place in the schedule, as dask understands it: higher goes first.

    Picklable and small: it travels with every step's graph and is called on the scheduler.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._starts: dict[Key, float] = {
            (action.kind, action.stage, action.microbatch): start
            for action, start in schedule.starts.items()
        }
        self._span = schedule.length + 4

    def __call__(self, key: Key) -> float:
        kind, step, stage, *more = key
        name = str(kind).partition("-")[0]
        if name in _ACTIONS:
            start = self._starts[(_ACTIONS[name], stage, more[0])]
        elif name == "select":
            start = -1.0  # a message, hardly any work: at once
        else:
            start = -1.0 if name in ("lend", "batch", "save") else self._span - 3
        return -(int(str(step)) * self._span + start)


class Places:
    """Gives every key the address of its stage's worker."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)

    def __call__(self, key: Key) -> list[str]:
        return [self._addresses[int(str(key[2]))]]
