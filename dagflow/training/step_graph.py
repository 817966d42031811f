"""The dask graph of one training step.

For step k, stage s, micro-batch m: ``forward(s,k,m)`` (``F``), ``backward(s,k,m)`` (``I``, or ``B`` in
a stage whose backwards aren't halved), ``weights(s,k,m)`` (``W`` of a halved one), ``update(s,k)``
(``U``), and a ``report(k)`` that ends the step. The last stage has no ``forward``: its ``backward``
includes it. The only links between steps are a stage's own updates, so there is no barrier: a stage
goes on with the next step as soon as its weights are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dagflow.plan.schedule import BACKWARD, FORWARD
from dagflow.swarm.behind import save_behind
from dagflow.swarm.dask_internals import Task, TaskRef
from dagflow.training.dask_tasks import Key, task
from dagflow.training.step_inputs import StepInputs
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train import exchange, replay, snapshots, tasks
from dagflow_tasks.train import update as updating
from dagflow_tasks.train.arguments import BackwardArguments, ForwardArguments, UpdateArguments
from dagflow_tasks.train.references import Microbatch, StageRef, StateRef
from dagflow_tasks.train.replay import Neighbours, StepRecord
from dagflow_tasks.train.results import Decision


@dataclass(frozen=True)
class StepGraph:
    """Builds the graph of one step after the other for one plan.

    Attributes
    ----------
    prefix : str
        Eight hexadecimal digits that tell this attempt at the run from any other.
    programs, refs
        The stages.
    limits : tuple of int
        Micro-batches in flight, by stage.
    halved : tuple of bool
        Whether backwards come in two halves, by stage.
    clip_norm : float | None
    scaled : bool
        Whether the loss is scaled (fp16).
    parameter_order : tuple of str
        Names of the trainable parameters in the model's order.
    read_batch : callable or None
        ``read_batch(stage)`` gives a stage's `Neighbours.read_batch`, where workers read the data.
    """

    prefix: str
    programs: Sequence[StageProgram]
    refs: Sequence[StageRef]
    limits: Sequence[int]
    halved: Sequence[bool]
    clip_norm: float | None = None
    scaled: bool = False
    parameter_order: tuple[str, ...] = field(default=())
    read_batch: Callable[[int], Callable[[int, int], TensorDict]] | None = None

    def key(self, kind: str, step: int, stage: int, *more: str | int) -> Key:
        return (f"{kind}-{self.prefix}", step, stage, *more)

    def update_keys(self, step: int) -> list[Key]:
        return [self.key("update", step, stage) for stage in range(len(self.programs))]

    def report_key(self, step: int) -> Key:
        return self.key("report", step, self.loss_stage)

    def decision_key(self, step: int) -> Key:
        return self.key("decide", step, self.loss_stage)

    @property
    def journal(self) -> int:
        """Steps whose entries are written together; 0 if there is no journal."""
        return self.refs[0].journal

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
                if use.owner != program.stage and use.trainable:
                    names, uses = found.setdefault(use.owner, {}).setdefault(
                        program.stage, ([], [])
                    )
                    uses.append(use.value)
                    if use.parameter not in names:
                        names.append(use.parameter)
        return found

    @cached_property
    def neighbours(self) -> tuple[Neighbours, ...]:
        """Return whom each stage has to do with besides its sources."""
        return tuple(
            Neighbours(
                tuple(self.loans.get(program.stage, {})),
                self.scaled and program.stage == self.loss_stage,
                self.read_batch(program.stage) if self.read_batch is not None else None,
            )
            for program in self.programs
        )

    def again(self, prefix: str) -> StepGraph:
        """Return the same graph under other keys: dask remembers those of tasks that were lost."""
        return replace(self, prefix=prefix)

    def restore(
        self, stage: int, step: int, records: Sequence[StepRecord], turn: tuple[int, int]
    ) -> dict[Key, Task]:
        """Return the task that brings a stage to its weights after `step` steps.

        `turn` grows with every rebuilding; see `dagflow_tasks.train.replay.restore`.
        """
        key = self.key("restore", step, stage)
        call = (
            replay.restore,
            self.refs[stage],
            step,
            tuple(records),
            self.neighbours[stage],
            turn,
        )
        return {key: task(key, *call)}

    def progress(self, stage: int, step: int) -> dict[Key, Task]:
        """Return the task that says how far a stage is on its worker."""
        key = self.key("progress", step, stage)
        return {key: task(key, replay.progress, self.refs[stage])}

    def step(self, inputs: StepInputs) -> dict[Key, Task]:
        """Return the tasks of one step by key."""
        return _StepBuilder(self, inputs).build()

    def save(
        self,
        step: int,
        *,
        after_update: bool,
        before: Sequence[Key] = (),
        ready: Mapping[int, Key] | None = None,
    ) -> dict[Key, Task]:
        """Return the tasks that write every stage's state after `step` steps to the store.

        A copy is taken first; the next step's update waits for that only.

        Parameters
        ----------
        after_update : bool
            Whether the last step is still in flight, so that they wait for it. Otherwise nothing is,
            and nothing may follow before they are done: no copy is needed.
        before
            Earlier snapshots' tasks: memory holds one copy at a time.
        ready
            As in `StepInputs`.
        """
        dsk = {}
        for ref in self.refs:
            after = [key for key in before if key[2] == ref.stage]
            if after_update:
                after.append(self.key("update", step - 1, ref.stage))
            elif ready and ref.stage in ready:
                after.append(ready[ref.stage])
            copy, save = self.key("copy", step, ref.stage), self.key("save", step, ref.stage)
            if after_update:
                dsk[copy] = task(copy, snapshots.copy_state, ref, StateRef(step), after=after)
                after = [copy]
            # The stage's name comes last: the task isn't part of the stage's work, see `calling.call`.
            dsk[save] = task(save, save_behind, StateRef(step), ref, after_update, after=after)
        return dsk


class _StepBuilder:
    def __init__(self, graph: StepGraph, inputs: StepInputs) -> None:
        self.graph = graph
        self.inputs = inputs
        self.k = inputs.step
        self.dsk: dict[Key, Task] = {}

    def build(self) -> dict[Key, Task]:
        for program in self.graph.programs[:-1]:
            for microbatch in self.inputs.microbatches:
                self._forward(program, microbatch)
        for program in reversed(self.graph.programs):
            for microbatch in self.inputs.microbatches:
                self._backward(program, microbatch)
        if self.graph.decides and not self._decided_by():
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

    def _is_done(self, kind: str, stage: int, index: int = 0) -> bool:
        standing = self.inputs.standing
        return standing is not None and standing.has_done(kind, self.k, stage, index)

    def _at(self, kind: str, stage: int, index: int, names: Sequence[str] | None = ()) -> Any:
        """Refer to a task's result, or to what it has sent, if it is done: the named tensors."""
        if not self._is_done(kind, stage, index):
            return TaskRef(self.graph.key(kind, self.k, stage, index))
        wanted = "all" if names is None else "+".join(names)
        key = self.graph.key("recall", self.k, stage, kind, index, wanted)
        if key not in self.dsk:
            asked = None if names is None else tuple(names)
            call = (replay.recall, self._ref(stage), self.k, kind, index, asked)
            self._add("recall", stage, kind, index, wanted, call=call)
        return TaskRef(key)

    def _waiting_for(self, kind: str, stage: int, index: int) -> list[Key]:
        if self._is_done(kind, stage, index):
            return []
        return [self.graph.key(kind, self.k, stage, index)]

    def _ref(self, stage: int) -> StageRef:
        return self.graph.refs[stage]

    @property
    def _state(self) -> StateRef:
        return StateRef(self.k)

    def _weights_ready(self, stage: int) -> list[Key]:
        """Keys to wait for before a stage's weights are those of this step."""
        standing = self.inputs.standing
        if self.inputs.first or (standing is not None and standing.step(stage) >= self.k):
            return [self.inputs.ready[stage]] if stage in self.inputs.ready else []
        return [self.graph.key("update", self.k - 1, stage)]

    def _values(self, program: StageProgram, index: int) -> list[Any]:
        parts: list[Any] = [self.inputs.batch(program.stage, index)] if program.batch_inputs else []
        parts += [self._boundary(source, program.stage, index) for source in program.sources]
        return [*parts]

    def _boundary(self, source: int, reader: int, index: int) -> TaskRef:
        """Refer to the part of a stage's forward result that a reader needs."""
        program = self.graph.programs[source]
        names = program.values_for(reader)
        result = self._at("forward", source, index, names)
        if self._is_done("forward", source, index) or len(names) == len(program.outputs):
            return result
        return self._selected(FORWARD, source, reader, index, exchange.select_values, result, names)

    def _gradient(self, source: int, reader: int, index: int) -> TaskRef:
        """Refer to the part of a stage's backward result that another stage's backward needs."""
        names = self.graph.programs[reader].gradients_from(source)
        inputs = self.graph.programs[source].inputs
        boundary = [i for i in inputs if i.source is not None and i.differentiable]
        result = self._at("backward", source, index, names)
        if self._is_done("backward", source, index) or len(names) == len(boundary):
            return result
        select = exchange.select_gradients
        return self._selected(BACKWARD, source, reader, index, select, result, names)

    def _selected(
        self, kind: str, source: int, reader: int, index: int, select: Any, result: Any, names: Any
    ) -> TaskRef:
        key = self.graph.key("select", self.k, source, index, kind, reader)
        if key not in self.dsk:
            self._add("select", source, index, kind, reader, call=(select, result, names))
        return TaskRef(key)

    def _before(self, program: StageProgram, index: int) -> Any:
        if not program.mutated_buffers or index == 0:
            return None
        return self._there(program.stage, index - 1)

    def _there(self, stage: int, index: int) -> Any:
        """Refer to the result of the task that runs a stage's forward."""
        return self._at("backward" if self._is_last(stage) else "forward", stage, index)

    def _is_last(self, stage: int) -> bool:
        return stage == len(self.graph.programs) - 1

    def _in_flight_before(self, stage: int, index: int) -> list[Key]:
        """Return what a forward waits for so that memory is bounded.

        That is ``I``. ``W`` waits for it, too, and comes first, as it has the higher priority.
        """
        earlier = index - self.graph.limits[stage]
        return self._waiting_for("backward", stage, earlier) if earlier >= 0 else []

    def _tied(self, program: StageProgram) -> list[Any]:
        return [self._lent(owner, program.stage) for owner in program.lenders]

    def _lent(self, owner: int, borrower: int) -> TaskRef:
        lent = self._at("lend", owner, borrower, None)
        if not self._is_done("lend", owner) and lent.key not in self.dsk:
            names, _ = self.graph.loans[owner][borrower]
            call = (exchange.lend_parameters, self._ref(owner), self._state, names, borrower)
            self._add("lend", owner, borrower, call=call, after=self._weights_ready(owner))
        return lent

    # Tasks

    def _forward(self, program: StageProgram, microbatch: Microbatch) -> None:
        stage, index = program.stage, microbatch.index
        if self._is_done("forward", stage, index):
            return
        work = ForwardArguments(**self._inputs(program, microbatch))
        after = self._weights_ready(stage) + self._in_flight_before(stage, index)
        self._add("forward", stage, index, call=(tasks.forward, work), after=after)

    def _inputs(self, program: StageProgram, microbatch: Microbatch) -> dict[str, Any]:
        """Return the fields of `ForwardArguments`."""
        stage, index = program.stage, microbatch.index
        return {
            "ref": self._ref(stage),
            "microbatch": microbatch,
            "values": self._values(program, index),
            "halved": self.graph.halved[stage],
            "before": self._before(program, index),
            "tied": self._tied(program),
        }

    def _backward(self, program: StageProgram, microbatch: Microbatch) -> None:
        """Add ``I`` and ``W``, or ``B``; in the last stage ``I`` or ``B`` begins with ``F``."""
        stage, index = program.stage, microbatch.index
        halved = self.graph.halved[stage]
        to_do = [
            kind
            for kind in ("backward", "weights")
            if not self._is_done(kind, stage, index) and (halved or kind == "backward")
        ]
        if not to_do:
            return
        gradients = [self._gradient(source, stage, index) for source in program.gradient_sources]
        inputs = self._inputs(program, microbatch)
        work = BackwardArguments(**inputs, gradients=gradients, scaling=self._scaling(stage))
        adding = replace(work, previous=self._sums(stage, index - 1) if index else None)
        if self._is_last(stage):
            after = self._weights_ready(stage) + self._in_flight_before(stage, index)
        else:
            after = self._waiting_for("forward", stage, index) or self._weights_ready(stage)
        if "backward" in to_do:
            function = tasks.forward_backward if self._is_last(stage) else tasks.backward
            call = (function, work if halved else adding)
            self._add("backward", stage, index, call=call, after=after)
        if "weights" in to_do:
            after = self._waiting_for("backward", stage, index)
            self._add("weights", stage, index, call=(tasks.weight_gradients, adding), after=after)

    def _scaling(self, stage: int) -> Any:
        if not self.graph.scaled or stage != self.graph.loss_stage:
            return None
        return self._previous_decision()

    def _previous_decision(self) -> Any:
        if self.inputs.first:
            return self.inputs.decision or Decision.initial(scaled=self.graph.scaled)
        return TaskRef(self.graph.decision_key(self.k - 1))

    def _sums(self, stage: int, index: int = -1) -> Any:
        """Refer to the gradient sums up to a micro-batch, the step's last by default."""
        index %= len(self.inputs.microbatches)
        return self._at("weights" if self.graph.halved[stage] else "backward", stage, index)

    def _borrowed(self, stage: int) -> list[Any]:
        found = []
        for borrower, (_, uses) in self.graph.loans.get(stage, {}).items():
            returned = self._at("return", borrower, stage, None)
            if not self._is_done("return", borrower) and returned.key not in self.dsk:
                sums = self._sums(borrower)
                call = (exchange.return_gradients, self._ref(borrower), sums, uses, stage)
                self._add("return", borrower, stage, call=call)
            found.append(returned)
        return [*found]

    def _decided_by(self) -> list[int]:
        """Stages that know what was decided on this step: those that have gone on."""
        standing = self.inputs.standing
        stages = [program.stage for program in self.graph.programs]
        return [s for s in stages if standing is not None and standing.step(s) > self.k]

    def _decide(self) -> None:
        norms = []
        for stage in range(len(self.graph.programs)):
            what = self._ref(stage), self._sums(stage), self._borrowed(stage)
            norms.append(TaskRef(self._add("norms", stage, call=(updating.gradient_norms, *what))))
        graph, before = self.graph, self._previous_decision()
        settings = list(graph.parameter_order), graph.clip_norm, before, graph.scaled
        self._add("decide", graph.loss_stage, call=(updating.decide, [*norms], *settings))

    def _decision(self) -> Any:
        if not self.graph.decides:
            return None
        key = self.graph.decision_key(self.k)
        knowing = self._decided_by()
        if knowing and key not in self.dsk:
            # Under the decision's own key: the next step asks for that.
            self.dsk[key] = task(key, replay.recall_decision, self._ref(knowing[0]), self.k)
        return TaskRef(key)

    def _update(self, program: StageProgram) -> None:
        stage = program.stage
        if self._is_done("update", stage):
            return
        last = len(self.inputs.microbatches) - 1
        work = UpdateArguments(
            self._ref(stage),
            self.k,
            self._sums(stage),
            self.inputs.learning_rate,
            self._borrowed(stage),
            self._there(stage, last) if program.mutated_buffers else None,
            self._decision(),
        )
        after = [self.graph.key("copy", self.k, stage)] if self.inputs.saved else []
        # Once it has updated, a stage can't be asked for this step's gradients again.
        owners = [owner for owner in program.lenders if not self._is_done("update", owner)]
        after += [self.graph.key("return", self.k, stage, owner) for owner in owners]
        self._add("update", stage, call=(updating.update, work), after=after)

    def _report(self) -> None:
        stage = self.graph.loss_stage
        weights = [microbatch.weight for microbatch in self.inputs.microbatches]
        updates = [self._updated(p.stage) for p in self.graph.programs]
        call = (tasks.report, self.k, weights, self._sums(stage), [*updates], self._decision())
        self._add("report", stage, call=call)

    def _updated(self, stage: int) -> TaskRef:
        if self._is_done("update", stage):
            return self._at("update", stage, 0)
        return TaskRef(self.graph.key("update", self.k, stage))
