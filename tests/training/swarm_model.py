"""A swarm and a driver without a cluster, to see what `Recovery` makes of whatever happens to them.

The world knows who is really there and which weights each worker really has; `Recovery` knows only what
it has been told, and may be told late and twice. `check` says what must hold after every event.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dagflow.plan.memory import StageNeeds
from dagflow.training.recovery import Recovery
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
    SnapshotCommitted,
    Stall,
    StepDone,
    Stop,
    Stopped,
    Wait,
    WorkFailed,
)

NEEDS = (StageNeeds(4), StageNeeds(2), StageNeeds(3))
WAIT_SECONDS = 40.0


class World:
    """Three stages, the workers that come and go, and the driver between."""

    def __init__(self, num_workers: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.memory: dict[str, int | None] = {}
        self.stalls: dict[str, Stall] = {}
        self.num_joined = 0
        for _ in range(num_workers):
            self.join(None)
        owners = [sorted(self.memory)[i % num_workers] for i in range(len(NEEDS))]
        self.weights = {(owner, stage): 0 for stage, owner in enumerate(owners)}
        self.copies: dict[int, Copy] = {}
        self.rosters = [self.roster()]
        self.told: list[Event] = []
        self.todo: Instruction | None = None  # the latest counts
        self.is_holding = False
        self.num_in_flight = 2
        self.ended: Exception | None = None
        self.recovery = Recovery(owners, NEEDS, 0, wait_seconds=WAIT_SECONDS)
        self.seen = self.rosters[0]
        self.num_steps = 0
        self.rebuilt: set[tuple[int, int]] = set()

    # What happens

    def join(self, memory: int | None) -> None:
        self.memory[f"w{self.num_joined:02}"] = memory
        self.num_joined += 1

    def leave(self) -> None:
        if self.memory:
            worker = self.random.choice(sorted(self.memory))
            del self.memory[worker]
            self.stalls.pop(worker, None)
            self.weights = {p: step for p, step in self.weights.items() if p[0] != worker}

    def stall(self, *, silent: bool) -> None:
        if self.memory:
            self.stalls[self.random.choice(sorted(self.memory))] = Stall(2.0, silent)

    def recover(self) -> None:
        if self.stalls:
            del self.stalls[self.random.choice(sorted(self.stalls))]

    def look(self) -> None:
        self.rosters.append(self.roster())
        self.tell(self.rosters[-1])

    def look_late(self) -> None:
        """An older account arrives after a newer one."""
        self.tell(self.random.choice(self.rosters))

    def repeat(self) -> None:
        if self.told:
            self.tell(self.random.choice(self.told[-6:]))

    def finish_step(self) -> None:
        """The oldest step in flight comes back, if every owner has what it takes."""
        owners = enumerate(self.recovery.owners)
        well = all(
            self.weights.get((owner, stage), -1) >= self.num_steps
            and not self.stalls.get(owner, Stall(0, silent=False)).silent
            for stage, owner in owners
        )
        running = self.recovery.phase in (Phase.RUNNING, Phase.HOLDING)
        if not well or not running or self.todo:
            return
        if self.num_in_flight:
            self.num_in_flight -= 1
            self.num_steps += 1
            for stage, owner in enumerate(self.recovery.owners):
                self.weights[owner, stage] = self.num_steps
            self.rebuilt.clear()
            self.tell(StepDone(self.num_steps))
        if self.is_holding:
            if not self.num_in_flight:
                self.is_holding = False
                self.tell(Drained())
        else:
            self.num_in_flight = 2

    def finish_copy(self) -> None:
        if self.copies:
            copy = self.copies[self.random.choice(sorted(self.copies))]
            is_there = copy.address in self.memory and self.random.random() < 0.8
            if is_there:
                self.weights[copy.address, copy.stage] = copy.num_steps
            self.tell(Copied(copy.number, is_there))

    def snapshot(self) -> None:
        self.tell(SnapshotCommitted(self.num_steps))

    def lose_result(self) -> None:
        self.tell(ResultLost("A result went with its worker."))

    def fail(self) -> None:
        stage = self.random.randrange(len(NEEDS))
        number = self.recovery.assignment
        task = ("forward", str(self.num_steps), str(stage), str(self.random.randrange(4)))
        owner = self.recovery.owners[stage]
        self.tell(WorkFailed(task, stage, owner, "ValueError: no", number))

    def send_garbage(self) -> None:
        stage = self.random.randrange(-1, len(NEEDS))
        self.tell(GarbageReceived(stage, "NaN came.", True, self.recovery.assignment))

    def pass_time(self) -> None:
        self.now += 3.0

    def carry_out(self) -> None:
        """Carry out the next instruction that waits, as the driver does between two waits."""
        duty, self.todo = self.todo, None
        match duty:
            case Stop():
                self.num_in_flight = max(1, self.num_in_flight)
                self.is_holding = False
                self.look()
                self.tell(Stopped())
            case Wait(seconds):
                self.now += seconds
                self.look()
            case Assign(number, assignment, ask):
                owners = assignment.workers
                if any(owners[stage] not in self.memory for stage in ask):
                    self.look()
                    if self.todo:  # nobody answers for them
                        return
                known = {stage: self.weights.get((owners[stage], stage), -1) for stage in ask}
                self.tell(Progress(number, known))
            case Resume(number, rebuild, resend):
                assert rebuild <= resend
                for stage in rebuild:
                    self.rebuild(stage)
                self.tell(Resumed(number))

    def rebuild(self, stage: int) -> None:
        owner = self.recovery.owners[stage]
        # It has them only if it must not keep them, or if it forgets them on the way.
        place = (self.recovery.assignment, stage)
        assert place not in self.rebuilt, "rebuilt twice"
        self.rebuilt.add(place)
        if owner in self.memory:
            self.weights[owner, stage] = self.num_steps

    def tell(self, event: Event) -> None:
        if isinstance(event, Roster):
            self.seen = event
        before = self.recovery.num_steps
        was_over = self.ended is not None
        instructions = self.recovery.handle(event, self.now)
        assert not (was_over and instructions), "an ended run is left alone"
        for instruction in instructions:
            self.take(instruction)
        self.check_forgotten(instructions)
        self.told.append(event)
        assert self.recovery.num_steps >= before, "a step was lost"
        self.check()

    def take(self, instruction: Instruction) -> None:
        match instruction:
            case Hold():
                self.is_holding = True
            case Copy(number, stage, address):
                assert address in self.seen.memory
                assert self.recovery.owners[stage] != address, "a stage is copied to its owner"
                places = {(c.stage, c.address) for c in self.copies.values()}
                assert (stage, address) not in places, "a stage is copied twice to one worker"
                self.copies[number] = instruction
            case Release(number):
                del self.copies[number]
            case Forget(stage, address):
                self.weights.pop((address, stage), None)
            case Disown(stage):
                assert 0 <= stage < len(NEEDS)
            case End(error):
                self.ended = error or RuntimeError("the task's own error")
                self.todo = None
            case Stop() | Wait() | Assign() | Resume():
                self.todo = instruction

    # What must hold

    def roster(self) -> Roster:
        return Roster(dict(self.memory), dict(self.stalls))

    def check(self) -> None:
        recovery = self.recovery
        assert len(recovery.owners) == len(NEEDS)
        if recovery.phase is Phase.ENDED:
            assert self.ended is not None
            return
        # Whoever isn't running has something to do.
        waits_for_step = recovery.phase in (Phase.RUNNING, Phase.HOLDING)
        assert waits_for_step or self.todo or recovery.phase in self.answered_by_driver()
        if waits_for_step:
            usable = set(recovery.usable())
            assert set(recovery.owners) <= usable, "a stage is with somebody who isn't there"
        moves = [c.stage for c in self.copies.values() if not c.by_snapshot]
        assert len(moves) == len(set(moves)), "a stage moves to two places"

    def check_forgotten(self, instructions: Sequence[Instruction]) -> None:
        """An owner forgets a stage only on the way to having it rebuilt."""
        rebuilt = {
            stage
            for assign in instructions
            if isinstance(assign, Assign)
            for stage in range(len(NEEDS))
            if stage not in assign.ask
        }
        for forget in instructions:
            if isinstance(forget, Forget) and forget.stage not in rebuilt:
                assert self.recovery.owners[forget.stage] != forget.address

    def answered_by_driver(self) -> Sequence[Phase]:
        """The phases in which the driver is in the middle of carrying something out."""
        return (Phase.STOPPING, Phase.ASSIGNING, Phase.RESUMING, Phase.WAITING)

    def settle(self) -> None:
        """Let everybody who is there be well, and large workers join; the run must go on then."""
        self.stalls.clear()
        for _ in NEEDS:
            self.join(None)
        for _ in range(60):
            if self.ended is not None:
                return
            self.look()
            self.carry_out()
            self.finish_copy()
            done = self.num_steps
            self.finish_step()
            if self.num_steps >= done + 1 and not self.todo and not self.is_holding:
                return
        raise AssertionError(f"the run doesn't go on: {self.recovery.phase}")


HAPPENINGS: Sequence[Callable[[World], None]] = (
    lambda world: world.join(None),
    lambda world: world.join(9),
    lambda world: world.join(1),
    World.leave,
    lambda world: world.stall(silent=False),
    lambda world: world.stall(silent=True),
    World.recover,
    World.look,
    World.look,
    World.look_late,
    World.repeat,
    World.finish_step,
    World.finish_step,
    World.finish_step,
    World.finish_copy,
    World.finish_copy,
    World.snapshot,
    World.lose_result,
    World.fail,
    World.send_garbage,
    World.pass_time,
    World.carry_out,
    World.carry_out,
    World.carry_out,
    World.carry_out,
)
