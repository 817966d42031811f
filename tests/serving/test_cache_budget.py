"""Caches of real workers stay within their budget, whoever comes; those who don't fit wait or hear why."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import dask
import pytest
import torch
from distributed import Client
from families import greedy, logits_of
from local import local_client, wait_until

import dagflow
from dagflow.errors import CacheFull, RequestTooLarge, SettingsInvalid, StageTooLarge
from dagflow.serving.stage_server import cache_bytes
from dagflow.swarm.clusters import scheduler_info
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS

NUM_BLOCKS = 5
NUM_NEW = 12
PROMPTS = [[5 + n, 17, 3, 42, n, 23, 5, 17] + [n] * (n % 5) for n in range(1, 25)]


@pytest.fixture(scope="module")
def budget(client: Client, llama: tuple[Any, dagflow.Model]) -> int:
    """What so many blocks take on the worker whose stage takes most."""
    with dagflow.Deployment(llama[1], client) as deployment:
        return (
            NUM_BLOCKS
            * BLOCK_TOKENS
            * max(n.token_bytes for n in deployment.engine.placement.needs)
        )


@pytest.fixture
def small(
    client: Client, llama: tuple[Any, dagflow.Model], budget: int
) -> Iterator[dagflow.Deployment]:
    with dagflow.Deployment(llama[1], client, cache_bytes=budget) as deployment:
        yield deployment


def held(client: Client, deployment: dagflow.Deployment) -> tuple[int, int]:
    """Return what caches take on the fullest worker, now and at most."""
    answers = client.run(cache_bytes, deployment.engine.name).values()
    return tuple(max(sum(s[i] for s in stages.values()) for stages in answers) for i in range(2))


def test_caches_never_take_more_than_their_budget(
    client: Client, llama: tuple[Any, dagflow.Model], small: dagflow.Deployment, budget: int
) -> None:
    assert small.caches.capacity_tokens == NUM_BLOCKS * BLOCK_TOKENS
    found = dagflow.generate(small, PROMPTS, max_new_tokens=NUM_NEW, ignore_end=True)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        assert tokens.tolist() == greedy(llama[0], prompt, NUM_NEW)
    _, peak = held(client, small)
    assert peak == budget  # five at a time
    state = small.caches
    assert (state.used_tokens, state.num_waiting) == (0, 0)


def test_the_default_budget_holds_far_more(
    client: Client, llama: tuple[Any, dagflow.Model]
) -> None:
    with dagflow.Deployment(llama[1], client) as deployment:
        assert deployment.caches.capacity_tokens > 1000 * BLOCK_TOKENS
        assert deployment.max_tokens == llama[1].max_tokens


def test_what_can_never_fit_is_refused_at_once(
    client: Client, llama: tuple[Any, dagflow.Model], budget: int
) -> None:
    one = budget // NUM_BLOCKS
    with dagflow.Deployment(llama[1], client, cache_bytes=one) as deployment:
        assert deployment.max_tokens == BLOCK_TOKENS
        with pytest.raises(RequestTooLarge, match=f"{BLOCK_TOKENS + 1} tokens.*{BLOCK_TOKENS}"):
            deployment.request([1] * 8, max_new_tokens=BLOCK_TOKENS - 7)
        with pytest.raises(RequestTooLarge):
            dagflow.score(deployment, [[1] * (BLOCK_TOKENS + 2)])
        # Who doesn't say how much gets what fits.
        found = dagflow.generate(deployment, [[1] * 8], ignore_end=True)
        assert len(found.tokens[0]) == BLOCK_TOKENS - 8


def test_requests_are_answered_in_the_order_in_which_they_came(
    llama: tuple[Any, dagflow.Model], small: dagflow.Deployment
) -> None:
    # Each takes more than half of the room.
    requests = [
        small.request([n + 1] * 7, max_new_tokens=2 if n else 40, ignore_end=True) for n in range(2)
    ]
    long = small.request([9] * 24, max_new_tokens=40, ignore_end=True)
    order = [token.prompt for token in small.stream([long, long, long, *requests])]
    firsts = [order.index(prompt) for prompt in range(5)]
    # The third long one has no room beside two others; nobody overtakes it.
    assert max(firsts[:2]) < firsts[2] < min(firsts[3:])


def test_a_session_that_outgrows_what_is_left_says_so_and_goes_on(
    llama: tuple[Any, dagflow.Model], small: dagflow.Deployment
) -> None:
    tokens = list(range(30, 70))
    sessions = [dagflow.Session(small) for _ in range(3)]
    for session in sessions[:2]:
        session.prefill(tokens)
    sessions[2].prefill(tokens[:BLOCK_TOKENS])
    with pytest.raises(CacheFull, match=rf"0 of {NUM_BLOCKS * BLOCK_TOKENS} are left"):
        sessions[2].decode(1)
    with pytest.raises(CacheFull):
        sessions[2].fork()
    assert sessions[2].position == BLOCK_TOKENS
    sessions[2].rewind(10)
    found = sessions[2].decode(7)
    wanted = logits_of(llama[0], [*tokens[:10], 7])[-1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    # Who closes one makes room, and answers wait for none that is fed by hand.
    with pytest.raises(CacheFull, match="fed by hand"):
        dagflow.generate(small, [[1]], max_new_tokens=8)
    sessions[0].close()
    fork = sessions[2].fork()
    fork.close()
    for session in sessions[1:]:
        session.close()
    assert len(dagflow.generate(small, [[1]], max_new_tokens=8, ignore_end=True).tokens[0]) == 8


def test_what_ended_sessions_took_is_given_back(
    client: Client, llama: tuple[Any, dagflow.Model], budget: int
) -> None:
    with dagflow.Deployment(llama[1], client, cache_bytes=budget, prefix_reuse=False) as deployment:
        stream = dagflow.generate(deployment, PROMPTS, stream=True, ignore_end=True)
        next(stream)
        stream.close()  # some are running, some wait
        with dagflow.Session(deployment) as session:
            session.prefill([1, 2, 3])
        wait_until(lambda: held(client, deployment)[0] == 0, "caches are empty")
        wait_until(lambda: deployment.caches.used_tokens == 0, "nothing is reserved")


def test_a_waiting_answer_is_left_alone_by_another_that_is_cancelled(
    small: dagflow.Deployment,
) -> None:
    long = small.request([9] * 24, max_new_tokens=40, ignore_end=True)
    heard, done = [], threading.Event()

    def tell(token: Any) -> None:
        heard.append(token)
        if token is None or isinstance(token, BaseException):
            done.set()

    running = [small.begin([long], lambda _: None) for _ in range(3)]
    small.begin([long], tell)
    wait_until(lambda: small.caches.num_waiting > 0, "somebody waits")
    for future in running:
        future.cancel()
    assert done.wait(60)
    assert heard[-1] is None
    assert len(heard) == 41


def smaller(deployment: dagflow.Deployment, num_blocks: int) -> None:
    """Shrink the room for sessions now, as when a stage moves in with another."""
    needs = deployment.engine.placement.needs
    deployment.engine.placement._cache_bytes = (
        num_blocks * BLOCK_TOKENS * max(need.token_bytes for need in needs)
    )
    deployment.engine._resize()


@pytest.mark.parametrize("then", ["goes on", "has left"])
def test_a_session_whose_turn_comes_as_the_room_shrinks_fails_nobody(
    llama: tuple[Any, dagflow.Model], small: dagflow.Deployment, then: str
) -> None:
    engine, prompt = small.engine, [5, 17, 3]

    async def at_once() -> list[torch.Tensor]:
        first, leaves = [await engine.admit(n * BLOCK_TOKENS) for n in (2, 3)]
        asking = asyncio.ensure_future(engine.admit(2 * BLOCK_TOKENS))
        await asyncio.sleep(0)
        assert small.caches.num_waiting == 1
        await engine.end(leaves)
        while small.caches.num_waiting:
            await asyncio.sleep(0)
        smaller(small, 3)  # its turn has come, and `asking` hasn't heard of that
        if then == "has left":
            asking.cancel()
            found = [await engine.feed(first, prompt)]
            await engine.end(first)
            return found
        second = await asking
        assert second.is_away
        waits = asyncio.ensure_future(engine.feed(second, prompt))
        found = [await engine.feed(first, prompt)]
        await engine.end(first)
        found.append(await waits)
        await engine.end(second)
        return found

    wanted = logits_of(llama[0], prompt)[-1:]
    for found in engine.call(at_once()):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    wait_until(lambda: small.caches.used_tokens == 0, "nothing is reserved")


def test_a_fork_whose_room_goes_as_it_comes_is_refused(small: dagflow.Deployment) -> None:
    engine = small.engine

    async def at_once() -> None:
        kept = await engine.admit(4 * BLOCK_TOKENS)
        await engine.feed(kept, [9] * 4 * BLOCK_TOKENS)
        await engine.end(kept, keep=True)
        live = await engine.open()
        await engine.feed(live, [5, 17, 3])
        forking = asyncio.ensure_future(engine.fork(live, 3))
        while small.caches.used_tokens == BLOCK_TOKENS:  # until what is kept has been forgotten
            await asyncio.sleep(0)
        smaller(small, 1)
        with pytest.raises(CacheFull, match="no room"):
            await forking
        await engine.feed(live, [7])
        await engine.end(live)

    engine.call(at_once())
    wait_until(lambda: small.caches.used_tokens == 0, "nothing is reserved")


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_budget_of_nothing_is_refused(
    client: Client, llama: tuple[Any, dagflow.Model], wrong: int
) -> None:
    with pytest.raises(SettingsInvalid, match="cache_bytes"):
        dagflow.Deployment(llama[1], client, cache_bytes=wrong)


@pytest.fixture(scope="module")
def tiny_cluster() -> Iterator[Client]:
    """Workers whose memory limit holds one of the tiny model's halves, and not both."""
    settings = ("target", "spill", "pause", "terminate")
    with (
        dask.config.set({f"distributed.worker.memory.{name}": False for name in settings}),
        local_client(4, processes=False, memory_limit=260_000) as client,
    ):
        yield client


def test_workers_too_small_for_the_model_are_refused_with_the_numbers(
    tiny_cluster: Client, llama: tuple[Any, dagflow.Model]
) -> None:
    with pytest.raises(StageTooLarge, match=r"missing\. Stage 0 .* of weights.*Workers: .* 260 kB"):
        dagflow.Deployment(llama[1], tiny_cluster, num_stages=1)
    with pytest.raises(StageTooLarge, match="smaller cache_bytes"):
        dagflow.Deployment(llama[1], tiny_cluster, cache_bytes=230_000)
    with dagflow.Deployment(llama[1], tiny_cluster, num_stages=2) as deployment:
        assert deployment.caches.capacity_tokens > 0
        assert len(set(deployment.engine.placement.addresses)) == 2
        found = dagflow.generate(deployment, [[5]], max_new_tokens=4, ignore_end=True)
        assert found.tokens[0].tolist() == greedy(llama[0], [5], 4)


def test_spares_open_what_they_have_memory_for_and_others_lack(
    tiny_cluster: Client, llama: tuple[Any, dagflow.Model]
) -> None:
    with dagflow.Deployment(llama[1], tiny_cluster, num_stages=2) as deployment:
        placement = deployment.engine.placement
        spares = {*scheduler_info(tiny_cluster)["workers"]} - {*placement.addresses}

        def warm() -> list[int]:
            return [s for s in range(2) for spare in spares if placement.is_open(s, spare)]

        wait_until(lambda: warm() == [0, 1], "either stage could be replaced")
        assert placement.spares() == []  # nobody has both
