"""What the driver tells `dagflow.training.recovery` (events), and is told by it (instructions). Data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from dagflow.plan.memory import UNKNOWN_MEMORY, WorkerMemory
from dagflow.plan.placement import Assignment


class Phase(Enum):
    """What the run is doing."""

    RUNNING = auto()
    HOLDING = auto()  # finishing the steps in flight, to move a stage between two steps
    STOPPING = auto()
    WAITING = auto()  # for a worker with room for a stage that is lost
    ASSIGNING = auto()
    RESUMING = auto()
    ENDED = auto()


# Spares keep weights in this part of their memory; of so many bytes if they don't say how much it is.
SPARE_PART, UNKNOWN_SPARE_BYTES = 0.5, 8 << 30

# Events ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stall:
    """What the scheduler's watch says of a worker that is late.

    Attributes
    ----------
    seconds : float
        For how long it has been busy with what it has.
    silent : bool
        Whether nothing has been heard of it, so that it counts as gone until it is.
    """

    seconds: float
    silent: bool


@dataclass(frozen=True)
class Roster:
    """Who is there, all of them. The newest one counts, however many before it got lost.

    Attributes
    ----------
    memory : mapping
        Bytes by address of everybody who is connected; None where nothing is known.
    stalls : mapping
        By address of those who are late.
    """

    memory: Mapping[str, int | None]
    stalls: Mapping[str, Stall] = field(default_factory=dict)

    def memory_of(self, addresses: Iterable[str]) -> dict[str, WorkerMemory]:
        """Return the memory of some of them; of whom nothing is known, that has enough."""
        known = {address: self.memory[address] for address in sorted(addresses)}
        return {a: UNKNOWN_MEMORY if m is None else WorkerMemory(m) for a, m in known.items()}

    def spare_memory_of(self, addresses: Iterable[str]) -> dict[str, WorkerMemory]:
        """Return the memory in which some of them may keep weights of stages that aren't theirs."""
        return {
            address: WorkerMemory(int(SPARE_PART * (self.memory[address] or UNKNOWN_SPARE_BYTES)))
            for address in sorted(addresses)
        }


@dataclass(frozen=True)
class StepDone:
    """A step has come back, so that this many are done, whatever happens to the workers now."""

    num_steps: int


@dataclass(frozen=True)
class ResultLost:
    """Something that the steps in flight need is lost, nobody knows where: a result, a message."""

    why: str


@dataclass(frozen=True)
class WorkFailed:
    """A task has raised an error.

    Attributes
    ----------
    task : tuple of str
        What it does, step, stage, ...: the same for the same task, whoever runs it.
    stage : int
    address : str or None
        Where it failed, if that is known.
    why : str
    assignment : int or None
        The number of the assignment (see `Assign`) under which it was handed out; the present one if
        it isn't known.
    """

    task: tuple[str, ...]
    stage: int
    address: str | None
    why: str
    assignment: int | None = None


@dataclass(frozen=True)
class GarbageReceived:
    """A stage was sent something that can't be right.

    Attributes
    ----------
    sender : int
        The stage that sent it.
    why : str
    has_nan : bool
    assignment : int or None
        As in `WorkFailed`: its sender is where the stage was then.
    """

    sender: int
    why: str
    has_nan: bool = False
    assignment: int | None = None


@dataclass(frozen=True)
class Stopped:
    """Nothing is in flight any more, as `Stop` asked."""


@dataclass(frozen=True)
class Drained:
    """Nothing is in flight, as `Hold` asked: the last step has come back."""


@dataclass(frozen=True)
class Progress:
    """How many steps the weights of stages have taken that `Assign` has asked about."""

    assignment: int
    num_steps: Mapping[int, int]


@dataclass(frozen=True)
class Resumed:
    """The steps in flight have been handed out again, as `Resume` asked."""

    assignment: int


@dataclass(frozen=True)
class Copied:
    """A copy that `Copy` asked for is there, or can't be made."""

    number: int
    is_there: bool = True


@dataclass(frozen=True)
class SnapshotCommitted:
    """There is a new snapshot, of the weights after so many steps."""

    num_steps: int


Event: TypeAlias = (
    Roster
    | StepDone
    | ResultLost
    | WorkFailed
    | GarbageReceived
    | Stopped
    | Drained
    | Progress
    | Resumed
    | Copied
    | SnapshotCommitted
)


# Instructions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """Tell the user."""

    text: str


@dataclass(frozen=True)
class Stop:
    """Let go of everything in flight, say why, and tell the `Roster` and that it has `Stopped`."""

    why: str


@dataclass(frozen=True)
class Hold:
    """Hand out no further step; once none is in flight, tell `Drained`."""


@dataclass(frozen=True)
class Wait:
    """Wait for news, so many seconds at most; then tell the `Roster`."""

    seconds: float


@dataclass(frozen=True)
class Assign:
    """From now on these are the stages' owners; ask some how far they are, and tell `Progress`.

    Attributes
    ----------
    number : int
        Counts assignments, from 1; the one that the run begins with is 0.
    owners : Assignment
    ask : frozenset of int
        Stages that have kept their owner.
    moved : frozenset of int
        Those of the others whose owner was well: whatever it was asked to write it will write.
    """

    number: int
    owners: Assignment
    ask: frozenset[int]
    moved: frozenset[int]


@dataclass(frozen=True)
class Resume:
    """Rebuild stages at their owners, hand out the steps in flight again, and tell `Resumed`.

    Attributes
    ----------
    assignment : int
    rebuild : frozenset of int
        Stages whose weights aren't with their owner.
    resend : frozenset of int
        Stages whose parts of the batches went with their owner.
    """

    assignment: int
    rebuild: frozenset[int]
    resend: frozenset[int]


@dataclass(frozen=True)
class Copy:
    """Rebuild a stage on a worker that isn't its owner; then tell `Copied`.

    Attributes
    ----------
    number : int
        The copy's.
    stage : int
    address : str
    num_steps : int
        Steps that its weights are to have taken.
    by_snapshot : bool
        Whether a snapshot has them, so that nothing has to be replayed.
    """

    number: int
    stage: int
    address: str
    num_steps: int
    by_snapshot: bool


@dataclass(frozen=True)
class Release:
    """Wait no longer for a copy, whether or not it is there."""

    number: int


@dataclass(frozen=True)
class Forget:
    """Have a worker drop a stage from its memory, unless it was rebuilt there since."""

    stage: int
    address: str


@dataclass(frozen=True)
class Disown:
    """What a worker has sent for a stage since the last step is wrong: nobody may read it."""

    stage: int
    address: str


@dataclass(frozen=True)
class End:
    """End the run with this error; with the one that was told last if it is None."""

    error: Exception | None


Instruction: TypeAlias = (
    Say | Stop | Hold | Wait | Assign | Resume | Copy | Release | Forget | Disown | End
)
