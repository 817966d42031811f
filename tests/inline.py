"""Runs training graphs in this process, task by task: what a cluster must agree with."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.protocol import deserialize, serialize
from zoo import Example, capture_example

from dagflow.graph.batch import flatten_batch
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import Partition, partition, partition_by_operator
from dagflow.plan.plan import Plan
from dagflow.swarm import wire
from dagflow.training.dask_tasks import Priorities
from dagflow.training.step_graph import StepGraph
from dagflow.training.step_inputs import StepInputs
from dagflow_storage import ShardRecord, Snapshot, Store, commit_snapshot
from dagflow_tasks.kernels import onednn
from dagflow_tasks.program import weight_gradients
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train import exchange, snapshots
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer
from dagflow_tasks.train.references import Microbatch, StageRef, StateRef, TaskSettings
from dagflow_tasks.train.replay import Neighbours, StepRecord
from dagflow_tasks.train.results import BackwardResult, ForwardResult
from dagflow_tasks.train.state import BUFFER, PARAMETER, read_tensors, write_tensors

wire.register()

Numbers = tuple[tuple[str, float], ...]


class InlineRun:
    """A run of some steps on one model, cut in some way, without dask.

    What a task returns goes through dask's serializer, as if all others were on other workers.
    """

    def __init__(
        self,
        example: Example,
        dag: OperatorDag,
        cut: Partition,
        *,
        num_microbatches: int = 2,
        optimizer: Optimizer | None = None,
        precision: str = "fp32",
        clip_norm: float | None = None,
        journal: int = 0,
        before_task: Callable[[InlineRun], None] = lambda run: None,
    ) -> None:
        self.dag, self.cut = dag, cut
        self.before_task = before_task
        self.store = Store(f"memory://inline-{uuid.uuid4().hex}")
        self.settings = TaskSettings(7, precision, optimizer or Optimizer("AdamW", lr=1e-2))
        for program in cut.programs:
            text = program.to_json().encode()
            self.store.write_bytes(f"programs/p/stage-{program.stage:03d}.json", text)
        run_id = uuid.uuid4().hex
        plan = Plan.in_turn(cut, [f"worker-{s}" for s in range(len(cut))], num_microbatches)
        self.priorities = Priorities(plan.pipeline)
        self.refs = [
            StageRef(self.store, run_id, "p", s, self.settings, journal) for s in range(len(cut))
        ]
        self.batches: list[list[dict[str, torch.Tensor]]] = []
        self.records: list[StepRecord] = []
        self.graph = StepGraph(
            uuid.uuid4().hex[:8],
            cut.programs,
            self.refs,
            plan.limits,
            plan.halved,
            clip_norm=clip_norm,
            scaled=precision == "fp16",
            parameter_order=tuple(p.name for p in dag.parameters if p.trainable),
        )
        model = example.model
        tensors = {(PARAMETER, n): p for n, p in model.named_parameters()}
        tensors |= {(BUFFER, n): b for n, b in model.named_buffers()}
        commit_snapshot(self.store, 0, [write_tensors(self.store, 0, "initial", tensors)], {})
        self.results: dict[Any, Any] = {}
        self.losses: list[float] = []

    def step(
        self,
        step: int,
        batches: list[Any],
        weights: Sequence[float] | None = None,
        numbers: Sequence[Numbers] | None = None,
    ) -> None:
        inputs = self.inputs(step, batches, weights, numbers)
        for key, task in in_order(self.graph.step(inputs)):
            self.before_task(self)
            self.results[key] = travelled(task(self.results))
        self.finished(inputs)

    def inputs(
        self,
        step: int,
        batches: list[Any],
        weights: Sequence[float] | None = None,
        numbers: Sequence[Numbers] | None = None,
    ) -> StepInputs:
        """Return what a step is computed from."""
        flat = [flatten_batch(batch)[0] for batch in batches]
        sizes = [
            tuple((s.name, tensors[s.input[3:]].shape[s.dim]) for s in self.dag.symbols)
            for tensors in flat
        ]
        microbatches = tuple(
            Microbatch(
                step,
                m,
                weights[m] if weights else 1 / len(batches),
                sizes[m],
                numbers[m] if numbers else (),
            )
            for m in range(len(batches))
        )

        def batch(stage: int, index: int) -> dict[str, torch.Tensor]:
            named = exchange.tensors_of(flat[index])
            return {name: named[name] for name in self.cut[stage].batch_inputs}

        self.batches.append(flat)
        return StepInputs(step, microbatches, batch, 1.0, first=step == 0)

    def finished(self, inputs: StepInputs) -> None:
        """Take note of a step that is done."""
        report = self.results[self.graph.report_key(inputs.step)]
        self.losses.append(report.loss)
        record = StepRecord(inputs.step, inputs.microbatches, 1.0, report.decision, {})
        self.records.append(record)

    def save(self, step: int) -> None:
        records = [save_now(ref, step) for ref in self.refs]
        commit_snapshot(self.store, step, records, {})

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """Parameters and buffers after `step` steps, through the store."""
        self.save(step)
        snapshot = Snapshot.open(self.store, step)
        return {
            name: tensor
            for role in (PARAMETER, BUFFER)
            for name, tensor in read_tensors(snapshot, role, snapshot.names(role)).items()
        }

    def gradients(self, step: int, num_microbatches: int) -> dict[str, torch.Tensor]:
        """Gradients by use after a step's last micro-batch."""
        found: dict[str, torch.Tensor] = {}
        for stage in range(len(self.cut)):
            found.update(self.sums(step, stage, num_microbatches - 1).sums.tensors)
        return found

    def sums(self, step: int, stage: int, microbatch: int) -> Any:
        """Return the result that holds a stage's gradient sums up to a micro-batch."""
        weights = self.graph.key("weights", step, stage, microbatch)
        backward = self.graph.key("backward", step, stage, microbatch)
        return self.results.get(weights) or self.results[backward]

    def neighbours(self, stage: int) -> Neighbours:
        """Whom a replay of a stage has to do with; batches are read from here."""
        names = self.cut[stage].batch_inputs

        def read(step: int, index: int) -> TensorDict:
            named = exchange.tensors_of(self.batches[step][index])
            return TensorDict({name: named[name] for name in names})

        return replace(self.graph.neighbours[stage], read_batch=read)

    def there(self, step: int, stage: int, microbatch: int) -> Any:
        """Return the result of the task that ran a forward."""
        forward = self.graph.key("forward", step, stage, microbatch)
        backward = self.graph.key("backward", step, stage, microbatch)
        return self.results.get(forward) or self.results[backward]


def there_and_back(value: Any) -> Any:
    """Return what another process gets of a value that dask sends it."""
    header, frames = serialize(value, serializers=["dask"])
    return deserialize(header, [bytearray(memoryview(frame).cast("B")) for frame in frames])


def travelled(result: Any) -> Any:
    """Return a task's result with tensors that have been on a journey, but for those that stay."""
    if isinstance(result, ForwardResult):
        return replace(result, values=there_and_back(result).values)
    if isinstance(result, BackwardResult):
        return replace(result, gradients=there_and_back(result).gradients)
    return there_and_back(result) if isinstance(result, TensorDict) else result


def save_now(ref: StageRef, step: int) -> ShardRecord:
    """Write a stage's state as it is."""
    return snapshots.save_state(ref, StateRef(step))


def assert_same_bits(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Compare named tensors bit for bit, and say which differ."""
    assert sorted(found) == sorted(wanted)
    differing = {
        name: float((found[name].double() - wanted[name].double()).abs().max())
        for name in wanted
        if not torch.equal(found[name], wanted[name])
    }
    assert differing == {}


def in_order(graph: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Tasks of a graph so that each comes after what it depends on."""
    ordered: list[tuple[Any, Any]] = []
    done: set[Any] = set()

    def visit(key: Any) -> None:
        if key in done or key not in graph:
            return
        done.add(key)
        for dependency in sorted(graph[key].dependencies, key=str):
            visit(dependency)
        ordered.append((key, graph[key]))

    for key in graph:
        visit(key)
    return ordered


def run_inline(
    example: Example,
    num_stages: int | None,
    steps: int = 5,
    num_microbatches: int = 2,
    **options: Any,
) -> InlineRun:
    """Train a few steps on random batches (the same for every cut); None cuts at every operator."""
    CACHE.clear()
    example = Example(copy.deepcopy(example.model), example.batch, example.loss)
    dag = options.pop("dag", None) or capture_example(example)
    cut = partition_by_operator(dag) if num_stages is None else partition(dag, num_stages)
    run = InlineRun(example, dag, cut, num_microbatches=num_microbatches, **options)
    torch.manual_seed(2)
    for step in range(steps):
        run.step(step, [example.batch(3) for _ in range(num_microbatches)])
    return run


def count_onednn_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Have linear layers of any size run on oneDNN's kernels, and return what counts their calls."""
    calls: list[None] = []

    def linear(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        return onednn.linear(*arguments)

    monkeypatch.setattr(weight_gradients, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(weight_gradients, "LEAST_ROWS", 1)
    monkeypatch.setattr(weight_gradients, "trains_here", lambda: True)
    monkeypatch.setattr(weight_gradients, "linear", linear)
    return lambda: len(calls)
