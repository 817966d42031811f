"""What is done when stages or tokens are lost: decisions only, so that every case is a few sure lines.

Events go in, instructions come out; `dagflow.serving.engine` carries them out, one after the other, and
reports. Knows neither workers' memory (`dagflow.plan.placement` says who can take a stage) nor tokens.

A lost stage is mended in four moves: it is placed on another worker, the caches' room is made what it is
now, the stage is told where its successor is, and the stage before it sends again what it has sent so
far. Neighbours that are lost together are sent it once, by whoever is before the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from dagflow.errors import WorkersLost

# Events ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagesLost:
    """A worker is gone, or stages are from it; repeated for the same stages it says nothing new.

    Attributes
    ----------
    address : str
        The worker's.
    stages : tuple of int
        That it had.
    """

    address: str
    stages: tuple[int, ...]


@dataclass(frozen=True)
class TryAgain:
    """A worker has come, or somebody sends tokens: where nobody was, somebody may be now."""


@dataclass(frozen=True)
class Lacking:
    """A stage has got tokens of sessions out of turn: it lacks those before."""

    stage: int
    sessions: tuple[str, ...]


@dataclass(frozen=True)
class SessionBack:
    """All stages are to be sent a session's tokens: it has room again, or they got lost on the way."""

    session: str


@dataclass(frozen=True)
class Placed:
    """A stage has been opened on a worker."""

    attempt: int
    address: str


@dataclass(frozen=True)
class NobodyCame:
    """No worker could take a stage in time."""

    attempt: int
    error: WorkersLost


@dataclass(frozen=True)
class RoomMade:
    """Sessions that had to leave have left, and caches have room for those that are there."""

    attempt: int


@dataclass(frozen=True)
class Sent:
    """What was to be sent again is on its way."""

    attempt: int


Report: TypeAlias = Placed | NobodyCame | RoomMade | Sent
Event: TypeAlias = StagesLost | TryAgain | Lacking | SessionBack | Report


# Instructions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Put a stage on a worker; report `Placed` or `NobodyCame`."""

    attempt: int
    stage: int


@dataclass(frozen=True)
class MakeRoom:
    """Take the room that caches have where the stages are now; report `RoomMade`."""

    attempt: int


@dataclass(frozen=True)
class Resend:
    """Have stages sent again what sessions have sent so far.

    Attributes
    ----------
    stage : int
        The first that gets it.
    rebuilt : tuple of int
        Stages that have nothing: what they are sent, they send on whole to the next of them.
    sessions : tuple of str or None
        None for all.
    """

    stage: int
    rebuilt: tuple[int, ...]
    sessions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Send:
    """Tell stages where their successors are, then have some sent again what they lack; report `Sent`."""

    attempt: int
    routes: tuple[int, ...]
    resends: tuple[Resend, ...]


@dataclass(frozen=True)
class GiveUp:
    """Whoever waits hears that nothing comes."""

    error: WorkersLost


Instruction: TypeAlias = Place | MakeRoom | Send | GiveUp


class Mending:
    """Decides what is done about lost stages and tokens, one instruction at a time.

    A report counts for the instruction that it names, and only while that is the newest: late and
    repeated ones change nothing.

    Parameters
    ----------
    num_stages : int

    Attributes
    ----------
    lost : set of int
        Stages that no worker has.
    bare : set of int
        Stages that have been placed again and haven't been sent anything.
    """

    def __init__(self, num_stages: int) -> None:
        self.lost: set[int] = set()
        self.bare: set[int] = set()
        self._num_stages = num_stages
        self._lacking: set[tuple[int, str]] = set()
        self._back: dict[str, None] = {}  # in their order
        self._attempt = 0
        self._is_busy = False
        self._placing = 0
        self._gone: set[str] = set()  # since a stage is being placed
        self._has_room = False
        self._is_hopeless = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._is_busy

    def abandon(self) -> None:
        """What is under way has failed as nobody expected: it is done again when there is a reason to."""
        self._is_busy, self._is_hopeless = False, True

    def handle(self, event: Event) -> list[Instruction]:
        """Return what to do about an event."""
        match event:
            case StagesLost(address, stages):
                self._lose(address, stages)
            case TryAgain():
                self._is_hopeless = False
            case Lacking(stage, sessions):
                self._lacking |= {(stage, session) for session in sessions}
            case SessionBack(session):
                self._back[session] = None
            case _ if event.attempt != self._attempt or self.is_idle:
                return []  # too late to matter
            case NobodyCame(_, error):
                self._is_busy, self._is_hopeless = False, True
                return [GiveUp(error)]
            case _:
                self._hear(event)
        return self._next()

    def _lose(self, address: str, stages: Iterable[int]) -> None:
        self._gone.add(address)
        lost = set(stages)
        if lost:
            self.lost |= lost
            self.bare -= lost
            self._has_room = self._is_hopeless = False

    def _hear(self, report: Report) -> None:
        """An instruction has been carried out."""
        self._is_busy = False
        if isinstance(report, Placed) and report.address not in self._gone:
            self.lost.discard(self._placing)
            self.bare.add(self._placing)
            self._has_room = False
        elif isinstance(report, RoomMade):
            self._has_room = not self.lost  # a stage that is placed once more may take of it

    def _next(self) -> list[Instruction]:
        if not self.is_idle:
            return []  # what is under way comes first
        if self.lost:
            if self._is_hopeless:
                return []
            self._placing = min(self.lost)
            self._gone.clear()
            return [Place(self._begin(), self._placing)]
        if self.bare and not self._has_room:
            return [MakeRoom(self._begin())]
        if self.bare or self._lacking or self._back:
            return [self._send()]
        return []

    def _begin(self) -> int:
        """Return by which number the instruction that is given now will be reported."""
        self._is_busy = True
        self._attempt += 1
        return self._attempt

    def _send(self) -> Send:
        bare = sorted(self.bare)
        resends = [Resend(run[0], run) for run in neighbours(bare)]
        # Stages that have just been sent everything lack nothing any more.
        for stage in sorted({stage for stage, _ in self._lacking} - self.bare):
            sessions = sorted(session for number, session in self._lacking if number == stage)
            resends.append(Resend(stage, (stage,), tuple(sessions)))
        if self._back:
            resends.append(Resend(0, tuple(range(self._num_stages)), tuple(self._back)))
        self.bare.clear()
        self._lacking.clear()
        self._back.clear()
        return Send(self._begin(), tuple(bare), tuple(resends))


def neighbours(stages: Iterable[int]) -> list[tuple[int, ...]]:
    """Return stages in groups of neighbours.

    >>> neighbours([0, 2, 3])
    [(0,), (2, 3)]
    """
    found: list[tuple[int, ...]] = []
    for stage in stages:
        if found and found[-1][-1] == stage - 1:
            found[-1] = (*found[-1], stage)
        else:
            found.append((stage,))
    return found
