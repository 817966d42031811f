"""Cutting an operator DAG: what holds for every cut, balance, memory, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inline import assert_same_bits, run_inline
from torch import nn
from torch.nn.functional import mse_loss
from zoo import SIMILAR, ZOO, Example, captured

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.assemble import assemble
from dagflow.plan.memory import worker_bytes
from dagflow.plan.partition import partition, partition_by_operator
from dagflow.plan.plan import Plan
from dagflow.plan.schedule import in_flight_limits
from dagflow.plan.training_memory import TrainingMemory
from dagflow_tasks.program.operators import aliased_arguments, mutated_arguments
from dagflow_tasks.program.stage_program import StageProgram, check_nodes


def from_weights(dag: OperatorDag) -> set[str]:
    """Values that depend on a parameter."""
    found = {use for parameter in dag.parameters for use in parameter.uses}
    for node in dag.nodes:
        if any(name in found for name in node.references()):
            found.add(node.name)
    return found


def assert_valid(dag: OperatorDag, cuts: Sequence[int], programs: Sequence[StageProgram]) -> None:
    """Check all that makes stages a correct cut of the DAG."""
    position = {node.name: i for i, node in enumerate(dag.nodes)}
    bounds = [0, *cuts, len(dag.nodes)]
    needs_weights = from_weights(dag)
    written = {f"b.{buffer.name}" for buffer in dag.buffers if buffer.mutated}
    outputs = {(p.stage, o.value.name): o for p in programs for o in p.outputs}
    for program in programs:
        stage, first, end = program.stage, bounds[program.stage], bounds[program.stage + 1]
        places = [position[node.name] for node in program.nodes]
        assert places == sorted(set(places))
        for node in program.nodes:
            if not first <= position[node.name] < end:  # recomputed: cheap, and from earlier on
                assert position[node.name] < first
                assert node.name not in needs_weights
        check_nodes(program.nodes, program.defined_values(), program.symbols)
        for item in program.inputs:
            if item.source is not None:
                assert item.source < stage
                assert stage in outputs[item.source, item.value.name].readers
        for node in program.nodes:
            for name in mutated_arguments(node):
                own = {n.name for n in program.nodes} | {i.value.name for i in program.inputs}
                assert name in own | {use.value for use in program.buffers}
                assert name not in {i.value.name for i in program.inputs if i.source is not None}
    for use in (use for program in programs for use in program.buffers if use.value in written):
        assert len([p for p in programs if use.value in {u.value for u in p.buffers}]) == 1
    assert [p.stage for p in programs if p.loss is not None] == [
        sum(cut <= position[dag.loss] for cut in cuts)
    ]
    uses = [use.value for program in programs for use in program.parameters]
    assert len(uses) == len(set(uses))
    owners = {(u.parameter, u.owner) for program in programs for u in program.parameters}
    assert len(owners) == len({parameter for parameter, _ in owners})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in {*SIMILAR, "llama", "t5", "bloom"} else [])
        for n in ZOO
    ],
)
def test_balanced_stages_and_single_operators_are_valid_cuts(name: str) -> None:
    dag = captured(name)
    for cut in (*(partition(dag, n) for n in (1, 2, 3, 4)), partition_by_operator(dag)):
        assert len(cut.programs) == len(cut.cuts) + 1
        assert_valid(dag, cut.cuts, cut.programs)
        values = {node.name for program in cut.programs for node in program.nodes}
        assert dag.loss in values


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["gpt2", "llama", "resnet", "two_branches"]))
def test_any_set_of_allowed_places_is_a_valid_cut(data: st.DataObject, name: str) -> None:
    dag = captured(name)
    analysis = DagAnalysis(dag)
    allowed = sorted(set(range(1, len(dag.nodes))) - analysis.forbidden_cuts)
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed), max_size=8)))
    assert_valid(dag, cuts, assemble(analysis, cuts))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_masks_positions_and_rotary_tables_never_cross(name: str) -> None:
    dag = captured(name)
    needs_weights = from_weights(dag)
    modules = {node.name: node.module for node in dag.nodes}
    for num_stages in (2, 3, 4):
        crossing = {
            item.value.name
            for program in partition(dag, num_stages).programs
            for item in program.inputs
            if item.source is not None
        }
        assert crossing
        assert crossing <= needs_weights
        assert not any("rotary" in modules[value] for value in crossing)


def test_only_the_residual_stream_crosses_between_a_transformers_blocks() -> None:
    cut = partition(captured("llama"), split_points=["model.layers.1", "model.layers.2"])
    for program in cut.programs[:-1]:
        (output,) = program.outputs
        assert output.readers == (program.stage + 1,)
        assert output.value.shape[-1] == 32
        assert len(output.value.shape) == 3


def test_skip_connections_cross_several_stages() -> None:
    cut = partition(captured("two_branches"), split_points=["left.2", "right.0", "right.2"])
    readers = {output.value.name: output.readers for output in cut[0].outputs}
    assert (1, 2, 3) in readers.values()


def mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return mse_loss(output, target)


def uniform(num_layers: int, width: int = 32, rows: int = 16) -> OperatorDag:
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(num_layers)]
    batch = (torch.randn(rows, width), torch.randn(rows, width))
    return capture(nn.Sequential(*layers), batch, loss=mean_square)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 6])
def test_stages_of_a_uniform_model_are_balanced(num_stages: int) -> None:
    cut = partition(uniform(12), num_stages)
    seconds = [estimate.seconds for estimate in cut.estimates]
    assert max(seconds) <= 1.2 * sum(seconds) / num_stages
    linears = [sum(n.op == "aten.linear.default" for n in p.nodes) for p in cut.programs]
    assert sum(linears) == 12
    assert max(linears) <= 12 // num_stages + 1


def test_cuts_avoid_places_where_much_crosses() -> None:
    class Bulge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen = nn.ModuleList(nn.Linear(8, 256) for _ in range(6))
            self.narrow = nn.ModuleList(nn.Linear(256, 8) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for widen, narrow in zip(self.widen, self.narrow, strict=True):
                x = narrow(torch.relu(widen(x)))
            return x

    dag = capture(Bulge(), (torch.randn(16, 8), torch.randn(16, 8)), loss=mean_square)
    for program in partition(dag, 3).programs[:-1]:
        assert [output.value.shape[-1] for output in program.outputs] == [8]


def test_a_stage_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    dag = uniform(4, width=64)
    with pytest.raises(
        StageTooLarge,
        match=r"Stage \d of 2 needs about [\d.]+ kB: 33.3 kB of weights.* micro-batches in flight "
        r"with [\d.]+ kB of activations each; its worker has 50 kB. Use more stages",
    ):
        partition(dag, 2, memory_limit_bytes=50_000)


def test_a_memory_limit_moves_the_cuts() -> None:
    dag = uniform(12, width=16, rows=256)
    free = partition(dag, 3)
    # The first stage keeps the activations of three micro-batches, the last of one.
    limit = max(e.memory_bytes for e in free.estimates) - 1
    tight = partition(dag, 3, memory_limit_bytes=limit)
    assert tight.cuts != free.cuts
    assert max(e.memory_bytes for e in tight.estimates) <= limit
    # Within the slack that the planner has for choosing a cut where less crosses.
    slowest = [max(e.seconds for e in cut.estimates) for cut in (tight, free)]
    assert slowest[0] >= slowest[1] / 1.03


def test_estimates_count_weights_and_activations_in_flight() -> None:
    training = TrainingMemory(moments=1.0, copies=False, num_microbatches=4, journal_steps=1)
    cut = partition(uniform(4, width=64), 2, training=training)
    assert [e.needs.in_flight for e in cut.estimates] == [2, 1]
    for estimate in cut.estimates:
        needs = estimate.needs
        assert needs.weight_bytes == 2 * (64 * 64 + 64) * 4
        assert needs.state_bytes == 3 * needs.weight_bytes
        assert needs.spool_bytes == 4 * 16 * 64 * 4  # the first's values, the last's gradients
        activation_bytes = needs.in_flight * needs.activation_bytes
        assert estimate.memory_bytes == needs.state_bytes + needs.spool_bytes + activation_bytes
    assert cut.estimates[0].output_bytes == 16 * 64 * 4
    assert cut.estimates[0].flops >= 2 * (2 * 16 * 64 * 64)


def test_micro_batches_beyond_1f1b_stay_within_the_memory() -> None:
    cut = partition(uniform(6, width=64), 6)

    def limits(memory_bytes: int | None, workers: Sequence[str] = "abc") -> Sequence[int]:
        placement = [stage % len(workers) for stage in range(6)]
        memory = None if memory_bytes is None else [memory_bytes] * len(workers)
        return Plan.placed(cut, placement, workers, 16, memory_bytes=memory).limits

    assert limits(None) == (7, 6, 5, 4, 3, 1)
    more = in_flight_limits(6, slack=1)
    needed = [
        worker_bytes([replace(e.needs, in_flight=limit)])
        for e, limit in zip(cut.estimates, more, strict=True)
    ]
    one_more = max(needed[0] + needed[3], needed[1] + needed[4], needed[2] + needed[5])
    assert limits(one_more) == (7, 6, 5, 4, 3, 1)
    assert limits(one_more - 1) == (6, 5, 4, 3, 2, 1)
    assert limits(None, workers="abcdef") == (6, 5, 4, 3, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 0}, "at least 1; found 0"),
        ({"num_stages": 1000}, r"has \d+ parts.*can't be cut into 1000 stages"),
        ({}, "either num_stages= or split_points="),
        ({"num_stages": 2, "split_points": ["1"]}, "only one of them"),
        ({"split_points": ["9"]}, r"No operator belongs to the module '9'. Modules.*0.0, 0.1"),
        ({"split_points": ["0"]}, "can't be cut before '0': nothing comes before it"),
        ({"split_points": ["2", "1"]}, r"order in which the model runs them; found \['2', '1'\]"),
        ({"split_points": ["1", "1"]}, "must be different"),
    ],
)
def test_a_cut_that_does_not_exist_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanInvalid, match=message):
        partition(uniform(3), **options)


def test_split_points_cut_before_their_modules() -> None:
    cut = partition(uniform(4), split_points=["1", "3"])
    modules = [{node.module.partition(".")[0] for node in p.nodes} for p in cut.programs]
    assert modules == [{"0"}, {"1", "2"}, {"3", ""}]


def test_a_partition_prints_a_line_for_each_stage() -> None:
    cut = partition(uniform(4), 2)
    heading, *rows = str(cut).splitlines()
    assert heading.split()[:3] == ["stage", "operators", "FLOPs"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert [row.split()[-1] for row in rows] == ["1", "-"]


class WritesInPlace(nn.Module):
    """Writes activations, views of them, and its input in place, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        left = features[:, :4]
        features.mul_(0.5)
        hidden = torch.tanh(self.first(features)) * 1.5
        view = hidden[:, 2:6]
        hidden.add_(features)
        hidden[:, 0] = 0.25
        more = torch.relu_(self.second(hidden))
        view = view * 2
        output: torch.Tensor = self.third(more)
        output[:, :4] += view + left
        return output


def test_memory_that_is_written_in_place_is_never_cut_from_its_writers() -> None:
    example = Example(WritesInPlace(), lambda rows: (torch.randn(rows, 8),) * 2, mean_square)
    dag = capture(example.model, example.batch(3), loss=example.loss)
    written = {name for node in dag.nodes for name in mutated_arguments(node)}
    assert len(written) >= 4
    whole = run_inline(example, 1, dag=dag)
    losses, weights = whole.losses, whole.weights(5)
    for num_stages in (2, 3, None):
        cut = run_inline(example, num_stages, dag=dag)
        assert_valid(dag, cut.cut.cuts, cut.cut.programs)
        assert cut.losses == losses
        assert_same_bits(cut.weights(5), weights)
    assert any(aliased_arguments(node) for node in dag.nodes)
