"""Rebuilding a stage that was lost: its newest snapshot, then its steps again from the journal.

State = snapshot + journal. A stage's part of a step depends on its own weights and on what came in
over its boundary; the journal has the latter, so one stage is computed again alone, on any worker,
by the very functions that computed it first. The bits are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagflow_storage import DamagedData, NotFound, Snapshot, list_snapshots
from dagflow_storage.place import fields
from dagflow_storage.place.documents import sound
from dagflow_storage.records.journal import read_segments
from dagflow_tasks.errors import StateLost
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.arguments import BackwardArguments, UpdateArguments
from dagflow_tasks.train.cache import CACHE, state_lost
from dagflow_tasks.train.gradient_sums import SUMS
from dagflow_tasks.train.references import Microbatch, StageRef, StateRef
from dagflow_tasks.train.results import (
    BackwardResult,
    Decision,
    ForwardResult,
    StageResult,
    Tensors,
    UpdateResult,
)
from dagflow_tasks.train.state import load_state, state_tensors
from dagflow_tasks.train.tasks import backward, forward, forward_backward
from dagflow_tasks.train.update import update
from dagflow_tasks.train.worker_journal import JOURNAL, EntryKey, Sent

_FLUSH_SECONDS = 120.0
# What entries say besides their tensors, by kind.
_FACTS = {
    "backward": ("non_finite", "losses"),
    "weights": ("non_finite", "losses"),
    "update": ("non_finite", "decision"),
}


@dataclass(frozen=True)
class StepRecord:
    """What a step was computed from, tensors aside. Kept in the run's ledger.

    Attributes
    ----------
    step : int
    microbatches : tuple of Microbatch
    learning_rate_factor : float
    decision : Decision or None
        What was decided on its gradients, in a run that clips or scales.
    samples : mapping
        Which samples of the data were in its batch, for people and programs that ask.
    """

    step: int
    microbatches: tuple[Microbatch, ...]
    learning_rate_factor: float
    decision: Decision | None = None
    samples: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "microbatches": [
                [m.weight, _pairs(m.sizes), *([_pairs(m.numbers)] if m.numbers else [])]
                for m in self.microbatches
            ],
            "learning_rate_factor": self.learning_rate_factor,
            "decision": self.decision.to_json() if self.decision is not None else None,
            "samples": dict(self.samples),
        }

    @classmethod
    def from_json(cls, body: Any) -> StepRecord:
        """Return what a row of the ledger says.

        Raises
        ------
        DamagedData
        """
        with sound("a row of the ledger is damaged"):
            wanted = ("step", "microbatches", "learning_rate_factor", "decision", "samples")
            given = fields.members(body, "it", *wanted)
            step = fields.integer(given["step"], "step")
            listed = enumerate(fields.items(given["microbatches"], "microbatches"))
            decision = given["decision"]
            return cls(
                step,
                tuple(_microbatch(step, index, item) for index, item in listed),
                fields.number(given["learning_rate_factor"], "learning_rate_factor"),
                Decision.from_json(decision) if decision is not None else None,
                fields.members(given["samples"], "samples"),
            )


def _microbatch(step: int, index: int, item: Any) -> Microbatch:
    weight, *named = fields.items(item, "a micro-batch") or [None]
    if not 1 <= len(named) <= 2:
        raise ValueError(f"a micro-batch has {len(named)} lists")
    sizes, *numbers = ([_pair(pair) for pair in fields.items(n, "pairs")] for n in named)
    for name, size in sizes:
        fields.integer(size, f"the size {name!r}")
    for name, number in (pair for pairs in numbers for pair in pairs):
        _check_numbers(number, f"the number {name!r}")
    return Microbatch(
        step, index, fields.number(weight, "a weight"), tuple(sizes), *map(tuple, numbers)
    )


def _pair(pair: Any) -> tuple[str, Any]:
    if len(fields.items(pair, "a pair")) != 2:
        raise ValueError(f"a pair is {fields.shown(pair)}")
    return fields.text(pair[0], "a name"), pair[1]


def _check_numbers(value: Any, what: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_numbers(item, what)
    elif type(value) is not bool:
        fields.number(value, what)


def _pairs(named: Iterable[tuple[str, Any]]) -> list[list[Any]]:
    return [[name, number] for name, number in named]


@dataclass(frozen=True)
class Neighbours:
    """Whom a stage has to do with besides the sources that its program names.

    Attributes
    ----------
    borrowers : tuple of int
        Stages that use parameters of this one.
    scaled : bool
        Whether this stage computes a loss that is scaled.
    read_batch : callable or None
        ``read_batch(step, index)`` reads a micro-batch's tensors, where workers read the data
        themselves; the journal has them otherwise.
    """

    borrowers: tuple[int, ...] = ()
    scaled: bool = False
    read_batch: Callable[[int, int], TensorDict] | None = None


@dataclass(frozen=True)
class StageProgress:
    """How far a stage has got on its worker.

    Attributes
    ----------
    stage : int
    step : int
        Steps that its weights have taken; -1 if its worker doesn't know the stage.
    forwards, halves : frozenset of (step, micro-batch)
        Micro-batches that wait for their backward, as ``F`` is done; and for ``W``, as ``I`` is.
    place : (step, micro-batch)
        The last micro-batch whose gradients are in the sums; (-1, -1) if there are no sums.
    """

    stage: int
    step: int
    forwards: frozenset[tuple[int, int]] = frozenset()
    halves: frozenset[tuple[int, int]] = frozenset()
    place: tuple[int, int] = (-1, -1)


def needed_entries(
    program: StageProgram, neighbours: Neighbours, microbatches: Sequence[Microbatch]
) -> list[EntryKey]:
    """Return the journal's entries that a replay of one step of a stage reads."""
    stage = program.stage
    keys = [EntryKey("lend", owner, stage) for owner in program.lenders]
    keys += [EntryKey("return", borrower, stage) for borrower in neighbours.borrowers]
    for microbatch in microbatches:
        index = microbatch.index
        if program.batch_inputs and neighbours.read_batch is None:
            keys.append(EntryKey("batch", stage, index))
        keys += [EntryKey("forward", source, index) for source in program.sources]
        keys += [EntryKey("backward", source, index) for source in program.gradient_sources]
    return keys


def reach(
    ref: StageRef,
    programs: Sequence[StageProgram],
    neighbours: Sequence[Neighbours],
    snapshot: int,
    records: Mapping[int, StepRecord],
) -> int:
    """Return the latest step that every stage can be brought to from the store alone.

    Parameters
    ----------
    ref
        Any stage's: says which store and plan.
    snapshot : int
        Step of the newest snapshot.
    records
        The ledger.
    """
    step = snapshot
    while ref.journal and step in records:
        there = {key for s in read_segments(ref.store, ref.plan, step) for key in s.facts}
        microbatches = records[step].microbatches
        for program, known in zip(programs, neighbours, strict=True):
            if not there.issuperset(needed_entries(program, known, microbatches)):
                return step
        step += 1
    return step


def progress(ref: StageRef) -> StageProgress:
    """Say how far a stage is on this worker, with its journal so far written to the store.

    What is half done by a task that failed counts as not there.
    """
    if not JOURNAL.flush(_FLUSH_SECONDS):
        raise StateLost(f"The journal could not be written: {JOURNAL.stats().trouble}")
    with CACHE.lock:
        state = CACHE.states.get(ref.key)
        place, sums = CACHE.newest(ref, SUMS)
        if state is None or (sums is not None and sums.place != place):
            return StageProgress(ref.stage, -1)
        graphs = {key[1:]: graph for key, graph in CACHE.graphs.items() if key[0] == ref.key}
    halves = {where for where, graph in graphs.items() if graph.halved}
    forwards = frozenset(where for where, graph in graphs.items() if not graph.halved)
    return StageProgress(ref.stage, state.step, forwards, frozenset(halves), place)


def restore(
    ref: StageRef,
    target: int,
    records: Sequence[StepRecord],
    neighbours: Neighbours,
    turn: tuple[int, int] = (0, 0),
) -> StateRef:
    """Bring a stage to the weights it had after `target` steps, alone.

    Starts from what this worker has of the stage, else from the newest snapshot, and replays the
    steps from there on; run again, it finds its own work.

    Parameters
    ----------
    records
        The steps since a snapshot, in order, up to `target`.
    turn
        Grows with every rebuilding of a run. When a worker leaves, dask runs tasks again whose
        results it has dropped; a rebuilding whose turn is over must not take a stage back that has
        gone on since.

    Raises
    ------
    StateLost
        If the journal lacks something. No snapshot and journal lead there: go back to a step that
        all stages can reach.
    """
    latest, known = CACHE.turns.get(ref.key, (0, 0)), CACHE.states.get(ref.key)
    if latest > turn or (latest == turn and known is not None and known.step >= target):
        return StateRef(target)
    CACHE.turns[ref.key] = turn
    began = time.perf_counter()
    CACHE.begin_again(ref)
    by_step = {record.step: record for record in records}
    begin = _begin_from(ref, target, by_step)
    before = _decision_before(ref, begin, by_step) if neighbours.scaled and begin < target else None
    for step in range(begin, target):
        replay_step(ref, by_step[step], before, neighbours)
        before = by_step[step].decision
    if CACHE.tell is not None:
        tensors = state_tensors(CACHE.executable(ref).program, CACHE.state(ref, target))
        CACHE.tell(
            {
                "action": "restored",
                "run": ref.run_id,
                "stage": ref.stage,
                "step": target,
                "replayed": target - begin,
                "seconds": time.perf_counter() - began,
                "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            }
        )
    return StateRef(target)


def _decision_before(ref: StageRef, step: int, records: Mapping[int, StepRecord]) -> Decision:
    """Return what was decided on the step before one, which holds the step's loss scale.

    Where no record is left of it, the step's snapshot says it.
    """
    if step == 0:
        return Decision.initial(scaled=True)
    known = records[step - 1].decision if step - 1 in records else None
    if known is not None:
        return known
    try:
        stored = Snapshot.open(ref.store, step).meta.get("decision")
        with sound(f"the snapshot of step {step} in {ref.store!r} is damaged"):
            return Decision.from_json(stored)
    except (NotFound, DamagedData) as error:
        raise StateLost(f"Nobody knows the loss scale of step {step}: {error}") from error


def drop_stage(ref: StageRef, turn: tuple[int, int]) -> None:
    """Free a worker's memory of a stage that another worker has now, or that it was warmed for in vain.

    What the stage has sent is still found in the journal, and a copy for a snapshot is still written.

    Parameters
    ----------
    turn
        As in `restore`: if the stage has come back here since, it stays.
    """
    with CACHE.stage_lock(ref):  # a rebuilding that is under way keeps nothing afterwards
        if CACHE.turns.get(ref.key, (0, 0)) <= turn:
            CACHE.turns[ref.key] = turn
            CACHE.forget_stage(ref)


def _begin_from(ref: StageRef, target: int, records: Mapping[int, StepRecord]) -> int:
    """Put the latest state that can be had into the cache, and return its step."""
    with CACHE.lock:
        cached = CACHE.states.get(ref.key)
        if cached is not None and cached.step > target:
            del CACHE.states[ref.key]
            cached = None
    if cached is not None and _covered(cached.step, target, records):
        return cached.step
    executable = CACHE.executable(ref)
    damage = ""
    for step in reversed([step for step in list_snapshots(ref.store) if step <= target]):
        if not _covered(step, target, records):
            continue
        try:
            state = load_state(ref, executable.program, step, executable.device)
        except DamagedData as error:
            damage = f" {error}"
            continue
        with CACHE.lock:
            CACHE.states[ref.key] = state
        return step
    raise StateLost(
        f"No snapshot and journal lead to the weights of stage {ref.stage} after step {target}."
        + damage
    )


def _covered(step: int, target: int, records: Mapping[int, StepRecord]) -> bool:
    return all(between in records for between in range(step, target))


def replay_step(
    ref: StageRef, record: StepRecord, before: Decision | None, neighbours: Neighbours
) -> None:
    """Compute a stage's part of one step again, from the journal.

    Parameters
    ----------
    before
        The decision of the step before, which holds the loss scale; needed if the loss is scaled.
    """
    program = CACHE.executable(ref).program
    needed = needed_entries(program, neighbours, record.microbatches)
    JOURNAL.look(ref, record.step, {key.stage for key in needed})
    read = _Reader(ref, program, neighbours, record.step)
    tied = [read.tensors("lend", o, program.stage) for o in program.lenders]
    scaling = before if neighbours.scaled else None
    there: StageResult | None = None
    back: BackwardResult | None = None
    for microbatch in record.microbatches:
        work = BackwardArguments(
            ref,
            microbatch,
            read.values(microbatch.index),
            before=there if program.mutated_buffers else None,
            tied=tied,
            gradients=read.gradients(microbatch.index),
            scaling=scaling,
            previous=back,
        )
        if program.stage == program.num_stages - 1:
            there = back = forward_backward(work)
        else:
            there, back = forward(work), backward(work)
    assert back is not None
    update(
        UpdateArguments(
            ref,
            record.step,
            back,
            record.learning_rate_factor,
            [read.tensors("return", b, program.stage) for b in neighbours.borrowers],
            there if program.mutated_buffers else None,
            record.decision,
        )
    )


class _Reader:
    """Reads what came in over one stage's boundary in one step."""

    def __init__(
        self, ref: StageRef, program: StageProgram, neighbours: Neighbours, step: int
    ) -> None:
        self.ref = ref
        self.program = program
        self.neighbours = neighbours
        self.step = step

    def tensors(
        self, kind: str, stage: int, index: int, names: Sequence[str] | None = None
    ) -> TensorDict:
        return TensorDict(_found(self.ref, self.step, EntryKey(kind, stage, index), names).tensors)

    def values(self, index: int) -> list[Tensors]:
        parts: list[Tensors] = [self._batch(index)] if self.program.batch_inputs else []
        for source in self.program.sources:
            names = self.program.values_from(source)
            parts.append(self.tensors("forward", source, index, names))
        return parts

    def _batch(self, index: int) -> TensorDict:
        if self.neighbours.read_batch is not None:
            return self.neighbours.read_batch(self.step, index)
        return self.tensors("batch", self.program.stage, index)

    def gradients(self, index: int) -> list[BackwardResult]:
        return [
            BackwardResult(
                self.tensors("backward", source, index, self.program.gradients_from(source))
            )
            for source in self.program.gradient_sources
        ]


def _found(ref: StageRef, step: int, key: EntryKey, names: Sequence[str] | None = None) -> Sent:
    try:
        found = JOURNAL.find(ref, step, key, names)
    except (NotFound, DamagedData) as error:
        raise StateLost(f"The journal of step {step} is damaged: {error}") from error
    if found is None:
        raise StateLost(
            f"The journal of step {step} has no {key.kind} of stage {key.stage}, micro-batch "
            f"{key.index}, which stage {ref.stage} needs to be rebuilt."
        )
    return found


def recall(
    ref: StageRef, step: int, kind: str, index: int, names: Sequence[str] | None = None
) -> StageResult | Tensors | Decision | UpdateResult:
    """Return again what a task of this stage returned, without computing it.

    Parameters
    ----------
    names
        The tensors that are wanted, all by default; what a task says besides comes along.
    """
    sent = _found(ref, step, EntryKey(kind, ref.stage, index), names)
    facts, place = sent.facts, (step, index)
    missing = [name for name in _FACTS.get(kind, ()) if name not in facts]
    if missing:
        raise StateLost(
            f"The journal of step {step} lacks {missing} of stage {ref.stage}'s {kind}."
        )
    if kind == "forward":
        return ForwardResult(sent.tensors, None, place)
    if kind in ("backward", "weights"):
        non_finite, losses = tuple(facts["non_finite"]), tuple(facts["losses"])
        return BackwardResult(sent.tensors, None, non_finite, losses, place)
    if kind == "update":
        return UpdateResult(StateRef(step + 1), ref.stage, tuple(facts["non_finite"]))
    return TensorDict(sent.tensors)


def recall_decision(ref: StageRef, step: int) -> Decision:
    """Return what was decided on a step's gradients; every stage that has updated remembers."""
    facts = _found(ref, step, EntryKey("update", ref.stage, 0)).facts
    if facts.get("decision") is None:
        raise state_lost(ref, "decision", (step, 0))
    return Decision.from_json(facts["decision"])
