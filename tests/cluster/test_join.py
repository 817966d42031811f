"""`dagflow join` in real processes: it comes back, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from chaos import scheduling, warm
from click.testing import CliRunner
from distributed import Client, Nanny
from local import local_cluster, wait_until
from processes import BIN, Copy, dask_worker, kill_group, own_scheduler, start, swarm

from dagflow.cli import main
from dagflow.nanny import dask_teardown
from dagflow.swarm.clusters import _connected as connected_to
from dagflow.swarm.clusters import scheduler_info
from dagflow.swarm.join import why_nobody_answers
from dagflow.swarm.volunteer import _offer, _others_here, _refusal

JOIN: list[str | Path] = [BIN / "dagflow", "join", "ADDRESS", "--torch-threads", "1"]


AnyProcess = TypeVar("AnyProcess", subprocess.Popen[str], Copy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ended(process: AnyProcess) -> Iterator[AnyProcess]:
    """Kill a process at the end of the block."""
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate()


@contextlib.contextmanager
def scheduler(port: int, log: Path) -> Iterator[Copy]:
    """Start a ``dask scheduler``, and kill it at the end of the block."""
    process = Copy(warm.start(scheduling.scheduler, log, port))
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate()


def connected(port: int) -> Client:
    return Client(f"tcp://127.0.0.1:{port}", set_as_default=False, timeout=60)


def worker_pids(client: Client) -> set[int]:
    """Return the process numbers of all workers and their nannies."""
    # A nanny answers once it has started completely.
    nannies: dict[str, int] = client.run(os.getpid, nanny=True)
    return {*client.run(os.getpid).values(), *nannies.values()}


def all_gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_machine_comes_back_when_its_scheduler_does_until_it_is_retired(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "join.log"
    command = [f"tcp://127.0.0.1:{port}" if part == "ADDRESS" else part for part in JOIN]
    with ended(start(command, log)) as joined:
        wait_until(lambda: "No scheduler answers" in log.read_text(), "it says that it waits")
        with scheduler(port, tmp_path / "first.log") as first:
            with connected(port) as client:
                client.wait_for_workers(1, timeout=60)
                before = worker_pids(client)
            kill_group(first)
        wait_until(lambda: all_gone(before), "the first worker has ended")
        wait_until(lambda: "went away; trying again in" in log.read_text(), "it says what happened")
        with scheduler(port, tmp_path / "second.log"), connected(port) as client:
            client.wait_for_workers(1, timeout=60)
            assert client.submit(sum, (1, 2, 3)).result(timeout=60) == 6
            pids = worker_pids(client)
            client.retire_workers(list(scheduler_info(client)["workers"]))
            assert joined.wait(timeout=20) == 0
            wait_until(lambda: all_gone(pids), "no process is left", 5)
    said = log.read_text().splitlines()
    for line, words in zip(said, ("No scheduler", "Offering", "went away"), strict=False):
        assert words in line
    assert "let this machine go" in said[-1]
    # It may have looked for the scheduler in vain in between.
    assert all(line.startswith("dagflow join: ") for line in said)
    assert len(said) <= 6, said


def test_a_name_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with own_scheduler() as (client, address):
        arguments = [address, "--no-nanny", "--no-dashboard", "--name", "attic"]
        with ended(Copy(warm.start(dask_worker, tmp_path / "first.log", arguments))):
            client.wait_for_workers(1, timeout=60)
            command = [address if part == "ADDRESS" else part for part in JOIN]
            log = tmp_path / "second.log"
            with ended(start([*command, "--name", "attic"], log)) as second:
                assert second.wait(timeout=30) == 1
    (line,) = log.read_text().splitlines()
    assert "The name 'attic' is taken" in line
    assert "--name" in line


def test_what_is_no_scheduler_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_cluster(1) as cluster:
        (nanny,) = cluster.workers.values()
        assert asyncio.run(_refusal(cluster.scheduler_address, "attic")) is None
        for address, kind in ((nanny.address, "WarmNanny"), (nanny.worker_address, "Worker")):
            refusal = asyncio.run(_refusal(address, None))
            assert refusal == f"What answers at {address} is no dask scheduler but a {kind}."
    with listening(b"HTTP/1.1 400 Bad Request\r\n" * 3) as address:
        assert why_nobody_answers(address) is None  # it says something, after all
        monkeypatch.setattr("dagflow.swarm.volunteer._ANSWER_SECONDS", 0.5)
        with pytest.raises((OSError, TimeoutError)):
            asyncio.run(_refusal(address, None))
    with listening(b"") as address:
        assert why_nobody_answers(address) == "whatever is there hangs up"


def test_what_listens_and_says_nothing_is_told_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dagflow.swarm.join.LOOK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        assert why_nobody_answers(address) == "no answer within 0.2 s"


@contextlib.contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """Answer whoever connects with some bytes, and hang up; yield the address."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_joins_on_one_machine_count_each_other_and_say_what_they_offer(tmp_path: Path) -> None:
    nobody = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-P", "-m", "dagflow.swarm.join", nobody, "", "", "worker"]
    with ended(start(command, tmp_path / "log")) as other:
        wait_until(lambda: other.pid in _others_here(), "the other join is seen")
    assert other.pid not in _others_here()
    assert _offer("8000000000", 2, []) == ("Offering 7.45 GiB and 2 threads: all of this machine.")
    shared = _offer("4000000000", 1, [123])
    assert shared.startswith("Offering 3.73 GiB and 1 thread, one of 2 shares of this machine")
    assert "process 123" in shared


def test_a_name_that_cannot_be_resolved_for_a_minute_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.getaddrinfo
    asked = []

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        if host != "swarm.example":
            return real(host, *args, **options)
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with own_scheduler() as (_, address):
        named = f"tcp://swarm.example:{address.rpartition(':')[2]}"
        assert why_nobody_answers(named) == "temporary failure in name resolution"
        told: list[str] = []
        with connected_to(named, 60.0, told.append) as client:
            assert client.status == "running"
    (line,) = told
    assert line.startswith(f"No dask scheduler answers at {named} (temporary failure in name")
    assert line.endswith("s more.")


def test_a_leaving_machine_hands_over_what_only_it_has_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    """Its nanny hears of it from `dagflow join`, or, with --once, like the worker from the terminal."""
    commands = {
        "first": [*JOIN, "--name", "first"],
        "second": [*JOIN, "--name", "second", "--once"],
    }
    with swarm(commands, tmp_path) as (client, workers):
        pids = worker_pids(client)
        names = {info["name"]: a for a, info in scheduler_info(client)["workers"].items()}
        result = client.submit(list, range(3), workers=[names["first"]], key="unique")
        wait_until(lambda: result.status == "finished", "it is computed")
        assert client.who_has([result])["unique"] == (names["first"],)
        leave_quickly(workers["first"])
        assert list(scheduler_info(client)["workers"]) == [names["second"]]
        assert client.who_has([result])["unique"] == (names["second"],)
        assert result.result(timeout=10) == [0, 1, 2]
        leave_quickly(workers["second"])
        wait_until(lambda: all_gone(pids), "no process is left", 5)
    assert not [n for n in commands if "killing" in (tmp_path / f"{n}.log").read_text()]


def leave_quickly(worker: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    kill_group(worker, signal.SIGINT)
    assert worker.wait(timeout=30) == 0
    # dask's nanny kills what hasn't ended after eight seconds.
    assert time.monotonic() - began < 6


def test_a_worker_that_its_nanny_does_not_know_yet_hands_over_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A nanny hears some time after the scheduler that its worker has started."""
    with (
        local_cluster(2) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        first, second = cluster.workers.values()
        addresses = [first.worker_address, second.worker_address]
        result = client.submit(list, range(3), workers=addresses[:1], key="unique")
        wait_until(lambda: result.status == "finished", "it is computed")
        monkeypatch.setattr(Nanny, "worker_address", None)
        cluster.sync(dask_teardown, first)
        assert client.who_has([result])["unique"] == (addresses[1],)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    with swarm({"worker": JOIN}, tmp_path) as (client, workers):
        joined, pids = workers["worker"], worker_pids(client)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # it can't leave
        kill_group(joined, signal.SIGINT)
        log = tmp_path / "worker.log"
        wait_until(lambda: "Ctrl-C again leaves at once" in log.read_text(), "it says so")
        kill_group(joined, signal.SIGINT)
        assert joined.wait(timeout=5) == 130
        wait_until(lambda: all_gone(pids), "no process is left", 5)


def test_a_machine_whose_time_is_over_has_left_for_good(tmp_path: Path) -> None:
    """However far its worker has come: on a busy machine it may be starting still."""
    log = tmp_path / "worker.log"
    with own_scheduler() as (_, address):
        command = [address if part == "ADDRESS" else part for part in JOIN]
        with ended(start([*command, "--lifetime", "8 s"], log)) as joined:
            parent, pids = psutil.Process(joined.pid), set[int]()
            while joined.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    pids |= {child.pid for child in parent.children(recursive=True)}
                time.sleep(0.1)
            assert joined.returncode == 0
            assert len(pids) > 1
            wait_until(lambda: all_gone(pids), "no process is left", 5)
    assert "This machine's time is over" in log.read_text()


def test_leaving_while_the_worker_starts_is_as_quiet(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "join.log"
    command = [f"tcp://127.0.0.1:{port}" if part == "ADDRESS" else part for part in JOIN]
    command.append("--verbose")
    with scheduler(port, tmp_path / "scheduler.log"), ended(start(command, log)) as joined:
        wait_until(lambda: "Start Nanny at" in log.read_text(), "the worker is starting")
        kill_group(joined, signal.SIGINT)
        assert joined.wait(timeout=20) == 0
    assert "Traceback" not in log.read_text()


def test_a_removed_worker_comes_back_and_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """It is removed as one is that was frozen for longer than the scheduler waits."""
    with swarm({"worker": JOIN}, tmp_path) as (client, workers):
        before = worker_pids(client)
        (address,) = scheduler_info(client)["workers"]
        client.run_on_scheduler(remove, address)
        wait_until(lambda: all_gone(before), "the worker that was removed has ended")
        client.wait_for_workers(1, timeout=60)
        pids = worker_pids(client)
        assert not pids & before
        workers["worker"].kill()
        wait_until(lambda: all_gone(pids), "no process is left", 20)
        assert scheduler_info(client)["workers"] == {}


async def remove(address: str, dask_scheduler: object = None) -> None:
    await dask_scheduler.remove_worker(address, stimulus_id="test")  # type: ignore[attr-defined]


def test_once_ends_with_the_scheduler(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "join.log"
    command = [f"tcp://127.0.0.1:{port}" if part == "ADDRESS" else part for part in JOIN]
    with (
        scheduler(port, tmp_path / "first.log") as first,
        ended(start([*command, "--once"], log)) as joined,
    ):
        with connected(port) as client:
            client.wait_for_workers(1, timeout=60)
            worker_pids(client)
        kill_group(first)
        assert joined.wait(timeout=30) == 0
    assert "trying again" not in log.read_text()


def test_join_gives_up_after_wait(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [BIN / "dagflow", "join", address, "--wait", "1 s"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"No scheduler answers at {address} (connection refused); giving up" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["host"], ["http://host:1"], ["host:1", "--lifetime", "x"], ["host:1", "--wait", "-"]],
)
def test_join_refuses_what_it_cannot_read_at_once(arguments: list[str]) -> None:
    refused = CliRunner().invoke(main, ["join", *arguments])
    assert refused.exit_code == 2
    assert repr(arguments[-1]) in refused.output
