"""When each stage works on which micro-batch: one-forward-one-backward (1F1B) over any placement.

The order is found by simulating the workers: each takes the backward that is ready, or else the
forward that is ready, as long as its stage hasn't too many micro-batches in flight. With one stage
a worker this is the schedule of PipeDream-Flush (arXiv 2006.09503, section 3.2); with several it
interleaves them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True, order=True)
class Action:
    """A stage's forward or backward of one micro-batch; prints as ``2F0``."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """The start of every action in units of a forward, and the length of the whole step."""

    starts: dict[Action, float]
    length: float

    def order(self, stages: Sequence[int]) -> list[Action]:
        """Return the actions of some stages in the order in which they start."""
        chosen = [action for action in self.starts if action.stage in set(stages)]
        return sorted(chosen, key=lambda action: (self.starts[action], action))

    def grid(self, placement: Sequence[int]) -> str:
        """Return the timetable, one line a worker."""
        lines = []
        for worker in sorted(set(placement)):
            stages = [stage for stage, place in enumerate(placement) if place == worker]
            lines.append(f"worker {worker}: " + " ".join(map(str, self.order(stages))))
        return "\n".join(lines)


def in_flight_limits(num_stages: int, slack: int = 0) -> tuple[int, ...]:
    """Return how many micro-batches each stage may have between forward and backward.

    The last stage has one, each earlier stage one more: as many as it takes for the gradient to
    come back. `slack` adds some, against waiting for messages.
    """
    return tuple(
        num_stages - stage + (slack if stage < num_stages - 1 else 0) for stage in range(num_stages)
    )


def one_forward_one_backward(
    placement: Sequence[int],
    num_microbatches: int,
    limits: Sequence[int],
    costs: Sequence[tuple[float, float]] | None = None,
) -> Schedule:
    """Simulate a step and return when everything starts.

    Parameters
    ----------
    placement : sequence of int
        Worker of each stage.
    num_microbatches : int
    limits : sequence of int
        Largest number of micro-batches in flight for each stage.
    costs : sequence of (forward, backward), optional
        Durations by stage; 1 and 2 by default.
    """
    num_stages = len(placement)
    durations = costs or [(1.0, 2.0)] * num_stages
    done: set[Action] = set()
    starts: dict[Action, float] = {}
    next_forward, next_backward = [0] * num_stages, [0] * num_stages
    by_worker: dict[int, list[int]] = {}
    for stage, worker in enumerate(placement):
        by_worker.setdefault(worker, []).append(stage)
    idle = set(by_worker)
    running: list[tuple[float, Action]] = []
    now = 0.0

    def ready(stage: int) -> Action | None:
        backward = next_backward[stage]
        if backward < next_forward[stage] and Action(stage, FORWARD, backward) in done:
            last = stage == num_stages - 1
            if last or Action(stage + 1, BACKWARD, backward) in done:
                return Action(stage, BACKWARD, backward)
        forward = next_forward[stage]
        may_start = forward < num_microbatches and forward - backward < limits[stage]
        if may_start and (stage == 0 or Action(stage - 1, FORWARD, forward) in done):
            return Action(stage, FORWARD, forward)
        return None

    while len(done) < 2 * num_stages * num_microbatches:
        for worker in sorted(idle):
            candidates = [a for stage in by_worker[worker] if (a := ready(stage)) is not None]
            if not candidates:
                continue
            # Backward first; among equals the later stage, whose results more others wait for.
            chosen = min(candidates, key=lambda a: (a.kind != BACKWARD, a.microbatch, -a.stage))
            starts[chosen] = now
            forward = chosen.kind == FORWARD
            (next_forward if forward else next_backward)[chosen.stage] += 1
            heapq.heappush(running, (now + durations[chosen.stage][0 if forward else 1], chosen))
            idle.discard(worker)
        now, action = heapq.heappop(running)
        finished = [action]
        while running and running[0][0] == now:
            finished.append(heapq.heappop(running)[1])
        done.update(finished)
        idle.update(placement[action.stage] for action in finished)
    return Schedule(starts, now)
