"""Cuts an operator DAG into stages that balance the slowest one.

Stages are segments of the execution order, so they are convex by construction, and the order of
operators, and with it the order of every sum, is that of the uncut model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.dag import OperatorDag, Parameter, dtype_bytes
from dagflow.graph.show import amount
from dagflow.plan.analysis import DagAnalysis
from dagflow.plan.assemble import assemble
from dagflow_tasks.program import StageProgram

# Weights, gradients and AdamW's two moments, all in the weights' dtype.
DEFAULT_STATE_COPIES = 4

# Of all cuts whose slowest stage is within this factor of the best, take the one with fewest bytes.
_BALANCE_SLACK = 1.03


@dataclass(frozen=True)
class StageEstimate:
    """What a stage is expected to cost at the example batch's sizes.

    Attributes
    ----------
    flops : int
        Forward FLOPs of one micro-batch.
    seconds : float
        Nominal seconds of forward and backward; only ratios between stages mean anything.
    parameter_bytes : int
    activation_bytes : int
        Left behind by one micro-batch's forward for its backward.
    in_flight : int
        Micro-batches under way at once in the 1F1B schedule.
    memory_bytes : int
        Weights, gradients, optimizer state and the activations in flight.
    output_bytes : int
        Boundary values of one micro-batch.
    """

    flops: int
    seconds: float
    parameter_bytes: int
    activation_bytes: int
    in_flight: int
    memory_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Partition:
    """An operator DAG cut into stages: a stage program and an estimate for each.

    Attributes
    ----------
    cuts : tuple[int, ...]
        Positions in the DAG's node list where stages begin, without the first.
    """

    cuts: tuple[int, ...]
    programs: tuple[StageProgram, ...]
    estimates: tuple[StageEstimate, ...]

    def __len__(self) -> int:
        return len(self.programs)

    def __getitem__(self, stage: int) -> StageProgram:
        return self.programs[stage]

    def stage_of_nodes(self) -> dict[str, int]:
        """Stage by node name; a node that several stages recompute counts for the first."""
        stages: dict[str, int] = {}
        for program in self.programs:
            for node in program.nodes:
                stages.setdefault(node.name, program.stage)
        return stages

    def __str__(self) -> str:
        lines = [
            "stage  operators     FLOPs  share   weights  activations  in flight    memory   output"
            "  to"
        ]
        slowest = sum(e.seconds for e in self.estimates) or 1.0
        for program, e in zip(self.programs, self.estimates, strict=True):
            readers = sorted({reader for output in program.outputs for reader in output.readers})
            lines.append(
                f"{program.stage:>5}  {len(program.nodes):>9}  {amount(e.flops, ''):>8}  "
                f"{e.seconds / slowest:>5.0%}  {amount(e.parameter_bytes, 'B'):>8}  "
                f"{amount(e.activation_bytes, 'B'):>11}  {e.in_flight:>9}  "
                f"{amount(e.memory_bytes, 'B'):>8}  {amount(e.output_bytes, 'B'):>7}  "
                f"{', '.join(map(str, readers)) or '-'}"
            )
        return "\n".join(lines)


def partition(
    dag: OperatorDag,
    num_stages: int | None = None,
    *,
    split_points: Sequence[str] | None = None,
    memory_limit_bytes: int | None = None,
    state_copies: int = DEFAULT_STATE_COPIES,
) -> Partition:
    """Cut the DAG into stages.

    Parameters
    ----------
    dag : OperatorDag
    num_stages : int, optional
        Cut into that many, so that the slowest is as fast as possible and few bytes cross.
    split_points : sequence of str, optional
        Or cut before the first operator of each of these modules.
    memory_limit_bytes : int, optional
        Memory of the smallest worker.
    state_copies : int
        Tensors kept for each weight: itself, its gradient, the optimizer's slots.

    Raises
    ------
    PlanInvalid
        If the DAG can't be cut that often or there.
    StageTooLarge
        If some stage needs more than `memory_limit_bytes` however the DAG is cut.
    """
    if (num_stages is None) == (split_points is None):
        raise PlanInvalid("Give either num_stages= or split_points=, and only one of them.")
    analysis = DagAnalysis(dag)
    if split_points is not None:
        cuts = _cuts_at_modules(analysis, split_points)
    else:
        assert num_stages is not None
        cuts = _balanced_cuts(analysis, num_stages, memory_limit_bytes, state_copies)
    return _build(analysis, cuts, memory_limit_bytes, state_copies)


def partition_by_operator(dag: OperatorDag) -> Partition:
    """Cut everywhere a cut is possible: nearly every operator becomes a stage of its own.

    Far too fine to be fast; the reference that coarser stages are checked against.
    """
    analysis = DagAnalysis(dag)
    cuts = [
        cut
        for cut in _allowed_cuts(analysis)
        if dag.nodes[cut - 1].name not in analysis.free_of_parameters
    ]
    return _build(analysis, _without_empty_stages(analysis, cuts), None, DEFAULT_STATE_COPIES)


def _without_empty_stages(analysis: DagAnalysis, cuts: list[int]) -> list[int]:
    """Drop the cuts after which a stage would have nothing to do (dead or cheap operators only)."""
    programs = assemble(analysis, cuts)
    starts = [0, *cuts]
    kept = [starts[program.stage] for program in programs if program.nodes]
    return [cut for cut in kept if cut > 0]


def _build(
    analysis: DagAnalysis, cuts: Sequence[int], memory_limit_bytes: int | None, state_copies: int
) -> Partition:
    programs = assemble(analysis, cuts)
    estimates = tuple(_estimate(analysis, program, cuts, state_copies) for program in programs)
    for stage, estimate in enumerate(estimates):
        if memory_limit_bytes is not None and estimate.memory_bytes > memory_limit_bytes:
            raise StageTooLarge(_too_large(stage, len(programs), estimate, memory_limit_bytes))
    return Partition(tuple(cuts), programs, estimates)


def _too_large(stage: int, num_stages: int, e: StageEstimate, limit: int) -> str:
    return (
        f"Stage {stage} of {num_stages} needs about {amount(e.memory_bytes, 'B')}: "
        f"{amount(e.parameter_bytes, 'B')} of weights with gradients and optimizer state, and "
        f"{e.in_flight} micro-batches in flight with {amount(e.activation_bytes, 'B')} of "
        f"activations each; the smallest worker has {amount(limit, 'B')}. Use more stages, smaller "
        "micro-batches, or workers with more memory."
    )


def _estimate(
    analysis: DagAnalysis, program: StageProgram, cuts: Sequence[int], state_copies: int
) -> StageEstimate:
    bounds = [0, *cuts, len(analysis.dag.nodes)]
    span = range(bounds[program.stage], bounds[program.stage + 1])
    by_name = {parameter.name: parameter for parameter in analysis.dag.parameters}
    weights = {use.parameter for use in program.parameters}
    parameter_bytes = sum(
        by_name[name].num_elements * dtype_bytes(by_name[name].dtype) for name in weights
    )
    activation_bytes = sum(analysis.saved_bytes[i] for i in span)
    in_flight = program.num_stages - program.stage
    outputs = sum(analysis.dag.tensor_bytes(o.value.dtype, o.value.shape) for o in program.outputs)
    return StageEstimate(
        flops=sum(analysis.dag.info[node.name].flops for node in program.nodes),
        seconds=sum(analysis.node_seconds[i] for i in span),
        parameter_bytes=parameter_bytes,
        activation_bytes=activation_bytes,
        in_flight=in_flight,
        memory_bytes=parameter_bytes * state_copies + activation_bytes * in_flight,
        output_bytes=outputs,
    )


def _allowed_cuts(analysis: DagAnalysis) -> list[int]:
    return [c for c in range(1, len(analysis.dag.nodes)) if c not in analysis.forbidden_cuts]


def _cuts_at_modules(analysis: DagAnalysis, split_points: Sequence[str]) -> list[int]:
    cuts = []
    for path in split_points:
        found = [
            i
            for i, node in enumerate(analysis.dag.nodes)
            if node.module == path or node.module.startswith(f"{path}.")
        ]
        if not found:
            modules = sorted({node.module for node in analysis.dag.nodes if node.module})
            raise PlanInvalid(
                f"No operator belongs to the module {path!r}. Modules with operators: "
                f"{', '.join(modules[:12])}{', ...' if len(modules) > 12 else ''}."
            )
        cut = next((c for c in range(found[0], 0, -1) if c not in analysis.forbidden_cuts), 0)
        if cut == 0:
            raise PlanInvalid(f"The model can't be cut before {path!r}: nothing comes before it.")
        cuts.append(cut)
    if sorted(set(cuts)) != cuts:
        raise PlanInvalid(
            f"Split points must be different and in the order in which the model runs them; found "
            f"{list(split_points)}."
        )
    return cuts


def _balanced_cuts(
    analysis: DagAnalysis, num_stages: int, memory_limit_bytes: int | None, state_copies: int
) -> list[int]:
    """Minimise the slowest stage, then the bytes that cross, by dynamic programming over cuts."""
    if num_stages < 1:
        raise PlanInvalid(f"num_stages must be at least 1; found {num_stages}.")
    if num_stages == 1:
        return []
    points = _candidates(analysis, num_stages)
    seconds, memory = _segment_costs(analysis, points, num_stages, state_copies)
    if memory_limit_bytes is not None:
        seconds = np.where(memory <= memory_limit_bytes, seconds, np.inf)
    best = _bottleneck(seconds)
    if not np.isfinite(best):
        cuts = _cheapest(
            points, _segment_costs(analysis, points, num_stages, state_copies)[1], None
        )
        worst = _build(analysis, cuts, None, state_copies).estimates
        stage = max(range(num_stages), key=lambda s: worst[s].memory_bytes)
        assert memory_limit_bytes is not None
        raise StageTooLarge(_too_large(stage, num_stages, worst[stage], memory_limit_bytes))
    crossing = np.array([analysis.crossing_bytes[c] for c in points[1:-1]], dtype=float)
    return _cheapest(points, seconds, (best * _BALANCE_SLACK, crossing))


def _candidates(analysis: DagAnalysis, num_stages: int) -> list[int]:
    """Return 0, the places where few bytes cross compared with their neighbours, and the end."""
    crossing, end = analysis.crossing_bytes, len(analysis.dag.nodes)
    allowed = [
        c
        for c in _allowed_cuts(analysis)
        if analysis.dag.nodes[c - 1].name not in analysis.free_of_parameters
        and analysis.last_reader.get(analysis.dag.nodes[c - 1].name, -1) >= c
    ]
    low = [
        c
        for i, c in enumerate(allowed)
        if (i == 0 or crossing[c] <= crossing[allowed[i - 1]])
        and (i == len(allowed) - 1 or crossing[c] <= crossing[allowed[i + 1]])
    ]
    chosen = low if len(low) >= 4 * num_stages else allowed
    if len(chosen) < num_stages - 1:
        raise PlanInvalid(
            f"The model has {len(chosen) + 1} parts that can be told apart; it can't be cut into "
            f"{num_stages} stages."
        )
    return [0, *chosen, end]


def _segment_costs(
    analysis: DagAnalysis, points: Sequence[int], num_stages: int, state_copies: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds and memory of every segment, as arrays (stage, begin, end)."""
    index = np.array(points)
    seconds = np.concatenate([[0.0], np.cumsum(analysis.node_seconds)])[index]
    saved = np.concatenate([[0.0], np.cumsum(analysis.saved_bytes)])[index]
    first_use: dict[str, tuple[int, Parameter]] = {}
    for i, node in enumerate(analysis.dag.nodes):
        for name in node.references():
            parameter = analysis.parameter_uses.get(name)
            if parameter is not None:
                first_use.setdefault(parameter.name, (i, parameter))
    weights = np.zeros(len(analysis.dag.nodes) + 1)
    for i, parameter in first_use.values():
        weights[i + 1] += parameter.num_elements * dtype_bytes(parameter.dtype) * state_copies
    weights = np.cumsum(weights)[index]
    in_flight = (num_stages - np.arange(num_stages))[:, None, None]

    def between(prefix: np.ndarray) -> np.ndarray:
        difference = prefix[None, :] - prefix[:, None]
        forward = np.arange(len(prefix))[None, :] > np.arange(len(prefix))[:, None]
        return np.where(forward, difference, np.inf)[None]

    memory = between(weights) + between(saved) * in_flight
    return np.broadcast_to(between(seconds), memory.shape), memory


def _bottleneck(seconds: np.ndarray) -> float:
    """Return the least possible cost of the slowest stage."""
    reach = np.full(seconds.shape[1], np.inf)
    reach[0] = 0.0
    for stage_seconds in seconds:
        reach = np.maximum(reach[:, None], stage_seconds).min(axis=0)
    return float(reach[-1])


def _cheapest(
    points: Sequence[int], cost: np.ndarray, bound: tuple[float, np.ndarray] | None
) -> list[int]:
    """Return the cuts of least total price by dynamic programming.

    With a bound (largest cost of a stage, price of every inner point) the price is the bytes that
    cross; without one it is the largest cost itself.
    """
    num_points = len(points)
    total = np.full(num_points, np.inf)
    total[0] = 0.0
    choices = []
    for stage_cost in cost:
        if bound is None:
            step = np.maximum(total[:, None], stage_cost)
        else:
            limit, price = bound
            priced = np.concatenate([[0.0], price, [0.0]])
            step = total[:, None] + np.where(stage_cost <= limit, priced[None, :], np.inf)
        choices.append(step.argmin(axis=0))
        total = step.min(axis=0)
    position, cuts = num_points - 1, []
    for choice in reversed(choices):
        position = int(choice[position])
        cuts.append(points[position])
    return cuts[-2::-1]
