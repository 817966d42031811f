"""A link that drops everything, without a word to either end: no FIN, no RST."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client
from local import local_cluster, wait_until
from processes import BIN, kill_group, start

from dagflow.swarm.clusters import scheduler_info

NAMESPACE, HERE, THERE = "dagflow-far", ("dagflow-h", "10.97.31.1"), ("dagflow-t", "10.97.31.2")
FAR = ["ip", "netns", "exec", NAMESPACE]
DROP_MAC = "02:00:00:00:00:99"
TIMEOUT = "distributed.comm.timeouts.tcp"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="makes a network of its own"
    ),
]


def ip(*arguments: str, far: bool = False) -> None:
    subprocess.run([*(FAR if far else []), "ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def far_away() -> Iterator[Callable[[bool], None]]:
    """Make a network with one machine in it; yield what cuts its link, or mends it."""
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", HERE[0], "type", "veth", "peer", "name", THERE[0], "netns", NAMESPACE)
        ip("addr", "add", f"{HERE[1]}/24", "dev", HERE[0])
        ip("link", "set", HERE[0], "up")
        ip("addr", "add", f"{THERE[1]}/24", "dev", THERE[0], far=True)
        ip("link", "set", THERE[0], "up", far=True)
        ip("link", "set", "lo", "up", far=True)

        def cut(is_cut: bool) -> None:
            """Send to a machine that isn't there, and so to nobody."""
            for (device, _), (_, to), far in ((HERE, THERE, False), (THERE, HERE, True)):
                lost = ["replace", to, "lladdr", DROP_MAC, "nud", "permanent"]
                ip("neigh", *(lost if is_cut else ["del", to]), "dev", device, far=far)

        yield cut
    finally:
        ip("netns", "del", NAMESPACE)  # with both ends of the link


def test_a_link_that_drops_everything_is_noticed_at_both_ends_and_the_worker_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "12s")
    log = tmp_path / "join.log"
    with (
        dask.config.set({TIMEOUT: "12s"}),
        far_away() as cut,
        local_cluster(0, host=HERE[1]) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        join = [*FAR, BIN / "dagflow", "join", cluster.scheduler_address, "--torch-threads", "1"]
        joined = start(join, log)
        try:
            client.wait_for_workers(1, timeout=120)
            (address,) = scheduler_info(client)["workers"]
            cut(True)
            wait_until(lambda: not scheduler_info(client)["workers"], "the scheduler notices", 60)
            wait_until(lambda: "trying again" in log.read_text(), "and so does the worker", 60)
            cut(False)
            client.wait_for_workers(1, timeout=120)
            assert list(scheduler_info(client)["workers"]) != [address]
            assert client.submit(sum, (1, 2, 3)).result(timeout=60) == 6
        finally:
            kill_group(joined)
            joined.communicate()
    assert "Traceback" not in log.read_text()
