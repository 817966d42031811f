"""Which worker has which stage: placed, placed again after a loss, and kept at hand by spares. Pure.

Training and serving both ask here. No stage is placed where `dagflow.plan.memory` says that it doesn't
fit: `place` refuses and `replace` raises `NoRoom`, both with the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dagflow.errors import StageTooLarge
from dagflow.graph.show import amount
from dagflow.plan.memory import StageNeeds, WorkerMemory, fits, fits_at_hand, worker_bytes


class NoRoom(Exception):
    """No worker that is there has the memory for a stage that has lost its own."""


class Share(NamedTuple):
    """A worker's part of a stage's work.

    Attributes
    ----------
    worker : str
        Its address.
    part : float
        1 while each stage has one worker.
    """

    worker: str
    part: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """Which workers have which stage.

    Attributes
    ----------
    shares : tuple of tuple of Share
        By stage; empty where nobody has it. No function makes more than one share a stage yet.
    """

    shares: tuple[tuple[Share, ...], ...]

    @classmethod
    def of(cls, workers: Iterable[str]) -> Assignment:
        """Return the assignment of one worker a stage; of nobody where the address is empty."""
        return cls(tuple((Share(worker),) if worker else () for worker in workers))

    @property
    def workers(self) -> tuple[str, ...]:
        """The address of each stage's worker; empty where nobody has it."""
        return tuple(shares[0].worker if shares else "" for shares in self.shares)

    def stages_of(self, worker: str) -> list[int]:
        """Return the stages that a worker has."""
        return [
            stage
            for stage, shares in enumerate(self.shares)
            if any(share.worker == worker for share in shares)
        ]

    def moved(self, workers: Mapping[int, str]) -> Assignment:
        """Return an assignment in which some stages have other workers, or nobody (empty)."""
        found = dict(enumerate(self.workers)) | dict(workers)
        return Assignment.of(found.values())


def place(
    needs: Sequence[StageNeeds], workers: Mapping[str, WorkerMemory], cache_bytes: int | None
) -> Assignment:
    """Give each stage a worker: evenly and in a row if they fit so, otherwise where they fit.

    Parameters
    ----------
    needs
        Of each stage.
    workers
        By address.
    cache_bytes
        What sessions' caches are to have on each worker, see `memory.worker_bytes`.

    Raises
    ------
    StageTooLarge
        Says by how much.
    """
    addresses, count = sorted(workers), len(needs)

    def has_room(assignment: Assignment, worker: str) -> bool:
        own = _needs_of(assignment, needs, worker)
        wanted = sum(n.weight_bytes for n in own) + (cache_bytes or 0)
        return fits(own, workers[worker], cache_bytes) and wanted <= workers[worker].free_bytes

    even = Assignment.of(addresses[s * min(len(addresses), count) // count] for s in range(count))
    if all(has_room(even, worker) for worker in set(even.workers)):
        return even
    # The largest first, each to whoever has most left afterwards.
    found = Assignment.of([""] * count)
    for stage in sorted(range(count), key=lambda stage: -needs[stage].weight_bytes):
        left = {
            worker: workers[worker].free_bytes
            - sum(n.weight_bytes for n in _needs_of(found, needs, worker))
            for worker in addresses
        }
        roomiest = max(addresses, key=lambda worker: left[worker])
        found = found.moved({stage: roomiest})
        if not has_room(found, roomiest):
            raise StageTooLarge(_too_small(stage, left[roomiest], needs, workers, cache_bytes))
    return found


def replace(
    assignment: Assignment,
    stages: Iterable[int],
    needs: Sequence[StageNeeds],
    workers: Mapping[str, WorkerMemory],
    at_hand: Collection[tuple[int, str]] = (),
    cache_bytes: int | None = None,
) -> Assignment:
    """Give some stages other workers: lost ones, or one that is to move. The others stay.

    Of the workers that have the memory, a stage goes to the one with the fewest stages; of these, to
    one that has its weights at hand. Stages whose weights somebody has at hand choose first.

    Parameters
    ----------
    stages
        To be placed.
    needs
        Of each stage.
    workers
        That may get one, by address.
    at_hand
        Stages and the addresses of workers that hold their weights.
    cache_bytes
        As for `place`.

    Raises
    ------
    NoRoom
        If nobody has the memory for one of them.

    >>> needs = [StageNeeds(8), StageNeeds(8), StageNeeds(8)]
    >>> workers = {name: WorkerMemory(100) for name in "acde"}
    >>> replace(Assignment.of("abc"), [1], needs, workers, {(1, "e")}).workers
    ('a', 'e', 'c')
    >>> replace(Assignment.of("abc"), [1, 2], needs, {"a": WorkerMemory(24)}).workers
    ('a', 'a', 'a')
    >>> workers = {"a": WorkerMemory(9), "b": WorkerMemory(4), "c": WorkerMemory(9)}
    >>> replace(Assignment.of("ax"), [1], needs[:2], workers).workers
    ('a', 'c')
    """
    waiting = set(stages)
    found = assignment.moved(dict.fromkeys(waiting, ""))
    ready = {stage for stage, _ in at_hand}
    for stage in sorted(waiting, key=lambda stage: (stage not in ready, stage)):
        own = {worker: _needs_of(found, needs, worker) for worker in workers}
        fitting = [w for w in own if fits([*own[w], needs[stage]], workers[w], cache_bytes)]
        if not fitting:
            left = [workers[w].free_bytes - worker_bytes(own[w], cache_bytes) for w in own]
            wanted = worker_bytes([needs[stage]], cache_bytes)
            raise NoRoom(
                f"Stage {stage} needs about {amount(wanted, 'B')}, and the most that a worker has "
                f"left is {amount(max(0, *left, 0), 'B')}"
            )
        best = min(fitting, key=lambda w: (len(own[w]), (stage, w) not in at_hand, w))
        found = found.moved({stage: best})
    return found


def spares(
    order: Sequence[int],
    needs: Sequence[StageNeeds],
    workers: Mapping[str, WorkerMemory],
    at_hand: Collection[tuple[int, str]],
    num_copies: int | None = None,
    cache_bytes: int | None = None,
) -> list[tuple[int, str]]:
    """Return which stages' weights workers without a stage should hold, in the order of their use.

    The stage that the fewest have comes next, and of these the first in `order`; the roomiest worker
    takes it. A worker holds no more than leaves it the memory to compute any one stage that it holds.

    Parameters
    ----------
    order
        Stages, those most at risk first.
    needs
        Of each stage.
    workers
        Spares, by address.
    at_hand
        Stages and addresses of spares that hold their weights, and go on with them if there is room.
    num_copies
        How many spares should have a stage, and what else they hold they drop; by default as many as
        have room, and they drop nothing.
    cache_bytes
        As for `place`.

    >>> needs = [StageNeeds(8), StageNeeds(12)]
    >>> workers = {"c": WorkerMemory(10), "d": WorkerMemory(20)}
    >>> spares([1, 0], needs, workers, {(0, "c")}, num_copies=1)
    [(1, 'd'), (0, 'c')]
    >>> spares([1, 0], needs, {"c": WorkerMemory(10)}, (), num_copies=1)
    [(0, 'c')]
    >>> spares([0, 1], needs, {"d": WorkerMemory(20)}, {(1, "d")})
    [(0, 'd')]
    """
    held: dict[str, list[int]] = {worker: [] for worker in sorted(workers)}
    if num_copies is None:
        for stage, worker in at_hand:
            held[worker].append(stage)
    copies = Counter(stage for stages in held.values() for stage in stages)
    found: list[tuple[int, str]] = []

    def free(worker: str) -> int:
        return workers[worker].free_bytes - sum(needs[s].restored_bytes for s in held[worker])

    def has_room(stage: int, worker: str) -> bool:
        stages = [needs[s] for s in (*held[worker], stage)]
        return stage not in held[worker] and fits_at_hand(stages, workers[worker], cache_bytes)

    wanted = list(order)
    while wanted:
        stage = min(wanted, key=lambda stage: copies[stage])
        fitting = [worker for worker in held if has_room(stage, worker)]
        if not fitting:
            wanted.remove(stage)
            continue
        chosen = min(fitting, key=lambda w: ((stage, w) not in at_hand, -free(w)))
        held[chosen].append(stage)
        found.append((stage, chosen))
        copies[stage] += 1
        if copies[stage] == num_copies:
            wanted.remove(stage)
    return found


def _needs_of(assignment: Assignment, needs: Sequence[StageNeeds], worker: str) -> list[StageNeeds]:
    return [needs[stage] for stage in assignment.stages_of(worker)]


def _too_small(
    stage: int,
    left: int,
    needs: Sequence[StageNeeds],
    workers: Mapping[str, WorkerMemory],
    cache_bytes: int | None,
) -> str:
    need = needs[stage]
    caches = max(worker_bytes([need], cache_bytes) - need.weight_bytes, cache_bytes or 0)
    short = need.weight_bytes + caches - left
    stages = ", ".join(amount(n.weight_bytes, "B") for n in needs)
    have = ", ".join(f"{a} {amount(w.free_bytes, 'B')}" for a, w in sorted(workers.items()))
    return (
        f"The workers are too small for the model: {amount(short, 'B')} are missing. Stage {stage} "
        f"takes {amount(need.weight_bytes, 'B')} of weights and at least {amount(caches, 'B')} for "
        f"caches, and at most {amount(left, 'B')} are left for it. Weights of the stages: {stages}. "
        f"Workers: {have}. Use more workers or larger ones, more stages, or weights in fewer bits"
        f"{', or a smaller cache_bytes' if cache_bytes is not None else ''}."
    )
