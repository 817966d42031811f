"""What a run does about workers that come, go, stall and fail: decisions only.

Events go in, instructions come out; `dagflow.training.driver` carries them out. Nothing here waits, asks or
sends, so that every case is ten deterministic lines, and events may come late, twice, or in any order.

Every stage has one owner: the worker that has its weights. A stage whose owner is gone is placed again
and rebuilt there from its newest snapshot and the journal (docs/design.md, *A lost worker*). While an
owner is merely slow, its stages are rebuilt on another worker beside it: whoever is done first, wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dagflow.errors import NonFiniteLoss, TaskFailed, WorkersLost
from dagflow.plan.memory import StageNeeds, fits
from dagflow.plan.placement import Assignment, NoRoom, replace, spares
from dagflow.swarm.health import usable
from dagflow.swarm.interrupts import TICK_SECONDS
from dagflow.training.non_finite import NUMBERS_LEFT_RANGE
from dagflow.training.recovery_protocol import (
    Assign,
    Copied,
    Copy,
    Disown,
    Drained,
    End,
    Event,
    Forget,
    GarbageReceived,
    Hold,
    Instruction,
    Phase,
    Progress,
    Release,
    ResultLost,
    Resume,
    Resumed,
    Roster,
    Say,
    SnapshotCommitted,
    StepDone,
    Stop,
    Stopped,
    Wait,
    WorkFailed,
)

# A step that so many workers have not survived, or taken up again so often with none lost: no bad luck.
MAX_LOSSES_A_STEP = 12
MAX_TROUBLES_A_STEP = 5
STALLED = "it has stalled"


@dataclass
class _Copy:
    """A stage's weights, there or on their way to a worker that isn't its owner.

    Attributes
    ----------
    slow_owner : str
        The owner that is late, if that is why: if it comes back first, it keeps the stage.
    is_kept : bool
        Whether a spare keeps it only in case that the owner is lost.
    """

    number: int
    stage: int
    address: str
    slow_owner: str = ""
    is_kept: bool = False
    is_there: bool = False


class Recovery:
    """Keeps every stage with a worker until a run is done.

    Parameters
    ----------
    owners
        A worker's address for each stage.
    needs
        What each stage takes of its worker's memory.
    num_steps
        Steps done.
    has_journal
        Whether a stage can be rebuilt at any step. Without it nothing moves, and a loss ends the
        attempt.
    wait_seconds
        For how long to wait for a worker, with nobody who has room for a stage.
    join_address
        Where to join, for what is said.
    """

    def __init__(
        self,
        owners: Sequence[str],
        needs: Sequence[StageNeeds],
        num_steps: int,
        *,
        has_journal: bool = True,
        wait_seconds: float = 300.0,
        join_address: str = "",
    ) -> None:
        self.num_steps = num_steps
        self.phase = Phase.RUNNING
        self.excluded: dict[str, str] = {}
        self.assignment = 0
        self._needs = list(needs)
        self._has_journal = has_journal
        self._wait_seconds = wait_seconds
        self._join_address = join_address
        self._roster = Roster(dict.fromkeys(owners))
        self._assignments = {0: Assignment.of(owners)}
        self._wrong: set[int] = set()  # whose owner has their weights, and must not keep them
        self._lost: set[int] = set()  # placed again, or about to be, since the steps last went on
        self._why = ""
        self._copies: dict[int, _Copy] = {}
        self._num_copies = 0
        self._no_copy_at: set[tuple[int, str]] = set()  # it failed there, in this step
        # By task where it has failed, by assignment.
        self._failures: dict[tuple[str, ...], dict[int, str]] = {}
        self._times_lost: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._troubles: Counter[int] = Counter()
        self._waiting_until: float | None = None

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Return what to do about an event that happened at `now`, in steady seconds."""
        if self.phase is Phase.ENDED:
            return []
        match event:
            case Roster():
                return self._look_at(event, now)
            case StepDone(num_steps) if num_steps > self.num_steps:
                self.num_steps = num_steps
                self._no_copy_at.clear()
                return self._spread_out() if self.phase is Phase.RUNNING else []
            case ResultLost(why):
                return self._stop(why)
            case WorkFailed():
                return self._work_failed(event)
            case GarbageReceived():
                return self._garbage(event)
            case Stopped() if self.phase is Phase.STOPPING:
                return self._take_up_again(now)
            case Drained() if self.phase is Phase.HOLDING:
                return self._place(now)
            case Progress(assignment, num_steps) if self._is_at(Phase.ASSIGNING, assignment):
                return self._resume(num_steps)
            case Resumed(assignment) if self._is_at(Phase.RESUMING, assignment):
                self.phase = Phase.RUNNING
                self._wrong.clear()
                self._lost.clear()
            case Copied(number, is_there) if number in self._copies:
                return self._copied(self._copies[number], is_there)
            case SnapshotCommitted(num_steps) if self._has_journal:
                return self._keep_spare_copies(num_steps)
        return []  # too late to matter

    @property
    def owners(self) -> tuple[str, ...]:
        """The address of each stage's owner."""
        return self._present.workers

    @property
    def _present(self) -> Assignment:
        return self._assignments[self.assignment]

    def usable(self) -> list[str]:
        """Return the workers that may get a stage, in a fixed order."""
        silent = {address for address in self._roster.stalls if self._is_silent(address)}
        return usable(self._roster.memory, self.excluded, silent)

    def _is_at(self, phase: Phase, assignment: int) -> bool:
        return self.phase is phase and assignment == self.assignment

    def _is_silent(self, address: str) -> bool:
        stall = self._roster.stalls.get(address)
        return stall is not None and stall.silent

    # Who is there

    def _look_at(self, roster: Roster, now: float) -> list[Instruction]:
        self._roster = roster
        self.excluded = {
            address: why
            for address, why in self.excluded.items()
            if address in roster.memory and (why != STALLED or address in roster.stalls)
        }
        instructions = self._drop_copies_of_the_gone()
        match self.phase:
            case Phase.WAITING:
                return [*instructions, *self._place(now)]
            case Phase.STOPPING:
                return instructions
        missing = self._missing()
        if missing:
            return [*instructions, *self._stop(self._who_is_missing(missing))]
        return [*instructions, *self._watch_the_slow(), *self._take_over()]

    def _missing(self) -> set[int]:
        """Return the stages whose owner isn't usable."""
        usable = set(self.usable())
        return {stage for stage, owner in enumerate(self.owners) if owner not in usable}

    def _who_is_missing(self, stages: set[int]) -> str:
        owners = sorted({self.owners[stage] for stage in stages})
        silent = all(self._is_silent(owner) for owner in owners)
        what = "has fallen silent" if silent else "left"
        named = ", ".join(str(stage) for stage in sorted(stages))
        return f"The worker {', '.join(owners)} {what} with stage {named}."

    def _drop_copies_of_the_gone(self) -> list[Instruction]:
        usable = set(self.usable())
        gone = [copy for copy in self._copies.values() if copy.address not in usable]
        return [self._drop(copy) for copy in gone]

    def _drop(self, copy: _Copy) -> Release:
        del self._copies[copy.number]
        return Release(copy.number)

    def _call_off(self, copy: _Copy) -> list[Instruction]:
        """Leave a stage where it is; the worker that was to have a copy forgets it."""
        return [self._drop(copy), *self._forget([(copy.stage, copy.address)])]

    def _forget(self, places: Sequence[tuple[int, str]]) -> list[Instruction]:
        """Have workers forget stages that are neither theirs nor to be kept there."""
        wanted = {(copy.stage, copy.address) for copy in self._copies.values()}
        usable = set(self.usable())
        return [
            Forget(stage, address)
            for stage, address in places
            if address in usable
            and self.owners[stage] != address
            and (stage, address) not in wanted
        ]

    # Who is slow, and who is new

    def _moves(self) -> dict[int, _Copy]:
        """Return by stage the copy that is to become the stage's own."""
        return {copy.stage: copy for copy in self._copies.values() if not copy.is_kept}

    def _watch_the_slow(self) -> list[Instruction]:
        """Have the stages of slow owners rebuilt elsewhere; whoever is done first, wins."""
        stalls = self._roster.stalls
        instructions: list[Instruction] = []
        for copy in [c for c in self._moves().values() if c.slow_owner]:
            if copy.slow_owner not in stalls:
                back = Say(f"The worker {copy.slow_owner} is back, with stage {copy.stage}.")
                instructions += [*self._call_off(copy), back]
        for stage, owner in enumerate(self.owners):
            if owner in stalls and stage not in self._moves():
                because = f"it has stalled for {stalls[owner].seconds:.1f} s"
                instructions += self._move(stage, because, slow_owner=owner)
        return instructions

    def _spread_out(self) -> list[Instruction]:
        """Begin to move a stage off a worker that has several, if somebody has none."""
        used = Counter(self.owners)
        if self._moves() or max(used.values()) == 1 or self._roster.stalls:
            return []
        for stage in reversed(range(len(self.owners))):
            count = used[self.owners[stage]]
            if count > 1:
                because = f"a worker has joined, and this one has {count}"
                instructions = self._move(stage, because)
                if instructions:
                    return instructions
        return []

    def _move(self, stage: int, because: str, slow_owner: str = "") -> list[Instruction]:
        """Begin to rebuild a stage on a worker that has none, and room for it, if there is one."""
        if not self._has_journal or self.phase is not Phase.RUNNING:
            return []
        busy = {copy.address for copy in self._moves().values()}.union(self.owners)
        busy |= self._roster.stalls.keys() | {a for s, a in self._no_copy_at if s == stage}
        ready = {(copy.stage, copy.address) for copy in self._copies.values()}
        memory = self._roster.memory_of(set(self.usable()) - busy)
        try:
            wanted = replace(self._present, [stage], self._needs, memory, ready)
        except NoRoom:
            return []
        owner, target = self.owners[stage], wanted.workers[stage]
        kept = [c for c in self._copies.values() if c.address == target and c.stage != stage]
        beside = [self._needs[copy.stage] for copy in kept]
        too_much = not fits([self._needs[stage]], memory[target], at_hand=beside)
        dropped = [i for copy in kept if too_much for i in self._call_off(copy)]
        text = f"Rebuilding stage {stage} of {owner} on {target}, too: {because}."
        copying = self._copy(stage, target, self.num_steps, slow_owner=slow_owner)
        return [*dropped, Say(text), *copying]

    def _copy(
        self,
        stage: int,
        address: str,
        num_steps: int,
        *,
        slow_owner: str = "",
        is_kept: bool = False,
    ) -> list[Instruction]:
        """Begin a copy, in the place of whatever copy of the stage is there or on its way."""
        here = [c for c in self._copies.values() if (c.stage, c.address) == (stage, address)]
        released: list[Instruction] = [self._drop(copy) for copy in here]
        self._num_copies += 1
        copy = _Copy(self._num_copies, stage, address, slow_owner, is_kept)
        self._copies[copy.number] = copy
        return [*released, Copy(copy.number, stage, address, num_steps, by_snapshot=is_kept)]

    def _copied(self, copy: _Copy, is_there: bool) -> list[Instruction]:
        if not is_there:
            self._no_copy_at.add((copy.stage, copy.address))
            return self._call_off(copy)
        copy.is_there = True
        return self._take_over()

    def _take_over(self) -> list[Instruction]:
        """Give stages that are ready elsewhere to whoever has them: at once, or between two steps."""
        ready = [copy for copy in self._moves().values() if copy.is_there]
        slow = [copy.slow_owner for copy in ready if copy.slow_owner]
        if slow and self.phase in (Phase.RUNNING, Phase.HOLDING):
            self.excluded |= dict.fromkeys(slow, STALLED)
            return self._stop(f"The worker {slow[0]} has stalled; its stages go elsewhere.")
        if ready and self.phase is Phase.RUNNING:
            self.phase = Phase.HOLDING
            return [Hold()]
        return []

    def _keep_spare_copies(self, num_steps: int) -> list[Instruction]:
        """Have workers without a stage keep the weights of those most at risk, of a new snapshot.

        A copy that is still on its way is let arrive: an older one is better than none.
        """
        busy = {copy.address for copy in self._moves().values()}.union(self.owners)
        memory = self._roster.spare_memory_of(set(self.usable()) - busy)
        before = [copy for copy in self._copies.values() if copy.is_kept]
        order = sorted(range(len(self.owners)), key=lambda s: (-self._times_lost[s], s))
        kept = {copy.stage: copy.address for copy in before}
        chosen = dict(spares(order, self._needs, memory, set(kept.items()), num_copies=1))
        instructions: list[Instruction] = []
        for copy in before:
            if chosen.get(copy.stage) != copy.address:
                instructions += self._call_off(copy)
        arriving = {copy.stage for copy in before if not copy.is_there}
        for stage, address in chosen.items():
            if not (stage in arriving and kept[stage] == address):
                instructions += self._copy(stage, address, num_steps, is_kept=True)
        return instructions

    # Who is to blame

    def _work_failed(self, event: WorkFailed) -> list[Instruction]:
        """Have a task that failed run on another worker; if it fails there, it is to blame itself."""
        if event.address is None or not self._has_journal:
            return self._end(None)
        failures = self._failed(event.task, event.address, event.assignment)
        if len(failures) != 1:
            return self._end(None) if failures else []
        self._wrong.add(event.stage)
        kind, step = event.task[:2]
        return self._stop(
            f"{kind} of stage {event.stage} in step {step} failed on {event.address}: {event.why}. "
            "It will be tried elsewhere."
        )

    def _garbage(self, event: GarbageReceived) -> list[Instruction]:
        """Exclude the worker of the stage that sent garbage; twice the same is no accident."""
        stage = event.sender
        if not 0 <= stage < len(self.owners):
            return self._stop(event.why)
        number = self.assignment if event.assignment is None else event.assignment
        address = self._assignments.get(number, self._present).workers[stage]
        task = (event.why, str(self.num_steps), str(stage))
        failures = self._failed(task, address, number)
        if not failures:
            return []
        if len(failures) > 1:
            twice = f"{event.why} It was computed twice, on {' and '.join(failures)}."
            if event.has_nan:
                return self._end(NonFiniteLoss(f"{twice} {NUMBERS_LEFT_RANGE}"))
            return self._end(TaskFailed(twice))
        # The stage is rebuilt even if there is no other worker for it.
        self._wrong.add(stage)
        return [Disown(stage, address), *self._stop(event.why)]

    def _failed(self, task: tuple[str, ...], address: str, assignment: int | None) -> list[str]:
        """Note a failure, exclude its worker if it is the first, and return where it has failed.

        Nothing if it has been told before.
        """
        number = self.assignment if assignment is None else assignment
        known = self._failures.setdefault(task, {})
        if number in known:
            return []
        known[number] = address
        if len(known) == 1:
            self.excluded[address] = f"{task[0]} failed there"
            self._forgive_if_alone()
        return list(known.values())

    def _forgive_if_alone(self) -> None:
        """Let excluded workers take part again if there is nobody else: better these than none."""
        if not self.usable():
            self.excluded.clear()

    # What is lost

    def _stop(self, why: str) -> list[Instruction]:
        if self.phase in (Phase.STOPPING, Phase.WAITING):
            return []  # nothing is in flight, or soon won't be
        self.phase, self._why = Phase.STOPPING, why
        return [Stop(why)]

    def _end(self, error: Exception | None) -> list[Instruction]:
        self.phase = Phase.ENDED
        return [End(error)]

    def _take_up_again(self, now: float) -> list[Instruction]:
        """Nothing is in flight: see what is lost, and whether that is too often now."""
        lost = self._missing() | self._wrong
        counter = self._losses if lost else self._troubles
        counter[self.num_steps] += 1
        times = counter[self.num_steps] - 1
        if times >= (MAX_LOSSES_A_STEP if lost else MAX_TROUBLES_A_STEP):
            text = f"Step {self.num_steps} was taken up again {times} times. {self._why}"
            return self._end(WorkersLost(text))
        if not self._has_journal:
            return self._end(WorkersLost(f"{self._why} There is no journal to rebuild it from."))
        unfinished = [copy for copy in self._copies.values() if not copy.is_there]
        instructions = [i for copy in unfinished for i in self._call_off(copy)]
        return [*instructions, *self._place(now)]

    def _place(self, now: float) -> list[Instruction]:
        """Give every stage that is lost or about to move a new owner, or wait for one with room."""
        self._forgive_if_alone()
        lost = self._missing() | self._wrong
        ready_moves = {s: c.address for s, c in self._moves().items() if c.is_there}
        moved = ready_moves.keys() - lost
        usable, wanted = self.usable(), "All workers are gone"
        ready = {c.stage: c.address for c in self._copies.values() if c.is_there} | ready_moves
        if usable:
            memory, at_hand = self._roster.memory_of(usable), set(ready.items())
            try:
                owners = replace(self._present, lost | moved, self._needs, memory, at_hand)
            except NoRoom as error:
                wanted = str(error)
            else:
                return self._assign(owners, lost, moved)
        return self._wait(wanted, now)

    def _wait(self, wanted: str, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        if self.phase is not Phase.WAITING or self._waiting_until is None:
            self.phase, self._waiting_until = Phase.WAITING, now + self._wait_seconds
            text = f"{wanted}; waiting for new ones (dagflow join {self._join_address})."
            instructions.append(Say(text))
        left = self._waiting_until - now
        if left <= 0:
            text = f"{wanted}, and none has joined {self._join_address} within {self._wait_seconds:g} s."
            return self._end(WorkersLost(text))
        return [*instructions, Wait(min(left, TICK_SECONDS))]

    def _assign(self, owners: Assignment, lost: set[int], moved: set[int]) -> list[Instruction]:
        before, placed = self.owners, lost | moved
        self._waiting_until = None
        self.phase = Phase.ASSIGNING
        self.assignment += 1
        self._assignments[self.assignment] = owners
        self._times_lost.update(lost)
        self._lost |= placed
        instructions: list[Instruction] = []
        if placed:
            places = ", ".join(f"stage {s} on {self.owners[s]}" for s in sorted(placed))
            instructions.append(Say(f"Rebuilding {places}."))
        for copy in list(self._copies.values()):
            if copy.stage in placed or (copy.is_kept and copy.address in self.owners):
                instructions += self._call_off(copy)
        instructions += self._forget([(stage, before[stage]) for stage in sorted(placed)])
        ask = frozenset(range(len(self.owners))) - placed
        return [*instructions, Assign(self.assignment, owners, ask, frozenset(moved))]

    def _resume(self, num_steps: Mapping[int, int]) -> list[Instruction]:
        well = {stage for stage, known in num_steps.items() if known >= self.num_steps}
        rebuild = frozenset(range(len(self.owners))) - well
        self._lost |= rebuild
        self.phase = Phase.RESUMING
        return [Resume(self.assignment, rebuild, frozenset(self._lost))]
