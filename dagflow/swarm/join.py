"""The parent of a volunteer's worker: ``python -m dagflow.swarm.join``, started by ``dagflow join``.

It starts the ``dask worker`` process, and starts it again when it ends without having been asked
to; `dagflow.swarm.supervision` decides, and this module carries it out. It imports neither torch nor
dask: all it costs is 20 MB.

The worker's processes are in a session of their own. A terminal sends Ctrl-C to every process of
the foreground, and a dask worker that gets it itself can't close any more: its nanny kills it after
eight seconds. So the parent alone hears it, and tells the worker through its standard input: when
that ends, `dagflow.nanny` leaves. It ends, too, when the parent is killed, so nothing is orphaned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dagflow.swarm.allocator import with_allocator
from dagflow.swarm.supervision import (
    AskedToLeave,
    Begun,
    End,
    Event,
    Instruction,
    KillWorker,
    LetWorkerLeave,
    LifetimeOver,
    Look,
    NobodyAnswers,
    Pause,
    PauseOver,
    Say,
    SchedulerAnswers,
    StartWorker,
    Supervision,
    WorkerEnded,
)

# Names the file in which a worker says that the scheduler has asked it to leave.
FAREWELL_VARIABLE = "DAGFLOW_JOIN_FAREWELL"
# dask's own: where its setting "temporary-directory" is given.
TEMPORARY_VARIABLE = "DASK_TEMPORARY_DIRECTORY"
LOOK_SECONDS = 5.0
_PROTOCOLS = ("tcp", "tls", "ws", "wss", "ucx", "ucxx")
# Ports that nobody can look at with a plain connection.
_NOT_STREAMS = ("ucx", "ucxx")
_STDIN = 0
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


# What a volunteer hears of dask: what its memory does. A scheduler that goes away makes dask say so
# in five tracebacks, and dagflow in a line.
_QUIET = {
    "distributed": "critical",
    "distributed.nanny.memory": "warning",
    "distributed.worker.memory": "warning",
    "tornado.application": "critical",
    "asyncio": "critical",
}


def hush_dask(environment: MutableMapping[str, str]) -> None:
    """Have dask's processes with these variables tell only what a volunteer wants to know."""
    if not any(name.startswith("DASK_LOGGING") for name in environment):
        environment["DASK_LOGGING"] = repr(_QUIET)


def with_private_folder(environment: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return an environment in which dask keeps its files in a folder, unless it says where already.

    dask imports modules from there, and takes a folder of /tmp that any account may have made first.
    """
    return {TEMPORARY_VARIABLE: folder, **environment}


def scheduler_endpoint(address: str) -> tuple[str, str, int]:
    """Return protocol, host and port of a scheduler's address, as dask takes it.

    Raises
    ------
    ValueError
        Saying what is wrong with it.
    """
    text = address if "://" in address else f"tcp://{address}"
    parts = urlsplit(text)
    if parts.scheme not in _PROTOCOLS:
        raise ValueError(f"{parts.scheme!r} is none of the protocols {', '.join(_PROTOCOLS)}")
    if not parts.hostname or parts.path.strip("/") or any(c.isspace() for c in address):
        raise ValueError("an address is PROTOCOL://HOST:PORT, like tcp://10.0.0.1:8786")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"a port is a number up to 65535: {error}") from error
    if not port:
        raise ValueError(f"the port is missing; dask's own is 8786: {text.rstrip('/:')}:8786")
    return parts.scheme, parts.hostname, port


def why_nobody_answers(address: str) -> str | None:
    """Look whether a scheduler answers at an address, as far as a stranger can tell; return why not.

    Raises
    ------
    ValueError
        If it is no address.
    """
    protocol, host, port = scheduler_endpoint(address)
    if protocol in _NOT_STREAMS:
        return None
    try:
        with socket.create_connection((host, port), timeout=LOOK_SECONDS) as connection:
            # dask's server speaks first, if it isn't frozen, and if it is one.
            if protocol == "tcp" and not connection.recv(1):
                return "whatever is there hangs up"
    except TimeoutError:
        return f"no answer within {LOOK_SECONDS:g} s"
    except OSError as error:
        said = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        return (said or str(error)).lower()
    return None


def main(arguments: Sequence[str]) -> int:
    """Supervise a worker; return the exit status.

    Parameters
    ----------
    arguments : Sequence[str]
        The scheduler's address, the seconds to wait for it and the lifetime in seconds (each may be
        empty for no end), and the worker's command.
    """
    address, wait, lifetime, *command = arguments
    supervision = Supervision(address, random.random, float(wait) if wait else None)
    with tempfile.TemporaryDirectory(prefix="dagflow-join-") as folder:
        parent = _Parent(supervision, address, command, Path(folder) / "farewell")
        return asyncio.run(parent.run(float(lifetime) if lifetime else None))


class _Parent:
    """Carries out a supervision's instructions, and tells it what happens."""

    def __init__(
        self, supervision: Supervision, address: str, command: Sequence[str], farewell: Path
    ) -> None:
        self._supervision = supervision
        self._address = address
        self._command = command
        self._farewell = farewell
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._worker: asyncio.subprocess.Process | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, lifetime_seconds: float | None) -> int:
        """Go on until the supervision says how to end."""
        loop = asyncio.get_running_loop()
        self._hear_signals(loop)
        if lifetime_seconds is not None:
            loop.call_later(lifetime_seconds, self._events.put_nowait, LifetimeOver())
        self._events.put_nowait(Begun())
        while True:
            event = await self._events.get()
            for instruction in self._supervision.handle(event, time.monotonic()):
                if isinstance(instruction, End):
                    return instruction.status
                await self._carry_out(instruction)

    def _hear_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        def note(*_: Any) -> None:
            # In a signal handler nothing but this is safe.
            loop.call_soon_threadsafe(self._events.put_nowait, AskedToLeave())

        for name in _SIGNALS:
            number = getattr(signal, name, None)
            # Started with nohup, it outlives its terminal.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, note)

    async def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Say(text):
                print(f"dagflow join: {text}", file=sys.stderr, flush=True)
            case Look():
                self._spawn(self._look())
            case StartWorker():
                await self._start_worker()
            case Pause(seconds):
                if self._pause is not None:
                    self._pause.cancel()
                loop = asyncio.get_running_loop()
                self._pause = loop.call_later(seconds, self._events.put_nowait, PauseOver())
            case LetWorkerLeave():
                if self._worker is not None and self._worker.stdin is not None:
                    self._worker.stdin.close()
            case KillWorker():
                self._kill_worker()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _look(self) -> None:
        why = await asyncio.to_thread(why_nobody_answers, self._address)
        self._events.put_nowait(SchedulerAnswers() if why is None else NobodyAnswers(why))

    async def _start_worker(self) -> None:
        self._farewell.unlink(missing_ok=True)
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._worker = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            env={
                **with_private_folder(with_allocator(os.environ), str(self._farewell.parent)),
                FAREWELL_VARIABLE: str(self._farewell),
            },
            **options,
        )
        self._spawn(self._watch(self._worker))

    async def _watch(self, worker: asyncio.subprocess.Process) -> None:
        status = await worker.wait()
        self._events.put_nowait(WorkerEnded(status, self._farewell.exists()))

    def _kill_worker(self) -> None:
        worker = self._worker
        if worker is None or worker.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(worker.pid, signal.SIGKILL)  # the leader of its session
            else:
                worker.kill()


def set_retired(retired: bool) -> None:
    """Leave word for the parent, or take it back, that the scheduler has let this worker go."""
    path = os.environ.get(FAREWELL_VARIABLE)
    if path is None:
        return
    with contextlib.suppress(OSError):  # the parent is gone
        if retired:
            Path(path).touch()
        else:
            Path(path).unlink(missing_ok=True)


def when_parent_leaves(act: Callable[[], object]) -> None:
    """Return at once, and `act` in another thread once the parent asks for it or is gone."""
    if FAREWELL_VARIABLE not in os.environ:
        return  # started by somebody else, whose standard input means nothing

    def listen() -> None:
        # Not through sys.stdin, whose lock Python wants when it ends.
        while os.read(_STDIN, 1):
            pass
        act()

    threading.Thread(target=listen, name="dagflow-join-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
