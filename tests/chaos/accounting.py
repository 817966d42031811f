"""What was executed, and whether the faults explain it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Place = tuple[str, int, int, int]  # function, step, stage, micro-batch

# How long a stage may be at two places after the driver has it moved.
MOVE_SECONDS = 15.0
COMPUTING = frozenset({"forward", "backward", "weight_gradients", "forward_backward", "update"})


@dataclass(frozen=True)
class Execution:
    """One task, or one replayed step, in one process.

    Attributes
    ----------
    volunteer : str
    place : tuple
        Function, step, stage, micro-batch.
    attempt : str
        Which of the driver's attempts at the run the task belongs to.
    begin : float
    end : float or None
        None if the process was gone before.
    failed : str
    recomputed : int
        Forwards that ran again inside it.
    """

    volunteer: str
    place: Place
    attempt: str
    begin: float
    end: float | None = None
    failed: str = ""
    recomputed: int = 0


@dataclass(frozen=True)
class Hit:
    """A fault, as it came true.

    Attributes
    ----------
    begin, end : float
        When; a worker that was asked to leave, or is slow, goes on for a while.
    volunteers : frozenset of str
        Those it happened to: what they have done may be done again by others, and what they do
        from then on may have been done already.
    sends_back : bool
        Whether steps that were done may be done again by all: the driver or the scheduler was lost,
        or several workers with what they had sent each other.
    """

    begin: float
    end: float
    volunteers: frozenset[str]
    sends_back: bool = False


def read_executions(folder: Path) -> list[Execution]:
    """Return what all volunteers have noted, in the order in which it began."""
    found = [e for path in folder.glob("*.tasks") for e in _of_volunteer(path)]
    return sorted(found, key=lambda execution: execution.begin)


def _of_volunteer(path: Path) -> Iterable[Execution]:
    # A restore has its replays inside, and a snapshot's thread runs beside the tasks.
    open_ones: dict[Place, tuple[str, float]] = {}
    for line in path.read_text().splitlines():
        time, phase, function, step, stage, index, more = json.loads(line)
        place = (function, step, stage, index)
        if phase == "begin":
            open_ones[place] = (more, time)
            continue
        begin = open_ones.pop(place)
        if phase == "failed":
            yield Execution(path.stem, place, *begin, time, failed=more)
        else:
            yield Execution(path.stem, place, *begin, time, recomputed=more)
    for place, begin in open_ones.items():
        yield Execution(path.stem, place, *begin)


def alarms(folder: Path) -> list[Hit]:
    """Return when the driver had a stage rebuilt elsewhere though its worker was still there.

    It may have been right, of a frozen or slow worker, or for a worker that has joined.
    """
    names = {}
    for path in folder.glob("*.log"):
        found = re.search(r"Start worker at:\s+(tcp://\S+)", path.read_text(errors="replace"))
        if found:
            names[found[1]] = path.stem
    text = (folder / "driver.log").read_text(errors="replace")
    moves = re.findall(r"^\[([\d.]+)\] Rebuilding stage \d+ of (\S+) on (\S+), too", text, re.M)
    # Whoever is done first wins, and the other may be at work still.
    return [
        Hit(float(time), float(time) + MOVE_SECONDS, frozenset({names[old], names[new]}))
        for time, old, new in moves
    ]


def holders(executions: Sequence[Execution]) -> dict[int, str]:
    """Return who was the last to work on each stage."""
    return {execution.place[2]: execution.volunteer for execution in executions}


def reruns(executions: Sequence[Execution], hits: Sequence[Hit]) -> list[Execution]:
    """Return what dask ran again by itself after a fault, on the worker that had done it.

    Of the results that a fault has cost, dask computes what led to them again, on living workers,
    until the driver's new attempt has reached these.
    """
    done: dict[Place, Execution] = {}
    newest: dict[str, str] = {}
    found = []
    for execution in executions:
        newest_here = newest.get(execution.volunteer)
        if execution.place[0] in COMPUTING:
            earlier = done.get(execution.place)
            if (
                earlier is not None
                and (earlier.volunteer, earlier.attempt) == (execution.volunteer, newest_here)
                and execution.attempt == newest_here
                and any(_between(earlier, hit, execution) for hit in hits)
            ):
                found.append(execution)
            done[execution.place] = execution
        newest[execution.volunteer] = execution.attempt
    return found


def unexplained(executions: Sequence[Execution], hits: Sequence[Hit]) -> list[str]:
    """Return what was computed again though no fault gave reason to.

    A task may run again if whoever ran it before was hit since it began there, or if it failed
    there. A step may be replayed if whoever computed the stage's tasks before was hit. And
    everything may run again if all were sent back. Reading a stage's weights is free: spares do it
    beforehand.
    """
    found = []
    by_place: dict[Place, Execution] = {}
    on_stage: dict[int, Execution] = {}
    # Whoever wakes begins with what it was told while it was frozen, and goes on with that.
    before_restoring: dict[tuple[str, int], Execution | None] = {}
    for execution in executions:
        function, _, stage, _ = execution.place
        earlier = None
        if function == "restore":
            before_restoring[execution.volunteer, stage] = on_stage.get(stage)
        elif function == "replay":
            earlier = before_restoring.get((execution.volunteer, stage), on_stage.get(stage))
        elif function in COMPUTING:
            earlier = by_place.get(execution.place)
            by_place[execution.place] = on_stage[stage] = execution
        if earlier is not None and not earlier.failed and not _excused(earlier, execution, hits):
            found.append(
                f"{_told(execution)}: was done by {earlier.volunteer} at {earlier.begin:.3f}"
            )
        if execution.recomputed:
            found.append(f"{_told(execution)}: its forward ran again")
    return found


def _excused(earlier: Execution, later: Execution, hits: Sequence[Hit]) -> bool:
    """Tell whether a fault came between, to whoever was earlier, or to a slow one that came late."""
    return any(
        _between(earlier, hit, later)
        and (hit.sends_back or hit.volunteers & {earlier.volunteer, later.volunteer})
        for hit in hits
    )


def _between(earlier: Execution, hit: Hit, later: Execution) -> bool:
    return earlier.begin <= hit.end and hit.begin <= later.begin


def _told(execution: Execution) -> str:
    function, step, stage, index = execution.place
    return (
        f"{function} of stage {stage}, {index}, step {step}, by {execution.volunteer} at "
        f"{execution.begin:.3f}"
    )


def missing(
    executions: Sequence[Execution], steps: Collection[int], stages: int, microbatches: int
) -> list[Place]:
    """Return the tasks that nobody has done to the end."""
    done = {e.place for e in executions if e.end is not None and not e.failed}
    last = stages - 1
    wanted: list[Place] = [("update", step, s, 0) for step in steps for s in range(stages)]
    for step, index in itertools.product(steps, range(microbatches)):
        wanted.append(("forward_backward", step, last, index))
        wanted += [(f, step, s, index) for s in range(last) for f in ("forward", "backward")]
    return [place for place in wanted if place not in done]


def useful_share(executions: Sequence[Execution]) -> float:
    """Return the share of computing time that went into results which counted.

    Of each task the last complete execution counts; replays don't.
    """
    useful: dict[Place, float] = {}
    total = 0.0
    for execution in executions:
        function = execution.place[0]
        if execution.end is None or function == "restore":
            continue
        total += execution.end - execution.begin
        if function in COMPUTING and not execution.failed:
            useful[execution.place] = execution.end - execution.begin
    return sum(useful.values()) / total if total else 1.0


def times_executed(executions: Sequence[Execution]) -> Counter[int]:
    """Return how many tasks ran once, twice, ..."""
    counts = Counter(e.place for e in executions if e.place[0] in COMPUTING)
    return Counter(counts.values())
