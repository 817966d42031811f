"""What was executed, and whether the faults explain it."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Place = tuple[str, int, int, int]  # function, step, stage, micro-batch

COMPUTING = frozenset({"forward", "backward", "backward_weights", "forward_backward", "update"})


@dataclass(frozen=True)
class Execution:
    """One task, or one replayed step, in one process.

    Attributes
    ----------
    volunteer : str
    place : tuple
        Function, step, stage, micro-batch.
    begin : float
    end : float or None
        None if the process was gone before.
    failed : str
    recomputed : int
        Forwards that ran again inside it.
    """

    volunteer: str
    place: Place
    begin: float
    end: float | None = None
    failed: str = ""
    recomputed: int = 0


@dataclass(frozen=True)
class Hit:
    """A fault, as it came true.

    Attributes
    ----------
    time : float
    volunteers : frozenset of str
        Those who lost what they had; whoever took part then, if everybody went back.
    sends_back : bool
        Whether steps that were done may be done again by all: the driver or the scheduler was lost,
        or several workers with what they had sent each other.
    """

    time: float
    volunteers: frozenset[str]
    sends_back: bool = False


def read_executions(folder: Path) -> list[Execution]:
    """Return what all volunteers have noted, in the order in which it began."""
    found = [e for path in folder.glob("*.tasks") for e in _of_volunteer(path)]
    return sorted(found, key=lambda execution: execution.begin)


def _of_volunteer(path: Path) -> Iterable[Execution]:
    # A restore has its replays inside, and a snapshot's thread runs beside the tasks.
    open_ones: dict[Place, float] = {}
    for line in path.read_text().splitlines():
        time, phase, function, step, stage, index, *more = json.loads(line)
        place = (function, step, stage, index)
        if phase == "begin":
            open_ones[place] = time
            continue
        begin = open_ones.pop(place)
        if phase == "failed":
            yield Execution(path.stem, place, begin, time, failed=more[0])
        else:
            yield Execution(path.stem, place, begin, time, recomputed=more[0])
    for place, begin in open_ones.items():
        yield Execution(path.stem, place, begin)


def holders(executions: Sequence[Execution]) -> dict[int, str]:
    """Return who was the last to work on each stage."""
    return {execution.place[2]: execution.volunteer for execution in executions}


def unexplained(executions: Sequence[Execution], hits: Sequence[Hit]) -> list[str]:
    """Return what was computed again though no fault gave reason to.

    A task may run again if whoever ran it before was hit since it began there, or if it failed
    there. A step may be replayed if whoever worked on the stage before was hit. And everything may
    run again if all were sent back.
    """
    found = []
    by_place: dict[Place, list[Execution]] = defaultdict(list)
    last_on_stage: dict[int, Execution] = {}
    for execution in executions:
        function, _, stage, _ = execution.place
        if function in COMPUTING:
            before = by_place[execution.place][-1:]
            by_place[execution.place].append(execution)
        else:
            before = [last_on_stage[stage]] if stage in last_on_stage else []
            if before and before[0].volunteer == execution.volunteer:
                before = []  # within one rebuilding
        found += [
            f"{_told(execution)}: was done by {earlier.volunteer} at {earlier.begin:.3f}"
            for earlier in before
            if not earlier.failed and not _excused(earlier, execution, hits)
        ]
        if execution.recomputed:
            found.append(f"{_told(execution)}: its forward ran again")
        last_on_stage[stage] = execution
    return found


def _excused(earlier: Execution, later: Execution, hits: Sequence[Hit]) -> bool:
    return any(
        (earlier.volunteer in hit.volunteers and earlier.begin <= hit.time <= later.begin)
        or (hit.sends_back and earlier.begin <= hit.time <= later.begin)
        for hit in hits
    )


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
