"""Which process this is, so that another one on the same machine can tell that it has ended."""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from all others that ever had its number.

    Attributes
    ----------
    host, pid
        For people.
    machine
        The same for two processes only if they see the same process numbers: the boot's id and
        the namespace of process numbers, since containers share the first and count for
        themselves. Empty where the system doesn't say.
    started
        When the process started, in the kernel's ticks since boot; empty where unknown.
    """

    host: str
    pid: int
    machine: str = ""
    started: str = ""

    @classmethod
    def of_this_process(cls) -> "ProcessIdentity":
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _start_of(pid))

    def has_ended(self) -> bool:
        """Whether the process is certainly gone; False also when that can't be seen from here."""
        # Only where the kernel tells machines apart; elsewhere (Windows) a signal 0 isn't
        # harmless either.
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # somebody else's process: alive
        if _is_zombie(self.pid):
            return True
        found = _start_of(self.pid)
        return bool(found and self.started and found != self.started)


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    return ""


def _start_of(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] == ["Z"]


def _stat(pid: int) -> list[str]:
    """What follows the program's name, which may hold anything, in the kernel's line."""
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []
