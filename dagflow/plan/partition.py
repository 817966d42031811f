"""Cuts an operator DAG into stages that balance the slowest one.

Stages are segments of the execution order, so they are convex by construction, and the order of
operators, and with it the order of every sum, is that of the uncut model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dagflow.errors import PlanInvalid, StageTooLarge
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.dag import OperatorDag
from dagflow.graph.show import amount
from dagflow.plan.assemble import assemble
from dagflow.plan.cuts import Chain, can_be_cut, fewest_bytes, least, least_slowest
from dagflow.plan.memory import StageNeeds, bytes_by_worker, worker_bytes
from dagflow.plan.training_memory import TrainingMemory
from dagflow_tasks.program.stage_program import StageProgram

# What a cut can't see, borrowed weights above all, and what stages of one worker take together is found
# out afterwards; the cut is then made anew with less memory, so often at most.
_MAX_CUTS = 8
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
    needs : StageNeeds
        What it takes of its worker's memory, with as many micro-batches in flight as 1F1B has.
    output_bytes : int
        Boundary values of one micro-batch.
    """

    flops: int
    seconds: float
    needs: StageNeeds
    output_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All that it takes of a worker that has no other stage."""
        return worker_bytes([self.needs])


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
                f"{e.seconds / slowest:>5.0%}  {amount(e.needs.weight_bytes, 'B'):>8}  "
                f"{amount(e.needs.activation_bytes, 'B'):>11}  {e.needs.in_flight:>9}  "
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
    training: TrainingMemory | None = None,
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
        Memory for a stage.
    training : TrainingMemory, optional
        What decides how much memory stages take; AdamW's by default.

    Raises
    ------
    PlanInvalid
        If the DAG can't be cut that often or there.
    StageTooLarge
        If some stage needs more than `memory_limit_bytes` however the DAG is cut.
    """
    if (num_stages is None) == (split_points is None):
        raise PlanInvalid("Give either num_stages= or split_points=, and only one of them.")
    analysis, training = DagAnalysis(dag), training or TrainingMemory()
    cuts = None if split_points is None else cuts_at_modules(analysis, split_points)
    wanted = num_stages if cuts is None else len(cuts) + 1
    assert wanted is not None
    if memory_limit_bytes is not None:
        limits = [memory_limit_bytes] * wanted
        return fitting(analysis, range(wanted), limits, training, cuts)
    return build(analysis, cuts or balanced_cuts(analysis, wanted, None, training), training)


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
    return build(analysis, _without_empty_stages(analysis, cuts), TrainingMemory())


def _without_empty_stages(analysis: DagAnalysis, cuts: list[int]) -> list[int]:
    """Drop the cuts after which a stage would have nothing to do (dead or cheap operators only)."""
    programs = assemble(analysis, cuts)
    starts = [0, *cuts]
    kept = [starts[program.stage] for program in programs if program.nodes]
    return [cut for cut in kept if cut > 0]


def fitting(
    analysis: DagAnalysis,
    placement: Sequence[int],
    memory_bytes: Sequence[int],
    training: TrainingMemory,
    cuts: Sequence[int] | None = None,
) -> Partition:
    """Return a cut with which every worker has the memory for all its stages.

    Parameters
    ----------
    placement
        Worker of each stage.
    memory_bytes
        Of each worker.
    cuts
        The cuts, if they are given.

    Raises
    ------
    StageTooLarge
    """
    limits = [float(max(1, memory_bytes[worker])) for worker in placement]
    refusal: StageTooLarge | None = None
    for _ in range(_MAX_CUTS):
        try:
            chosen = cuts or balanced_cuts(analysis, len(placement), limits, training)
        except StageTooLarge as error:
            raise refusal or error from None
        cut = build(analysis, chosen, training)
        needed = bytes_by_worker([e.needs for e in cut.estimates], placement)
        share = {worker: memory_bytes[worker] / max(1, needed[worker]) for worker in needed}
        if min(share.values()) >= 1:
            return cut
        refusal = _refusal(cut, placement, memory_bytes, share)
        if cuts:
            break
        limits = _narrower(
            limits, placement, memory_bytes, cut, _seen_bytes(analysis, cut, training)
        )
    assert refusal is not None
    raise refusal


def _seen_bytes(analysis: DagAnalysis, cut: Partition, training: TrainingMemory) -> list[float]:
    """Return what `balanced_cuts` sees each stage take of its worker's memory."""
    bounds = [0, *cut.cuts, len(analysis.dag.nodes)]
    chain = _chain(analysis, bounds, training)
    in_flight = np.array([estimate.needs.in_flight for estimate in cut.estimates])
    seen = np.diff(chain.state_bytes) + in_flight * np.diff(chain.saved_bytes)
    return [float(num_bytes) for num_bytes in seen]


def _narrower(
    limits: Sequence[float],
    placement: Sequence[int],
    memory_bytes: Sequence[int],
    cut: Partition,
    seen: Sequence[float],
) -> list[float]:
    """Return limits that leave room for what wasn't seen, to the stages whose worker is too small.

    Its stages shrink alike, so each of them has to: the next cut is another one.
    """
    total = bytes_by_worker([estimate.needs for estimate in cut.estimates], placement)
    movable = dict.fromkeys(placement, 0.0)
    for worker, num_bytes in zip(placement, seen, strict=True):
        movable[worker] += num_bytes
    return [
        limit
        if total[worker] <= memory_bytes[worker]
        else max(1.0, num_bytes * (1 - (total[worker] - memory_bytes[worker]) / movable[worker]))
        for limit, worker, num_bytes in zip(limits, placement, seen, strict=True)
    ]


def _refusal(
    cut: Partition,
    placement: Sequence[int],
    memory_bytes: Sequence[int],
    share: Mapping[int, float],
) -> StageTooLarge:
    """Return what says of the worker that lacks most what it would need."""
    worker = min(share, key=lambda worker: share[worker])
    stages = [stage for stage, place in enumerate(placement) if place == worker]
    if len(stages) == 1:
        estimate = cut.estimates[stages[0]]
        return StageTooLarge(_too_large(stages[0], estimate, len(cut), memory_bytes[worker]))
    needed = worker_bytes(cut.estimates[stage].needs for stage in stages)
    return StageTooLarge(
        f"The stages {', '.join(map(str, stages))} of {len(cut)} need about {amount(needed, 'B')} "
        f"together; their worker has {amount(memory_bytes[worker], 'B')}. Use more workers, smaller "
        "micro-batches, or workers with more memory."
    )


def build(analysis: DagAnalysis, cuts: Sequence[int], training: TrainingMemory) -> Partition:
    """Return the stages between cuts, and what each costs."""
    programs = assemble(analysis, cuts)
    estimates = tuple(_estimate(analysis, program, cuts, training) for program in programs)
    return Partition(tuple(cuts), programs, estimates)


def _too_large(stage: int, e: StageEstimate, num_stages: int, limit: float) -> str:
    """Say why a stage fits nowhere."""
    return (
        f"Stage {stage} of {num_stages} needs about {amount(e.memory_bytes, 'B')}: "
        f"{amount(e.needs.weight_bytes, 'B')} of weights, with gradients, optimizer and a copy for "
        f"snapshots {amount(e.needs.state_bytes, 'B')}, and {e.needs.in_flight} micro-batches in flight "
        f"with {amount(e.needs.activation_bytes, 'B')} of activations each; its worker has "
        f"{amount(limit, 'B')}. Use more stages, smaller micro-batches, or workers with more memory."
    )


def _estimate(
    analysis: DagAnalysis, program: StageProgram, cuts: Sequence[int], training: TrainingMemory
) -> StageEstimate:
    bounds = [0, *cuts, len(analysis.dag.nodes)]
    span = slice(bounds[program.stage], bounds[program.stage + 1])
    outputs = sum(analysis.dag.tensor_bytes(o.value.dtype, o.value.shape) for o in program.outputs)
    saved_bytes = sum(analysis.saved_bytes[span])
    return StageEstimate(
        flops=sum(analysis.dag.info[node.name].flops for node in program.nodes),
        seconds=sum(analysis.node_seconds[span]),
        needs=training.needs(analysis.dag, program, saved_bytes),
        output_bytes=outputs,
    )


def _allowed_cuts(analysis: DagAnalysis) -> list[int]:
    return [c for c in range(1, len(analysis.dag.nodes)) if c not in analysis.forbidden_cuts]


def cuts_at_modules(analysis: DagAnalysis, split_points: Sequence[str]) -> list[int]:
    """Return the cuts before the first operator of each of these modules.

    Raises
    ------
    PlanInvalid
        If there is no such module, or no cut.
    """
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


def balanced_cuts(
    analysis: DagAnalysis,
    num_stages: int,
    limits: Sequence[float] | None,
    training: TrainingMemory,
) -> list[int]:
    """Minimise the slowest stage, then the bytes that cross.

    Parameters
    ----------
    limits
        Memory for each stage, if there are any. Borrowed weights and the journal's spool aren't seen
        here, only in what `build` returns.

    Raises
    ------
    PlanInvalid
        If the DAG has fewer parts.
    StageTooLarge
        If there is no such cut.
    """
    if num_stages < 1:
        raise PlanInvalid(f"num_stages must be at least 1; found {num_stages}.")
    if num_stages == 1:
        return []
    points = _candidates(analysis, num_stages)
    chain = _chain(analysis, points, training)
    in_flight = [num_stages - stage for stage in range(num_stages)]
    ends = chain.within_memory(in_flight, limits or [np.inf] * num_stages)
    if limits is not None and not can_be_cut(ends):
        raise StageTooLarge(_what_is_too_large(analysis, points, chain, limits, training))
    slowest = chain.within_seconds(_BALANCE_SLACK * least_slowest(chain, ends))
    return [points[i] for i in fewest_bytes(chain, [np.minimum(e, slowest) for e in ends])]


def _what_is_too_large(
    analysis: DagAnalysis,
    points: Sequence[int],
    chain: Chain,
    limits: Sequence[float],
    training: TrainingMemory,
) -> str:
    """Name the stage that needs most of what it may have, however the DAG is cut."""
    in_flight = [len(limits) - stage for stage in range(len(limits))]

    def ends(factor: float) -> list[np.ndarray]:
        return chain.within_memory(in_flight, [factor * limit for limit in limits])

    enough = 1.0
    while not can_be_cut(ends(enough)):
        enough *= 2
    factor = least(lambda factor: can_be_cut(ends(factor)), 1.0, enough)
    cut = build(analysis, [points[i] for i in fewest_bytes(chain, ends(factor))], training)
    needed = [e.memory_bytes / limit for e, limit in zip(cut.estimates, limits, strict=True)]
    stage = needed.index(max(needed))
    return _too_large(stage, cut.estimates[stage], len(cut), limits[stage])


def num_parts(analysis: DagAnalysis) -> int:
    """Return into how many stages the DAG can be cut at most."""
    return len(_places(analysis)) + 1


def _places(analysis: DagAnalysis) -> list[int]:
    """Return where a cut leaves both sides something to do, and sends something."""
    return [
        c
        for c in _allowed_cuts(analysis)
        if analysis.dag.nodes[c - 1].name not in analysis.free_of_parameters
        and analysis.last_reader.get(analysis.dag.nodes[c - 1].name, -1) >= c
    ]


def _candidates(analysis: DagAnalysis, num_stages: int) -> list[int]:
    """Return 0, the places where few bytes cross compared with their neighbours, and the end."""
    crossing, end = analysis.crossing_bytes, len(analysis.dag.nodes)
    allowed = _places(analysis)
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


def _chain(analysis: DagAnalysis, points: Sequence[int], training: TrainingMemory) -> Chain:
    def before(by_node: Sequence[float]) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(by_node, dtype=float)])[list(points)]

    crossing = np.array([0.0, *(analysis.crossing_bytes[c] for c in points[1:-1]), 0.0])
    return Chain(
        before(analysis.node_seconds),
        before(training.state_bytes_by_node(analysis.dag)),
        before(analysis.saved_bytes),
        crossing,
    )
