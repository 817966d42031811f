"""Nobody but its user reaches an embedded cluster.

On the commit before this test, each of the bombs here went off: scheduler, nannies and workers listened
on ports of 127.0.0.1, and dask unpickles the first message that anybody sends. And whoever had made
/tmp/dask-scratch-space before put modules onto the path of the user's own process.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import httpx
import pytest
from distributed import Client
from distributed.security import Security
from local_attacks import Place, as_nobody, bomb, is_let_in, listening, send, strangers_context

from dagflow.swarm import unix_comm
from dagflow.swarm.embedded import embedded_cluster
from dagflow.swarm.join import TEMPORARY_VARIABLE, with_private_folder

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@contextmanager
def embedded(num_workers: int = 2) -> Iterator[tuple[Client, set[Place]]]:
    """Yield a client of an embedded cluster of processes, and where those listen.

    Without what makes workers fit for stages, they needn't import torch.
    """
    before = listening()
    with embedded_cluster(num_workers, 1, lambda client: None, processes=True) as client:
        client.wait_for_workers(num_workers)
        yield client, {place for _, place in listening() - before}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Client, set[Place]]]:
    with embedded() as found:
        yield found


def ports(places: set[Place]) -> list[tuple[str, int]]:
    return [place for place in places if not isinstance(place, str)]


def paths(places: set[Place]) -> list[str]:
    return [place for place in places if isinstance(place, str)]


def test_what_is_sent_to_its_ports_is_not_unpickled(
    cluster: tuple[Client, set[Place]], tmp_path: Path
) -> None:
    client, places = cluster
    assert {host for host, _ in ports(places)} == {"127.0.0.1"}
    for number, place in enumerate(ports(places)):
        send(place, bomb(tmp_path / f"{number}"))
        assert not is_let_in(f"tcp://127.0.0.1:{place[1]}")
    assert list(tmp_path.iterdir()) == []
    assert client.submit(sum, [1, 2], pure=False).result() == 3


@pytest.mark.skipif(not IS_ROOT, reason="only root can be somebody else")
def test_another_user_gets_no_connection_that_dask_reads(
    cluster: tuple[Client, set[Place]], tmp_path: Path
) -> None:
    client, places = cluster
    assert len(paths(places)) >= 5  # scheduler, two nannies, two workers
    answers = as_nobody(places, bomb(tmp_path / "exploded"))
    assert {answers[path] for path in paths(places)} == {"PermissionError"}
    assert not (tmp_path / "exploded").exists()
    # Whoever is let in would have been: the bomb works.
    send(paths(places)[0], bomb(tmp_path / "exploded"))
    assert (tmp_path / "exploded").exists()
    assert client.submit(sum, [1, 2], pure=False).result() == 3


def test_its_sockets_are_in_a_folder_of_the_users_own(cluster: tuple[Client, set[Place]]) -> None:
    folders = {os.path.dirname(path) for path in paths(cluster[1])}
    assert len(folders) == 1
    found = os.stat(folders.pop())
    assert stat.S_IMODE(found.st_mode) == 0o700
    assert found.st_uid == os.geteuid()


@pytest.mark.slow  # the way of Windows
def test_without_unix_sockets_only_its_own_keys_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix_comm, "is_available", lambda: False)
    with embedded() as (client, places):
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        for number, place in enumerate(ports(places)):
            send(place, bomb(tmp_path / f"{number}"))
            answer = send(place, bomb(tmp_path / f"{number}"), strangers_context())
            assert "0 bytes" in answer or "Error" in answer
        assert list(tmp_path.iterdir()) == []
        assert not is_let_in(address, Security.temporary())
        assert not is_let_in(address.replace("tls", "tcp"))
        assert client.submit(sum, [1, 2], pure=False).result() == 3
        first, second = client.scheduler_info()["workers"]
        part = client.submit(bytes, 1 << 20, workers=[first])
        assert client.submit(len, part, workers=[second]).result() == 1 << 20


def test_no_folder_that_others_can_write_to_is_on_the_path_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dask's own place for files may be there already, and be somebody else's."""
    shared = tmp_path / "tmp"
    planted = shared / "dask-scratch-space"
    planted.mkdir(parents=True)
    planted.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    before = list(sys.path)

    def path_of_modules() -> list[str]:
        import sys

        return list(sys.path)

    with embedded(1) as (client, places):
        everywhere = [sys.path, *client.run(path_of_modules).values()]
        new = {path for found in everywhere for path in found} - set(before)
        assert new
        assert not any(os.path.realpath(path).startswith(str(planted)) for path in new)
        for path in new:
            parts = [Path(path), *Path(path).parents]
            closed = [part for part in parts if part.is_relative_to(shared) and part != shared]
            assert stat.S_IMODE(closed[-1].stat().st_mode) == 0o700
        folder = os.path.dirname(paths(places)[0])
        assert Path(folder).parent == shared
    # Nor is one left on it that anybody could make again.
    assert sys.path == before
    assert not os.path.exists(folder)


def test_a_volunteers_worker_keeps_its_files_in_a_folder_of_its_own() -> None:
    environment = with_private_folder({"PATH": "/bin"}, "/tmp/dagflow-join-x")
    asked = dask.config.collect_env(environment)
    with dask.config.set(asked):
        assert dask.config.get("temporary-directory") == "/tmp/dagflow-join-x"
    own = {TEMPORARY_VARIABLE: "/scratch"}
    assert with_private_folder(own, "/tmp/dagflow-join-x") == own


def dashboard_of(client: Client) -> httpx.Client:
    return httpx.Client(base_url=client.dashboard_link.removesuffix("/status"), timeout=30)


def test_a_browser_sees_the_dashboard_and_can_only_look(cluster: tuple[Client, set[Place]]) -> None:
    with dashboard_of(cluster[0]) as browser:
        for page in ("/status", "/workers", "/info/main/workers.html", "/json/counts.json"):
            assert browser.get(page).status_code == 200
        for page in ("/status", "/api/v1/retire_workers", "/info/main/workers.html", "/proxy/1/x/"):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                assert browser.request(method, page, json={"n": 2}).status_code in (403, 404, 405)
    assert len(cluster[0].scheduler_info()["workers"]) == 2


@pytest.mark.parametrize(("site", "status"), [("http://evil.example", 403), (None, 101)])
def test_other_sites_do_not_look_at_the_dashboard(
    cluster: tuple[Client, set[Place]], site: str | None, status: int
) -> None:
    link = httpx.URL(cluster[0].dashboard_link)
    request = [
        "GET /status/ws HTTP/1.1",
        f"Host: {link.host}:{link.port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        f"Sec-WebSocket-Protocol: bokeh, {token(link)}",
        f"Origin: {site or f'http://{link.host}:{link.port}'}",
    ]
    with socket.create_connection((link.host, link.port), timeout=30) as connection:
        connection.sendall("\r\n".join([*request, "", ""]).encode())
        assert int(connection.recv(1 << 16).split()[1]) == status


def token(link: httpx.URL) -> str:
    """Return what bokeh gives whoever looks at a page, for its websocket."""
    page = httpx.get(link, timeout=30).text
    return page.partition('"token":"')[2].partition('"')[0]
