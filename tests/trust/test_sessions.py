"""A deployment's workers obey its driver, and pass on what its stages send: nobody else.

On the commit before this test a connection that said to be the driver was the driver: it got the logits of
all sessions, and when it left, its stages were forgotten and the true driver's answers hung for good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from distributed import Client
from local import local_client, wait_until
from trust_models import tiny_llama

import dagflow
from dagflow.serving import stage_server
from dagflow.serving.stage_server import sessions_open, take_part
from dagflow.swarm.dask_internals import connection_arguments
from dagflow.swarm.links import CommClosedError, Link
from dagflow.swarm.proofs import DRIVER, STAGE, Credentials, Issuer, introduced

PROMPT = [5, 1, 3]
LONG: dict[str, Any] = {"max_new_tokens": 24, "ignore_end": True, "speculate": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dagflow.Model:
    place = tmp_path_factory.mktemp("models")
    return dagflow.load(tiny_llama(), store=place, check=False)


@pytest.fixture(scope="module")
def client(model: dagflow.Model) -> Iterator[Client]:
    """Two workers in this process, once the model is captured."""
    with local_client(2, processes=False, protocol="tcp://") as client:
        yield client


@pytest.fixture
def deployment(client: Client, model: dagflow.Model) -> Iterator[dagflow.Deployment]:
    with dagflow.Deployment(model, client, num_stages=2) as deployment:
        yield deployment


def tokens(deployment: dagflow.Deployment) -> list[int]:
    return [token.token for token in deployment.stream([deployment.request(PROMPT, **LONG)])]


async def to_its_end(link: Link) -> list[dict[str, Any]]:
    """Return what comes over a connection until the worker hangs up."""
    found = []
    try:
        async with asyncio.timeout(10):
            while True:
                found.append(await link.receive())
    except CommClosedError:
        return found


Attack = Callable[[Client, dagflow.Deployment, str], Coroutine[Any, Any, list[dict[str, Any]]]]


async def without_a_proof(
    client: Client, deployment: dagflow.Deployment, address: str
) -> list[dict[str, Any]]:
    """As any peer did before."""
    hello = {"deployment": deployment.engine.name, "role": DRIVER}
    link = await Link.open(address, connection_arguments(client), hello)
    await link.send({"kind": "ping"})
    return await to_its_end(link)


async def with_a_secret_of_its_own(
    client: Client, deployment: dagflow.Deployment, address: str
) -> list[dict[str, Any]]:
    name, known = deployment.engine.name, Issuer().credentials(address)
    link = await introduced(address, connection_arguments(client), name, DRIVER, known)
    return await to_its_end(link)


async def with_what_the_stages_know(
    client: Client, deployment: dagflow.Deployment, address: str
) -> list[dict[str, Any]]:
    """A worker of the deployment: the stages' secret doesn't make it the driver."""
    stage = deployment.engine.placement._issuer.credentials(address).stage
    known = Credentials(stage, stage)
    name = deployment.engine.name
    link = await introduced(address, connection_arguments(client), name, DRIVER, known)
    return await to_its_end(link)


async def with_the_proof_of_another_worker(
    client: Client, deployment: dagflow.Deployment, address: str
) -> list[dict[str, Any]]:
    """Whoever runs one worker has the driver's secret for that one."""
    (other,) = {*deployment.engine.placement.addresses} - {address}
    known = deployment.engine.placement._issuer.credentials(other)
    name = deployment.engine.name
    link = await introduced(address, connection_arguments(client), name, DRIVER, known)
    return await to_its_end(link)


async def with_a_proof_that_was_overheard(
    client: Client, deployment: dagflow.Deployment, address: str
) -> list[dict[str, Any]]:
    """What the driver has proven on one connection is nothing on the next."""
    name = deployment.engine.name
    known = deployment.engine.placement._issuer.credentials(address)
    sent: list[Any] = []
    send = Link.send

    async def overheard(link: Link, message: Any, values: Any = None) -> None:
        sent.append(message)
        await send(link, message, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "send", overheard)
        first = await introduced(address, connection_arguments(client), name, STAGE, known)
    first.close()
    (proof,) = [message for message in sent if message.get("kind") == "proof"]
    hello = {"deployment": name, "role": STAGE}
    link = await Link.open(address, connection_arguments(client), hello)
    await link.receive()
    await link.send(proof)
    return await to_its_end(link)


def as_a_stage(message: dict[str, Any]) -> Attack:
    async def attack(
        client: Client, deployment: dagflow.Deployment, address: str
    ) -> list[dict[str, Any]]:
        """A worker of the deployment says what only the driver may say."""
        name = deployment.engine.name
        known = deployment.engine.placement._issuer.credentials(address)
        link = await introduced(address, connection_arguments(client), name, STAGE, known)
        await link.send({"deployment": name, "stage": 0, **message})
        return await to_its_end(link)

    return attack


ATTACKS: dict[str, Attack] = {
    "nothing": without_a_proof,
    "own secret": with_a_secret_of_its_own,
    "stages' secret": with_what_the_stages_know,
    "another worker's": with_the_proof_of_another_worker,
    "replayed": with_a_proof_that_was_overheard,
    "route": as_a_stage({"kind": "route", "following": "tcp://10.0.0.1:1"}),
    "shut": as_a_stage({"kind": "shut", "opening": ""}),
    "lost": as_a_stage({"kind": "lost", "address": "tcp://10.0.0.1:1"}),
    "close": as_a_stage({"kind": "close", "sessions": []}),
    "another deployment": as_a_stage({"kind": "fork", "deployment": "other"}),
    "nonsense": as_a_stage({"kind": None}),
}


def test_nobody_else_passes_for_the_driver_or_says_what_it_says(
    client: Client, deployment: dagflow.Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is hung up on without having heard anything, and the driver hears of it."""
    wanted = tokens(deployment)
    notes: list[str] = []
    deployment.engine.note = notes.append
    for number, (name, attack) in enumerate(ATTACKS.items(), 1):
        stream = deployment.stream([deployment.request(PROMPT, **LONG)])
        first = next(stream).token
        with caplog.at_level(logging.WARNING, logger="dagflow.serving.engine"):
            for address in [*deployment.engine.placement.addresses]:
                heard = client.sync(attack, client, deployment, address)
                assert {message["kind"] for message in heard} <= {"challenge"}, name
        assert [first, *(token.token for token in stream)] == wanted, name
        wait_until(lambda n=number: deployment.engine.num_refused >= 2 * n, f"{name} is told of")
    assert "was refused" in caplog.text
    assert any("was refused" in note for note in notes)


def test_a_second_driver_of_the_same_name_is_not_listened_to(
    client: Client, deployment: dagflow.Deployment
) -> None:
    address = deployment.engine.placement.addresses[0]
    known = Issuer().credentials(address)
    with pytest.raises(PermissionError, match="another driver"):
        client.run(take_part, deployment.engine.name, known, workers=[address])
    assert len(tokens(deployment)) == LONG["max_new_tokens"]


def test_the_driver_itself_may_come_again(client: Client, deployment: dagflow.Deployment) -> None:
    """A connection breaks, with both sides alive: the driver takes its worker back."""
    wanted = tokens(deployment)
    placement = deployment.engine.placement
    address = placement.addresses[0]

    async def break_off() -> None:
        placement._links[address].close()

    client.sync(break_off)
    wait_until(lambda: address in placement._links and not placement.missing(), "it is back")
    assert tokens(deployment) == wanted


def test_what_a_worker_is_given_is_shown_nowhere() -> None:
    known = Issuer().credentials("tcp://10.0.0.1:1")
    assert repr(known) == "Credentials()"
    assert len({known.driver, known.stage}) == 2


def secrets_kept(dask_worker: Any) -> int:
    from dagflow.serving.stage_server import _hub

    return len(_hub(dask_worker)._known)


def test_a_worker_forgets_a_driver_that_was_announced_and_never_came(
    client: Client, model: dagflow.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dagflow.Deployment(model, client, num_stages=2):
        pass  # workers know of sessions from now on
    wait_until(lambda: set(client.run(secrets_kept).values()) == {0}, "that driver is forgotten")
    address = sorted(client.scheduler_info()["workers"])[0]
    monkeypatch.setattr(stage_server, "UNPROVEN_SECONDS", 2.0)
    client.run(take_part, "gone", Issuer().credentials(address), workers=[address])
    assert client.run(secrets_kept)[address] == 1
    wait_until(lambda: set(client.run(secrets_kept).values()) == {0}, "it is forgotten")


def test_a_worker_keeps_nothing_of_a_driver_that_left(client: Client, model: dagflow.Model) -> None:
    with dagflow.Deployment(model, client, num_stages=2) as deployment:
        assert len(tokens(deployment)) == LONG["max_new_tokens"]
    wait_until(lambda: set(client.run(secrets_kept).values()) == {0}, "they are forgotten")
    assert all(not found for found in client.run(sessions_open).values())
