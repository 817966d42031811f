"""When each stage works on which micro-batch: one-forward-one-backward (1F1B) over any placement.

The order is found by simulating the workers: each takes the backward that is ready, or else the
forward that is ready, as long as its stage hasn't too many micro-batches in flight. With one stage
a worker this is the schedule of PipeDream-Flush (arXiv 2006.09503, section 3.2); with several it
interleaves them.

The last stage runs a micro-batch's forward and backward as one action. The stages behind the first
run backwards in two halves (zero bubble pipeline parallelism, arXiv 2401.10241): the inputs'
gradients, which the stage before waits for, and then the weights', which make room for the next
forward. At the end of a step, when there is no forward left, these come when there is nothing
better to do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"

_URGENCY = {BACKWARD: 0, FORWARD: 1, WEIGHTS: 2}


@dataclass(frozen=True, order=True)
class Action:
    """What a stage does with one micro-batch; prints as ``2F0``.

    The last stage's backward includes its forward. Where there is an action for the weights'
    gradients, the backward is that of the inputs.
    """

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


@dataclass(frozen=True)
class Pipeline:
    """What a schedule is made for: few numbers, from which anybody makes the same one.

    Attributes
    ----------
    placement : tuple of int
        Worker of each stage.
    num_microbatches : int
    limits : tuple of int
        Largest number of micro-batches in flight for each stage.
    halved : tuple of bool
        Whether backwards come in two halves, by stage.
    costs : tuple of (forward, backward)
        Durations by stage.
    """

    placement: tuple[int, ...]
    num_microbatches: int
    limits: tuple[int, ...]
    halved: tuple[bool, ...]
    costs: tuple[tuple[float, float], ...]

    def schedule(self) -> Schedule:
        """Return the 1F1B timetable."""
        return one_forward_one_backward(
            self.placement, self.num_microbatches, self.limits, self.halved, self.costs
        )


def in_flight_limits(num_stages: int, slack: int = 0) -> tuple[int, ...]:
    """Return how many micro-batches each stage may have between forward and backward.

    The last stage has one, each earlier stage one more: as many as it takes for the gradient to
    come back. `slack` adds some, see `useful_slack`.
    """
    return tuple(
        num_stages - stage + (slack if stage < num_stages - 1 else 0) for stage in range(num_stages)
    )


def halved_stages(placement: Sequence[int]) -> tuple[bool, ...]:
    """Tell for each stage whether its backwards come in two halves.

    All but the first stage's, which nobody waits for. None where one worker has all stages.
    """
    return tuple(stage > 0 and len(set(placement)) > 1 for stage in range(len(placement)))


def useful_slack(
    placement: Sequence[int], num_microbatches: int, costs: Sequence[tuple[float, float]]
) -> int:
    """Return how many more micro-batches in flight make the step as short as it gets, to 1 %.

    None where each worker has one stage. A worker with several does with 1F1B's limits what comes
    first and then has to wait: four stages on two workers are 8 % longer than their work, and 1 %
    with one micro-batch more.
    """
    num_stages, num_workers = len(placement), len(set(placement))
    if num_workers == 1 or num_workers == num_stages:
        return 0
    # What a step loses at its ends, and how it gets into its rhythm, doesn't depend on its length.
    num_simulated = min(num_microbatches, 2 * num_stages)
    work = dict.fromkeys(placement, 0.0)
    for worker, cost in zip(placement, costs, strict=True):
        work[worker] += num_simulated * sum(cost)
    halved = halved_stages(placement)
    lengths: dict[int, float] = {}
    slack = 0
    while slack <= num_workers + 1:
        limits = in_flight_limits(num_stages, slack)
        simulated = one_forward_one_backward(placement, num_simulated, limits, halved, costs)
        lengths[slack] = simulated.length
        if simulated.length <= 1.01 * max(work.values()):
            break
        slack += 1 + slack // 2
    return min(s for s, length in lengths.items() if length <= 1.01 * min(lengths.values()))


def one_forward_one_backward(
    placement: Sequence[int],
    num_microbatches: int,
    limits: Sequence[int],
    halved: Sequence[bool] | None = None,
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
    halved : sequence of bool, optional
        Whether backwards come in two halves, by stage; none by default.
    costs : sequence of (forward, backward), optional
        Durations by stage; 1 and 2 by default.
    """
    costs = costs or [(1.0, 2.0)] * len(placement)
    return _Simulation(placement, num_microbatches, limits, halved, costs).run()


class _Simulation:
    def __init__(
        self,
        placement: Sequence[int],
        num_microbatches: int,
        limits: Sequence[int],
        halved: Sequence[bool] | None,
        costs: Sequence[tuple[float, float]],
    ) -> None:
        self.placement, self.limits, self.costs = placement, limits, costs
        self.num_stages, self.num_microbatches = len(placement), num_microbatches
        self.halved = halved or [False] * self.num_stages
        self.done: set[Action] = set()
        # The next micro-batch of each kind of action, by stage.
        self.next = {kind: [0] * self.num_stages for kind in _URGENCY}

    def run(self) -> Schedule:
        stages: dict[int, list[int]] = {}
        for stage, worker in enumerate(self.placement):
            stages.setdefault(worker, []).append(stage)
        idle = set(stages)
        running: list[tuple[float, Action]] = []
        starts: dict[Action, float] = {}
        now = 0.0
        while True:
            for worker in sorted(idle):
                candidates = [a for stage in stages[worker] if (a := self._ready(stage))]
                if not candidates:
                    continue
                chosen = min(candidates, key=self._rank)
                starts[chosen] = now
                self.next[chosen.kind][chosen.stage] += 1
                heapq.heappush(running, (now + self._duration(chosen), chosen))
                idle.discard(worker)
            if not running:
                return Schedule(starts, now)
            now, action = heapq.heappop(running)
            finished = [action]
            while running and running[0][0] == now:
                finished.append(heapq.heappop(running)[1])
            self.done.update(finished)
            idle.update(self.placement[action.stage] for action in finished)

    def _rank(self, action: Action) -> tuple[int, int, int]:
        urgency = -1 if self._makes_room(action) else _URGENCY[action.kind]
        # Among equals the later stage, whose results more others wait for.
        return urgency, action.microbatch, -action.stage

    def _makes_room(self, action: Action) -> bool:
        """Tell whether a forward is to come that takes a micro-batch's place in memory."""
        later = action.microbatch + self.limits[action.stage]
        return action.kind == WEIGHTS and later < self.num_microbatches

    def _ready(self, stage: int) -> Action | None:
        """Return the most urgent of a stage's actions that could start."""
        half = self.next[WEIGHTS][stage]
        weights = Action(stage, WEIGHTS, half)
        half_done = self.halved[stage] and Action(stage, BACKWARD, half) in self.done
        if half_done and self._makes_room(weights):
            return weights
        backward = self.next[BACKWARD][stage]
        last = stage == self.num_stages - 1
        if backward < self.num_microbatches:
            there = Action(stage - 1 if last else stage, FORWARD, backward) in self.done
            back = last or Action(stage + 1, BACKWARD, backward) in self.done
            if back and (there or self.num_stages == 1):
                return Action(stage, BACKWARD, backward)
        forward = self.next[FORWARD][stage]
        there = stage == 0 or Action(stage - 1, FORWARD, forward) in self.done
        may_start = forward < self.num_microbatches and forward - backward < self.limits[stage]
        if not last and there and may_start:
            return Action(stage, FORWARD, forward)
        return weights if half_done else None

    def _duration(self, action: Action) -> float:
        forward, backward = self.costs[action.stage]
        if action.kind == FORWARD:
            return forward
        if self.halved[action.stage]:
            backward = backward / 2
        if action.kind == BACKWARD and action.stage == self.num_stages - 1:
            return forward + backward
        return backward
