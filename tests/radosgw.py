"""A real S3 server on this machine: Debian's Ceph: a monitor, an object daemon, a gateway.

    python tests/radosgw.py FOLDER PORT

runs it in the foreground until nobody uses it any more: every user keeps a file named after its
process id in ``FOLDER/users``, and a user that dies without removing its file is noticed. Writes
``FOLDER/ready`` once it answers. Needs root, and the packages that `make s3-server` installs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret123"
PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "setpriv")
START_SECONDS = 120.0
POLL_SECONDS = 0.2

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port},v1:127.0.0.1:{mon_v1_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
mon initial members = a
keyring = {folder}/keyring
auth allow insecure global id reclaim = false
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 21474836480
osd memory target = 939524096
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {folder}/rgw
rgw dynamic resharding = false
"""
KEYS = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *"],
    "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
    "client.rgw.a": ["mon", "allow rwx", "osd", "allow rwx"],
}


def why_not() -> str | None:
    """Why it can't be started here; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"radosgw isn't installed here (no {', '.join(missing)}): `make s3-server` as root"
    if os.geteuid() != 0:
        return "radosgw needs root"
    return None


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens at `port`."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Cluster:
    """A monitor, an object daemon and a gateway below `folder`, children of this process.

    Without Ceph's manager, which would take the most memory and only keeps statistics.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._deadline = time.monotonic() + START_SECONDS
        self._environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}

    def start(self) -> None:
        """Return once the gateway answers."""
        self._write_configuration()
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a",
                  f"[v2:127.0.0.1:{self._mon_port},v1:127.0.0.1:{self._mon_v1_port}]",
                  str(self._folder / "monmap"))  # fmt: skip
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self._folder / "monmap"))
        self._daemon("ceph-mon", "-f", "-i", "a")
        self._wait(lambda: answers(self._mon_port), "the monitor")
        identity = str(uuid.uuid4())
        self._run("ceph", "osd", "create", identity, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
        self._daemon("ceph-osd", "-f", "-i", "0")
        self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"), "the object daemon")
        self._run("radosgw-admin", "-n", "client.rgw.a", "user", "create", "--uid=test",
                  "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")  # fmt: skip
        self._daemon("radosgw", "-f", "-n", "client.rgw.a")
        self._wait(lambda: answers(self._port), "the gateway")

    def is_alive(self) -> bool:
        """Whether all daemons run."""
        return all(daemon.poll() is None for daemon in self._daemons)

    def stop(self) -> None:
        """Kill the daemons: what they store is thrown away."""
        for daemon in self._daemons:
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait()

    def _write_configuration(self) -> None:
        for name in ("mon", "osd", "run", "log", "rgw"):
            (self._folder / name).mkdir(parents=True)
        self._fsid = str(uuid.uuid4())
        self._mon_port, self._mon_v1_port = free_port(), free_port()
        configuration = CONFIGURATION.format(
            fsid=self._fsid,
            mon_port=self._mon_port,
            mon_v1_port=self._mon_v1_port,
            folder=self._folder,
            port=self._port,
        )
        (self._folder / "ceph.conf").write_text(configuration)
        keyring = self._folder / "keyring"
        for index, (name, capabilities) in enumerate(KEYS.items()):
            pairs = zip(capabilities[::2], capabilities[1::2], strict=True)
            caps = [word for who, what in pairs for word in ("--cap", who, what)]
            create = ["--create-keyring"] if index == 0 else []
            self._run("ceph-authtool", *create, str(keyring), "--gen-key", "-n", name, *caps)

    def _run(self, *command: str) -> str:
        left = max(1.0, self._deadline - time.monotonic())
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=left
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _daemon(self, *command: str) -> None:
        with open(self._folder / "log" / f"{command[0]}.out", "wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    # Whatever ends this process, none of them stays behind.
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        while not is_there():
            if not self.is_alive() or time.monotonic() > self._deadline:
                raise RuntimeError(f"{what} did not start; see {self._folder}/log")
            time.sleep(POLL_SECONDS)


def is_running(process_id: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_used(folder: Path) -> bool:
    """Whether a user that runs says so."""
    return any(is_running(int(user.name)) for user in (folder / "users").iterdir())


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    cluster = Cluster(folder, port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        cluster.start()
        (folder / "ready").touch()
        while is_used(folder) and cluster.is_alive():
            time.sleep(POLL_SECONDS)
    finally:
        cluster.stop()
    # Only if all went well: a start that failed leaves its logs.
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
