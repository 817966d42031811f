"""What `dagflow join` does when: decisions only, so that every case is ten deterministic lines.

Events go in, instructions come out; `dagflow.swarm.join` carries them out. Imports nothing but Python:
the supervising process stays as small as that.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
# Looking is cheap, and whoever waits for this machine waits for the next look.
MAX_LOOK_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 60.0
REMIND_SECONDS = 60.0
LEAVE_SECONDS = 30.0
# What a shell shows for a program that Ctrl-C ended; leaving gracefully is a success instead.
EXIT_INTERRUPTED = 130
EXIT_NOBODY_THERE = 1
# How a worker ends that has said why it isn't wanted (sysexits' EX_CONFIG) ...
EXIT_REFUSED = 78
# ... or that has heard nothing from what listens at the scheduler's address (EX_TEMPFAIL).
EXIT_UNHEARD = 75


# Events ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begun:
    """Supervision starts."""


@dataclass(frozen=True)
class SchedulerAnswers:
    """Something listens at the scheduler's address."""


@dataclass(frozen=True)
class NobodyAnswers:
    """Nothing listens at the scheduler's address, and why."""

    reason: str


@dataclass(frozen=True)
class WorkerEnded:
    """The worker's process has ended.

    Attributes
    ----------
    status : int
        Its exit status; negative for a signal.
    retired : bool
        Whether the scheduler had asked it to leave.
    """

    status: int
    retired: bool = False


@dataclass(frozen=True)
class PauseOver:
    """The pause that was asked for last is over."""


@dataclass(frozen=True)
class AskedToLeave:
    """Somebody pressed Ctrl-C, or the system ends this program."""


@dataclass(frozen=True)
class LifetimeOver:
    """The time that this machine was lent for is over."""


Event: TypeAlias = (
    Begun | SchedulerAnswers | NobodyAnswers | WorkerEnded | PauseOver | AskedToLeave | LifetimeOver
)


# Instructions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """Tell the person at this machine."""

    text: str


@dataclass(frozen=True)
class Look:
    """Find out whether the scheduler answers."""


@dataclass(frozen=True)
class StartWorker:
    """Start the worker's process."""


@dataclass(frozen=True)
class Pause:
    """Come back after so many seconds; replaces an earlier pause."""

    seconds: float


@dataclass(frozen=True)
class LetWorkerLeave:
    """Ask the worker to hand over and end."""


@dataclass(frozen=True)
class KillWorker:
    """End the worker's processes at once."""


@dataclass(frozen=True)
class End:
    """End with this exit status."""

    status: int


Instruction: TypeAlias = Say | Look | StartWorker | Pause | LetWorkerLeave | KillWorker | End


class _State(Enum):
    LOOKING = auto()
    PAUSING = auto()
    WORKING = auto()
    LEAVING = auto()


class Supervision:
    """Keeps a worker at a scheduler until somebody says that it may go.

    Parameters
    ----------
    address : str
        The scheduler's, for what is said.
    jitter : Callable[[], float]
        Returns numbers from 0 to 1; machines that lost their scheduler together must not all come
        back in the same moment.
    wait_seconds : float, optional
        Give up when nobody has answered for so long; never by default.
    """

    def __init__(
        self, address: str, jitter: Callable[[], float], wait_seconds: float | None = None
    ) -> None:
        self._address = address
        self._jitter = jitter
        self._wait_seconds = wait_seconds
        self._state = _State.LOOKING
        self._num_failures = 0
        self._num_looks = 0
        self._looking_since = 0.0
        self._said_at = 0.0
        self._started_at = 0.0
        self._exit_status = 0
        self._has_been_healthy = False

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Return what to do about an event that happened at `now`, in steady seconds."""
        match event:
            case Begun():
                return self._look_afresh(now)
            case SchedulerAnswers() if self._state is _State.LOOKING:
                self._state, self._started_at = _State.WORKING, now
                return [StartWorker()]
            case NobodyAnswers(reason) if self._state is _State.LOOKING:
                return self._nobody(reason, now)
            case PauseOver() if self._state is _State.PAUSING:
                self._state = _State.LOOKING
                return [Look()]
            case PauseOver() if self._state is _State.LEAVING:
                text = f"The worker hasn't left within {LEAVE_SECONDS:g} s; ending it."
                return [Say(text), KillWorker()]
            case WorkerEnded(status, retired):
                return self._worker_ended(status, retired, now)
            case AskedToLeave():
                return self._leave("Ctrl-C again leaves at once.")
            case LifetimeOver() if self._state is not _State.LEAVING:
                return self._leave("This machine's time is over.")
        return []  # too late to matter

    def _look_afresh(self, now: float) -> list[Instruction]:
        self._state = _State.LOOKING
        self._num_looks, self._looking_since = 0, now
        return [Look()]

    def _nobody(self, reason: str, now: float) -> list[Instruction]:
        waited = now - self._looking_since
        where = f"No scheduler answers at {self._address} ({reason})"
        if self._wait_seconds is not None and waited >= self._wait_seconds:
            text = f"{where}; giving up after {waited:.0f} s. Is the address right?"
            return [Say(text), End(EXIT_NOBODY_THERE)]
        instructions: list[Instruction] = []
        if self._num_looks == 0 or now - self._said_at >= REMIND_SECONDS:
            self._said_at = now
            since = (
                f"; nobody for {waited:.0f} s, still trying." if self._num_looks else "; trying on."
            )
            instructions.append(Say(where + since))
        pause = self._pause_after(self._num_looks, MAX_LOOK_PAUSE_SECONDS)
        if self._wait_seconds is not None:
            pause = min(pause, self._wait_seconds - waited)
        self._num_looks += 1
        self._state = _State.PAUSING
        return [*instructions, Pause(pause)]

    def _worker_ended(self, status: int, retired: bool, now: float) -> list[Instruction]:
        if self._state is _State.LEAVING:
            return [End(self._exit_status)]
        if retired:
            return [Say(f"The scheduler at {self._address} let this machine go. Goodbye."), End(0)]
        if status == EXIT_UNHEARD:
            self._state = _State.LOOKING
            return self._nobody("whatever is there doesn't answer as one", now)
        if status == EXIT_REFUSED and not self._has_been_healthy:
            return [End(EXIT_NOBODY_THERE)]
        if now - self._started_at >= HEALTHY_SECONDS:
            self._num_failures, self._has_been_healthy = 0, True
        pause = self._pause_after(self._num_failures, MAX_PAUSE_SECONDS)
        self._num_failures += 1
        self._look_afresh(now)
        self._state = _State.PAUSING
        return [Say(f"{self._what_happened(status)}; trying again in {pause:.0f} s."), Pause(pause)]

    def _what_happened(self, status: int) -> str:
        if status == 0:
            return f"The scheduler at {self._address} went away"
        if status == EXIT_REFUSED:  # for now: the scheduler hasn't noticed yet that it had gone
            return "Refused, though it has been taken before"
        if status > 0:
            return f"The worker ended with status {status} (--verbose says more)"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"The worker was ended by {name}{hint}"

    def _pause_after(self, num_failures: int, longest: float) -> float:
        """Double with every failure, and take between half of that and all."""
        whole = min(MIN_PAUSE_SECONDS * 2.0 ** min(num_failures, 30), longest)
        return max(MIN_PAUSE_SECONDS, whole * (1 + self._jitter()) / 2)

    def _leave(self, why: str) -> list[Instruction]:
        if self._state is _State.LEAVING:
            self._exit_status = EXIT_INTERRUPTED
            return [KillWorker()]
        worked = self._state is _State.WORKING
        self._state = _State.LEAVING
        if not worked:
            return [End(0)]
        text = f"Leaving: the worker hands over what it has. {why}"
        return [Say(text), LetWorkerLeave(), Pause(LEAVE_SECONDS)]
