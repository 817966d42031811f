"""What may happen to a swarm, and scripts of it that follow from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What happens; each is one line of a script."""

    KILL = "kill a stage's worker between two steps"
    KILL_IN_TASK = "kill a worker in the middle of a task"
    KILL_SEVERAL = "kill the workers of two stages"
    KILL_ALL = "kill every worker"
    KILL_REBUILDING = "kill the worker that rebuilds a lost stage"
    RETIRE = "retire a worker by the scheduler"
    INTERRUPT = "Ctrl-C on a volunteer's machine"
    JOIN = "a worker joins"
    DRIVER_KILLED = "kill the driver between two steps"
    DRIVER_KILLED_IN_TASK = "kill the driver while a task runs"
    FREEZE = "stop a worker, and wake it steps later"
    SLOW = "slow a worker down five times"
    EXCEPTION = "an exception in a task"
    OUT_OF_MEMORY = "no memory left in a task"
    NOT_FINITE = "a worker computes NaN"
    WRONG_SHAPE = "a worker computes a tensor of another shape"
    SCHEDULER_KILLED = "kill the scheduler, and start it again"
    STORE_AWAY = "nothing can be written to the store for a while"
    DAMAGED_CHUNK = "damage a chunk of the newest snapshot, then kill a stage's worker"


# Those that recovery is up to: take out what it has unlearned while that is being mended.
ENABLED = frozenset(
    {
        Fault.KILL,
        Fault.KILL_IN_TASK,
        Fault.KILL_SEVERAL,
        Fault.KILL_ALL,
        Fault.KILL_REBUILDING,
        Fault.RETIRE,
        Fault.INTERRUPT,
        Fault.JOIN,
        Fault.DRIVER_KILLED,
        Fault.DRIVER_KILLED_IN_TASK,
        Fault.FREEZE,
        Fault.SLOW,
        Fault.EXCEPTION,
        Fault.OUT_OF_MEMORY,
        Fault.NOT_FINITE,
        Fault.WRONG_SHAPE,
        Fault.SCHEDULER_KILLED,
        Fault.STORE_AWAY,
        Fault.DAMAGED_CHUNK,
    }
)

IN_TASK = frozenset(
    {
        Fault.KILL_IN_TASK,
        Fault.DRIVER_KILLED_IN_TASK,
        Fault.EXCEPTION,
        Fault.OUT_OF_MEMORY,
        Fault.NOT_FINITE,
        Fault.WRONG_SHAPE,
    }
)
GARBAGE = frozenset({Fault.NOT_FINITE, Fault.WRONG_SHAPE})
FAILING = GARBAGE | {Fault.EXCEPTION, Fault.OUT_OF_MEMORY}
NOBODYS = frozenset(
    {
        Fault.KILL_ALL,
        Fault.JOIN,
        Fault.DRIVER_KILLED,
        Fault.SCHEDULER_KILLED,
        Fault.STORE_AWAY,
    }
)
LASTING = frozenset({Fault.FREEZE, Fault.SLOW, Fault.STORE_AWAY})
ONE_WORKER_KILLED = frozenset({Fault.KILL, Fault.KILL_IN_TASK, Fault.DAMAGED_CHUNK})

# How often each may happen in a run: those that cost everybody time are rare.
_AT_MOST = {
    Fault.KILL_ALL: 2,
    Fault.DRIVER_KILLED: 2,
    Fault.DRIVER_KILLED_IN_TASK: 1,
    Fault.SCHEDULER_KILLED: 1,
    Fault.FREEZE: 2,
    Fault.SLOW: 2,
    Fault.STORE_AWAY: 1,
    Fault.DAMAGED_CHUNK: 1,
    Fault.EXCEPTION: 2,
    Fault.OUT_OF_MEMORY: 2,
    Fault.NOT_FINITE: 2,
    Fault.WRONG_SHAPE: 2,
}


@dataclass(frozen=True)
class AfterStep:
    """When the driver has heard that so many steps are done."""

    step: int

    def __str__(self) -> str:
        return f"after step {self.step}"


@dataclass(frozen=True)
class InTask:
    """When a worker begins a task."""

    function: str
    step: int
    stage: int
    index: int

    def __str__(self) -> str:
        return f"in {self.function} of stage {self.stage}, {self.index}, step {self.step}"


@dataclass(frozen=True)
class WhileRebuilding:
    """When a worker, because of another incident, rebuilds a stage."""

    incident: int

    def __str__(self) -> str:
        return f"while rebuilding after {self.incident}"


Moment = AfterStep | InTask | WhileRebuilding


@dataclass(frozen=True)
class Incident:
    """One line of a script.

    Attributes
    ----------
    number : int
    fault : Fault
    moment : AfterStep, InTask or WhileRebuilding
    stages : tuple of int
        Whose workers it happens to.
    lasts_steps : int
        How many steps later it ends, if it lasts.
    """

    number: int
    fault: Fault
    moment: Moment
    stages: tuple[int, ...] = ()
    lasts_steps: int = 0

    def __str__(self) -> str:
        whom = f" (stage {', '.join(map(str, self.stages))})" if self.stages else ""
        return f"{self.number}: {self.fault.value}{whom} {self.moment}"


@dataclass(frozen=True)
class Extent:
    """The size of a run, as far as its script of faults has to know it."""

    num_steps: int = 60
    num_stages: int = 4
    num_microbatches: int = 4


def script(
    seed: int, extent: Extent, count: int, kinds: Collection[Fault] = ENABLED
) -> list[Incident]:
    """Return `count` incidents: every kind at least once if there is room, several at a time.

    A quarter of the steps is spared at random, so that other steps have two or three.
    """
    rng = random.Random(seed)
    drawn = _draw_kinds(rng, count, kinds)
    steps = list(range(3, extent.num_steps - 4))
    busy = sorted(rng.sample(steps, k=max(1, min(len(steps), count * 3 // 4))))
    when = sorted(rng.choices(busy, k=count))
    found: list[Incident] = []
    last_kill: int | None = None
    spoiled: set[tuple[int, int]] = set()
    for number, (fault, step) in enumerate(zip(drawn, when, strict=True)):
        if fault is Fault.KILL_REBUILDING and last_kill is None:
            fault = Fault.KILL
        incident = _incident(rng, number, fault, step, extent, last_kill)
        # What fails twice, on two workers, is to blame itself, and ends the run.
        while fault in FAILING and (incident.moment.step, *incident.stages) in spoiled:
            incident = _incident(rng, number, fault, rng.choice(steps), extent, last_kill)
        if fault in FAILING:
            spoiled.add((incident.moment.step, *incident.stages))
        found.append(incident)
        if fault in ONE_WORKER_KILLED:
            last_kill = number
    return found


def _draw_kinds(rng: random.Random, count: int, kinds: Collection[Fault]) -> list[Fault]:
    """Each kind once, then any; one that happens while another recovers comes after a kill."""
    known = [fault for fault in Fault if fault in kinds]
    drawn = rng.sample(known, k=min(count, len(known)))
    while len(drawn) < count:
        fault = rng.choice(known)
        if drawn.count(fault) < _AT_MOST.get(fault, count):
            drawn.append(fault)
    rng.shuffle(drawn)
    kill = next((n for n, fault in enumerate(drawn) if fault in ONE_WORKER_KILLED), None)
    if kill is not None and Fault.KILL_REBUILDING in drawn[:kill]:
        rebuilding = drawn.index(Fault.KILL_REBUILDING)
        drawn[kill], drawn[rebuilding] = drawn[rebuilding], drawn[kill]
    return drawn


def _incident(
    rng: random.Random, number: int, fault: Fault, step: int, extent: Extent, last_kill: int | None
) -> Incident:
    stages = rng.sample(range(extent.num_stages), k=2 if fault is Fault.KILL_SEVERAL else 1)
    if fault is Fault.KILL_REBUILDING:
        assert last_kill is not None
        return Incident(number, fault, WhileRebuilding(last_kill))
    if fault in IN_TASK:
        task = _task(rng, step, stages[0], extent)
        if fault in GARBAGE:
            first = "forward_backward" if stages[0] == extent.num_stages - 1 else "forward"
            task = (first, step, stages[0], rng.randrange(extent.num_microbatches))
        moment = InTask(*task)
        return Incident(number, fault, moment, tuple(stages))
    whom = () if fault in NOBODYS else tuple(sorted(stages))
    return Incident(number, fault, AfterStep(step), whom, rng.randint(1, 4) * (fault in LASTING))


def _task(rng: random.Random, step: int, stage: int, extent: Extent) -> tuple[str, int, int, int]:
    last = stage == extent.num_stages - 1
    functions = ["forward_backward", "update"] if last else ["forward", "backward", "update"]
    function = rng.choice(functions)
    index = 0 if function == "update" else rng.randrange(extent.num_microbatches)
    return function, step, stage, index


def moments_in_task(seed: int, extent: Extent, count: int, fault: Fault) -> Sequence[Incident]:
    """Return incidents of one kind in `count` different tasks, spread over a run."""
    rng = random.Random(seed)
    steps = sorted(rng.randrange(extent.num_steps) for _ in range(count))
    tasks = [_task(rng, step, rng.randrange(extent.num_stages), extent) for step in steps]
    return [Incident(n, fault, InTask(*task)) for n, task in enumerate(tasks)]
