"""Runs a swarm of real processes, lets a script of faults happen to it, and tells what came of it.

The driver asks before it goes on after each step, and a worker asks at the tasks that the script
names. So a fault happens at a known place of the run, whatever the machine's speed; what else is in
flight then is up to chance, and must not matter.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distributed import Client

from chaos import accounting, warm
from chaos.accounting import Execution, Hit
from chaos.away import FLAG
from chaos.driving import GO_ON, Recipe, drive
from chaos.faults import AfterStep, Fault, Incident, InTask, WhileRebuilding
from chaos.scheduling import scheduler
from chaos.volunteer import REPLAYING, volunteer
from dagflow.swarm.clusters import scheduler_info

# A worker that wakes takes up what it was told meanwhile, which others may have done.
_CATCH_UP_SECONDS = 2.0
# A stopped worker that nobody noticed is woken after so long, so that the run doesn't hang.
_WAKE_SECONDS = 30.0
_SLOW_ON_SECONDS, _SLOW_OFF_SECONDS = 0.02, 0.08


class Stuck(Exception):
    """The run didn't get on."""


@dataclass(eq=False)
class Volunteer:
    """A worker's process, and the way it asks the harness."""

    name: str
    process: BaseProcess
    asks: Connection


@dataclass
class Outcome:
    """What came of a run.

    Attributes
    ----------
    steps : list of (int, float)
        What drivers have told: step and loss, repeated where a driver went back.
    fired : list of Incident
    executions : list of Execution
    hits : list of Hit
    alarms : list of Hit
        When the driver took a worker to be stalled.
    reruns : list of Execution
        What dask ran again by itself before the driver's answer to a fault had reached it.
    seconds : float
    """

    steps: list[tuple[int, float]]
    fired: list[Incident]
    executions: list[Execution]
    hits: list[Hit]
    alarms: list[Hit]
    reruns: list[Execution]
    seconds: float

    @property
    def steps_repeated(self) -> int:
        """Steps that were told again, because a driver went back."""
        return len(self.steps) - len({step for step, _ in self.steps})

    @property
    def num_moved(self) -> int:
        """How often a stage was moved though nothing had happened: spread out, or a false alarm."""
        happened = frozenset[str]().union(*(hit.volunteers for hit in self.hits))
        return sum(not alarm.volunteers <= happened for alarm in self.alarms)

    def unexplained(self) -> list[str]:
        """Say what was computed again for no reason that the faults or an alarm give."""
        counted = [e for e in self.executions if e not in self.reruns]
        return accounting.unexplained(counted, [*self.hits, *self.alarms])


@dataclass
class Harness:
    """One run under a script.

    Parameters
    ----------
    folder
        For everything: the store is `folder`/run.
    recipe
    incidents
    num_volunteers : int
        How many workers there are at the beginning; whoever is killed is replaced at once.
    seed : int
        Decides what the script leaves open.
    stuck_seconds : float
        How long nothing may happen.
    kill_every_seconds : float
        Kill some stage's worker so often; for benchmarks, since it depends on the machine.
    cold : bool
        Whether whoever comes back has to import everything first.
    """

    folder: Path
    recipe: Recipe
    incidents: Sequence[Incident] = ()
    num_volunteers: int = 5
    seed: int = 0
    stuck_seconds: float = 60.0
    kill_every_seconds: float = math.inf
    cold: bool = False
    _waiting: dict[int, Incident] = field(default_factory=dict)
    _lasting: list[tuple[int, float, Any]] = field(default_factory=list)
    _fired: list[Incident] = field(default_factory=list)
    _hits: list[Hit] = field(default_factory=list)
    _steps: list[tuple[int, float]] = field(default_factory=list)
    _volunteers: list[Volunteer] = field(default_factory=list)
    _num_started: int = 0
    _driver: BaseProcess | None = None
    _scheduler: BaseProcess | None = None
    _told: Connection | None = None
    _next_kill: float = math.inf
    _driver_away: bool = False

    def __post_init__(self) -> None:
        self._waiting = {incident.number: incident for incident in self.incidents}
        self._rng = random.Random(self.seed)
        self._port = _free_port()
        self.final = self.folder / "final.pt"
        protocol = "away://" if self._expects(Fault.STORE_AWAY) else ""
        self.store = f"{protocol}{self.folder}/run"

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def run(self) -> Outcome:
        """Run to the end.

        Raises
        ------
        Stuck
            If nothing happened for a while, or a driver gave up.
        """
        begin = time.monotonic()
        try:
            self._start_scheduler()
            for _ in range(self.num_volunteers):
                self._start_volunteer()
            self._start_driver()
            while not self._finished():
                self._attend()
        finally:
            self._end()
        seconds = time.monotonic() - begin
        executions = accounting.read_executions(self.folder)
        alarms = accounting.alarms(self.folder)
        reruns = accounting.reruns(executions, self._hits)
        return Outcome(self._steps, self._fired, executions, self._hits, alarms, reruns, seconds)

    def _expects(self, fault: Fault) -> bool:
        return any(incident.fault is fault for incident in self.incidents)

    # Processes

    def _start_scheduler(self) -> None:
        self._scheduler = warm.start(scheduler, self.folder / "scheduler.log", self._port)

    def _start_volunteer(self) -> None:
        name = f"volunteer-{self._num_started:03d}"
        self._num_started += 1
        asks, asked = multiprocessing.Pipe()
        moments = frozenset(i.moment for i in self.incidents if isinstance(i.moment, InTask))
        log = self.folder / f"{name}.log"
        arguments = (self.address, name, self.folder, asked, moments)
        process = warm.start(volunteer, log, *arguments, cold=self.cold)
        asked.close()
        self._volunteers.append(Volunteer(name, process, asks))

    def _start_driver(self) -> None:
        self._told, told = multiprocessing.Pipe()
        log = self.folder / "driver.log"
        wait_seconds = self.stuck_seconds / 2
        arguments = (self.recipe, self.address, self.store, self.final, told, wait_seconds)
        self._driver = warm.start(drive, log, *arguments)
        told.close()

    def _finished(self) -> bool:
        assert self._driver is not None
        if self._driver.is_alive():
            return False
        if self._driver.exitcode == 0:
            return True
        raise Stuck(f"The driver ended with {self._driver.exitcode}.\n{self._last_words()}")

    def _last_words(self) -> str:
        text = (self.folder / "driver.log").read_text(errors="replace")
        fired = "\n".join(map(str, self._fired))
        return f"{text[-6000:]}\nSo far: step {self._steps[-1:]}\n{fired}\nIn {self.folder}"

    def _end(self) -> None:
        for _, _, undo in self._lasting:
            undo()
        for process in [self._driver, *(v.process for v in self._volunteers), self._scheduler]:
            if process is not None:
                _kill(process)

    # What happens

    def _attend(self) -> None:
        """Wait for somebody to ask or to end, and answer."""
        assert self._driver is not None
        assert self._told is not None
        asking = {v.asks: v for v in self._volunteers}
        ended = {v.process.sentinel: v for v in self._volunteers}
        ready = wait(
            [self._told, self._driver.sentinel, *asking, *ended],
            self._seconds_left(),
        )
        if time.monotonic() >= self._next_kill:
            self._next_kill += self.kill_every_seconds
            self._kill(self._workers_of([self._rng.randrange(self.recipe.extent.num_stages)]))
        elif not ready and not self._lasting:
            raise Stuck(f"Nothing happened for {self.stuck_seconds} s.\n{self._last_words()}")
        self._end_overdue()
        for item in ready:
            if item is self._told:
                self._hear_driver()
            elif item in asking and asking[item] in self._volunteers:
                self._hear_volunteer(asking[item])
            elif item in ended and ended[item] in self._volunteers:
                # Not by us: its scheduler is gone, or it gave up. Volunteers' machines stay.
                self._replace(ended[item])

    def _seconds_left(self) -> float:
        ends = [end for _, end, _ in self._lasting]
        ends.append(self._next_kill)
        return max(0.0, min([*ends, time.monotonic() + self.stuck_seconds]) - time.monotonic())

    def _end_overdue(self) -> None:
        self._end_lasting(lambda _, end: end <= time.monotonic())

    def _end_lasting(self, over: Any) -> None:
        kept = []
        for step, end, undo in self._lasting:
            if over(step, end):
                undo()
            else:
                kept.append((step, end, undo))
        self._lasting = kept

    def _hear_driver(self) -> None:
        assert self._told is not None
        told = self._told
        try:
            step, loss = told.recv()
        except EOFError:
            told.close()
            self._told = _never()
            return
        if not self._steps:
            self._next_kill = time.monotonic() + self.kill_every_seconds
        self._steps.append((step, loss))
        if self._driver_away:
            # Workers went on with what the last driver had handed them until this one came.
            self._driver_away = False
            now = time.monotonic()
            self._hits = [
                h if h.volunteers else replace(h, end=max(h.end, now)) for h in self._hits
            ]
        self._end_lasting(lambda last_step, _: last_step <= step)
        for incident in [i for i in self._waiting.values() if _is_due(i, step)]:
            self._fire(incident, None)
        if self._told is told:
            told.send(GO_ON)

    def _hear_volunteer(self, who: Volunteer) -> None:
        try:
            place = who.asks.recv()
        except (EOFError, ConnectionResetError):
            self._replace(who)
            return
        answer: Any = GO_ON
        for incident in [i for i in self._waiting.values() if self._is_meant(i, place)]:
            answer = self._fire(incident, who) or GO_ON
            break
        if who in self._volunteers:
            who.asks.send(answer)

    def _is_meant(self, incident: Incident, place: tuple[str, int, int, int]) -> bool:
        moment = incident.moment
        if isinstance(moment, InTask):
            return moment == InTask(*place)
        if not isinstance(moment, WhileRebuilding) or moment.incident in self._waiting:
            return False
        # Every other one a step into the replay.
        return place[1] > 0 and (place[0] == REPLAYING or incident.number % 2 == 0)

    def _replace(self, who: Volunteer) -> None:
        """Let a volunteer that is gone come back, as a new worker."""
        self._volunteers.remove(who)
        who.asks.close()
        _kill(who.process)
        self._over(who)
        if len(self._volunteers) < self.num_volunteers:
            self._start_volunteer()

    # Faults

    def _fire(self, incident: Incident, who: Volunteer | None) -> Fault | None:
        del self._waiting[incident.number]
        self._fired.append(incident)
        fault = incident.fault
        with (self.folder / "driver.log").open("a") as log:
            log.write(f"[{time.monotonic():.3f}] *** {incident}\n")
        victims = [who] if who is not None else self._workers_of(incident.stages)
        if fault in (Fault.KILL, Fault.KILL_IN_TASK, Fault.KILL_REBUILDING, Fault.KILL_SEVERAL):
            self._kill(victims)
        elif fault is Fault.KILL_ALL:
            self._kill(list(self._volunteers))
        elif fault is Fault.RETIRE:
            self._retire(victims[0])
        elif fault is Fault.INTERRUPT:
            self._interrupt(victims[0])
        elif fault is Fault.JOIN:
            self.num_volunteers += 1
            self._start_volunteer()
        elif fault in (Fault.DRIVER_KILLED, Fault.DRIVER_KILLED_IN_TASK):
            self._kill_driver()
        elif fault is Fault.SCHEDULER_KILLED:
            self._kill_scheduler()
        elif fault is Fault.FREEZE:
            self._freeze(victims[0], self._steps[-1][0] + incident.lasts_steps)
        elif fault is Fault.SLOW:
            self._slow_down(victims[0], self._steps[-1][0] + incident.lasts_steps)
        elif fault is Fault.STORE_AWAY:
            self._take_store_away(self._steps[-1][0] + incident.lasts_steps)
        elif fault is Fault.DAMAGED_CHUNK:
            self._damage_newest_snapshot()
            self._kill(victims)
        else:
            # The worker does it to itself, and goes on until the driver knows and has excluded it.
            self._hit(victims, seconds=accounting.MOVE_SECONDS)
            return fault
        return None

    def _hit(
        self, whom: Sequence[Volunteer], *, sends_back: bool = False, seconds: float = 0.0
    ) -> None:
        # What was lost at the same time as others, or while others recover, may have been all
        # there was of something.
        names = frozenset(who.name for who in whom)
        now = time.monotonic()
        self._hits.append(Hit(now, now + seconds, names, sends_back))

    def _over(self, who: Volunteer, seconds: float = 0.0) -> None:
        """Note that what began to happen to a volunteer has ended: it is well again, or gone."""
        end = time.monotonic() + seconds
        self._hits = [
            replace(hit, end=end) if hit.volunteers == {who.name} else hit for hit in self._hits
        ]

    def _workers_of(self, stages: Sequence[int]) -> list[Volunteer]:
        """Return the workers of some stages; others if these are gone just now."""
        names = accounting.holders(accounting.read_executions(self.folder))
        wanted = {names.get(stage) for stage in stages}
        found = [v for v in self._volunteers if v.name in wanted]
        rest = [v for v in self._volunteers if v not in found]
        while rest and len(found) < len(wanted):
            found.append(rest.pop(self._rng.randrange(len(rest))))
        return found

    def _kill(self, whom: Sequence[Volunteer]) -> None:
        for who in whom:
            who.process.kill()
        for who in whom:
            who.process.join()
        self._hit(whom, sends_back=len(whom) > 1)
        for who in whom:
            self._replace(who)

    def _retire(self, who: Volunteer) -> None:
        """Ask the scheduler, and wait for nothing: it may want to put a result on a frozen worker."""
        self._hit([who])
        asking = threading.Thread(target=self._ask_to_retire, args=(who.name,), daemon=True)
        asking.start()

    def _ask_to_retire(self, name: str) -> None:
        # Another fault, or the end, may take the scheduler away meanwhile.
        with (
            contextlib.suppress(OSError),
            Client(self.address, set_as_default=False) as client,
        ):
            workers = scheduler_info(client)["workers"]
            addresses = [a for a, info in workers.items() if info["name"] == name]
            client.retire_workers(addresses, close_workers=True)

    def _interrupt(self, who: Volunteer) -> None:
        self._hit([who])
        assert who.process.pid is not None
        os.kill(who.process.pid, signal.SIGINT)

    def _kill_driver(self) -> None:
        assert self._driver is not None
        assert self._told is not None
        _kill(self._driver)
        self._told.close()
        self._hit([], sends_back=True)
        self._driver_away = True
        self._start_driver()

    def _kill_scheduler(self) -> None:
        assert self._scheduler is not None
        _kill(self._scheduler)
        self._hit([], sends_back=True)
        self._start_scheduler()

    def _freeze(self, who: Volunteer, last_step: int) -> None:
        self._hit([who])
        pid = who.process.pid
        assert pid is not None
        _signal(pid, signal.SIGSTOP)
        end = time.monotonic() + _WAKE_SECONDS

        def undo() -> None:
            _signal(pid, signal.SIGCONT)
            self._over(who, _CATCH_UP_SECONDS)

        self._lasting.append((last_step, end, undo))

    def _slow_down(self, who: Volunteer, last_step: int) -> None:
        self._hit([who])
        pid = who.process.pid
        assert pid is not None
        over = threading.Event()

        def stutter() -> None:
            while not over.is_set():
                _signal(pid, signal.SIGSTOP)
                over.wait(_SLOW_OFF_SECONDS)
                _signal(pid, signal.SIGCONT)
                over.wait(_SLOW_ON_SECONDS)

        thread = threading.Thread(target=stutter)
        thread.start()

        def undo() -> None:
            over.set()
            thread.join()
            self._over(who)

        self._lasting.append((last_step, time.monotonic() + _WAKE_SECONDS, undo))

    def _take_store_away(self, last_step: int) -> None:
        flag = self.folder / FLAG
        flag.touch()
        self._lasting.append((last_step, time.monotonic() + 5.0, flag.unlink))

    def _damage_newest_snapshot(self) -> None:
        manifests = sorted((self.folder / "run" / "snapshots").glob("*/manifest.json"))
        chunks = sorted(manifests[-1].parent.glob("stage-*/**/c/**/*"))
        files = [chunk for chunk in chunks if chunk.is_file()]
        if files:  # the run's first snapshot isn't by stages
            damaged = files[self._rng.randrange(len(files))]
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 0xFF
            damaged.write_bytes(content)


def _is_due(incident: Incident, step: int) -> bool:
    # Or later: a driver that goes on elsewhere may not tell of every step.
    return isinstance(incident.moment, AfterStep) and incident.moment.step <= step


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _never() -> Connection:
    """Return a connection on which nobody ever says anything."""
    here, there = multiprocessing.Pipe()
    _silent.append(there)
    return here


_silent: list[Connection] = []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
