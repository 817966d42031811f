"""Requests go on from tokens that others have computed; answers are the same as without."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
import transformers as hf
from distributed import Client
from families import SOME, greedy, logits_of, stored
from local import local_cluster, wait_until
from zoo import SIZES

import dagflow
from dagflow.serving.answers import Token
from dagflow.serving.stage_server import num_tokens_computed
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS

SYSTEM = [7, 41, 3, 88, 15, 60, 2, 9, 33, 71, 5, 18, 64, 27, 90, 11, 4, 52, 36, 80]
PROMPT = [*SYSTEM, 21, 34]
NUM_NEW = 8


def answer(deployment: dagflow.Deployment, prompt: list[int], **options: Any) -> list[Token]:
    """Return one greedy answer's tokens; without guesses, so that what is computed can be counted."""
    given = {"max_new_tokens": NUM_NEW, "ignore_end": True, "speculate": False, **options}
    return list(deployment.stream([deployment.request(prompt, **given)]))


def ids(tokens: list[Token]) -> list[int]:
    return [token.token for token in tokens if token.token is not None]


def computed(client: Client, deployment: dagflow.Deployment) -> int:
    """How many tokens each stage has computed; all have computed as many."""
    counts = client.run(num_tokens_computed, deployment.engine.name).values()
    (found,) = {count for stages in counts for count in stages.values()}
    return int(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dagflow.Model]:
    return stored("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def deployment(client: Client, model: tuple[Any, dagflow.Model]) -> Iterator[dagflow.Deployment]:
    with dagflow.Deployment(model[1], client) as found:
        yield found


@pytest.mark.parametrize("family", SOME)
def test_answers_from_shared_beginnings_equal_transformers(
    family: str, client: Client, tmp_path: Path
) -> None:
    model, loaded = stored(family, tmp_path)
    prompts = [PROMPT, [*SYSTEM, 50], PROMPT, [*SYSTEM[:17], 9, 9]]
    wanted = [greedy(model, prompt, NUM_NEW) for prompt in prompts]
    # What the first answer has left is gone on with by the next turn of the conversation.
    turn = [*PROMPT, *wanted[0], 13, 14]
    with dagflow.Deployment(loaded, client) as deployment:
        found = [answer(deployment, prompt) for prompt in [*prompts, turn]]
        assert [ids(tokens) for tokens in found] == [*wanted, greedy(model, turn, NUM_NEW)]
        cached = [tokens[0].num_cached for tokens in found]
        assert cached == [0, len(SYSTEM), len(PROMPT) - 1, 17, len(PROMPT) + NUM_NEW - 1]
        # At the same time, with guesses and rewinds.
        both = dagflow.generate(deployment, prompts, max_new_tokens=NUM_NEW, ignore_end=True)
        assert [tokens.tolist() for tokens in both.tokens] == wanted


def test_beginnings_that_windows_have_dropped_are_computed_again(
    client: Client, tmp_path: Path
) -> None:
    config = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model: Any = hf.MistralForCausalLM(
        hf.MistralConfig(**config, num_key_value_heads=2, sliding_window=8)
    ).eval()
    long = [(5 * n * n + n) % 90 + 3 for n in range(200)]
    # The first goes on from where 150 tokens of another are; the next from its own last tokens.
    prompts = [long, [*long[:150], 7, 9], [*long[:150], 7, 9, 11]]
    with dagflow.Deployment(
        dagflow.load(model, store=tmp_path), client, num_stages=2
    ) as deployment:
        for prompt in prompts:
            assert ids(answer(deployment, prompt)) == greedy(model, prompt, NUM_NEW)
        with dagflow.Session(deployment) as session:
            session.prefill(long)
            session.rewind(100)
            found = session.prefill([50, 51])
            torch.testing.assert_close(
                found, logits_of(model, [*long[:100], 50, 51])[-1], atol=1e-4, rtol=1e-4
            )
            fork = session.fork(20)
            torch.testing.assert_close(
                fork.decode(9), logits_of(model, [*long[:20], 9])[-1], atol=1e-4, rtol=1e-4
            )
            fork.close()


def test_what_is_shared_is_computed_once(client: Client, deployment: dagflow.Deployment) -> None:
    answer(deployment, PROMPT)
    before = computed(client, deployment)
    assert before == len(PROMPT) + NUM_NEW - 1
    answer(deployment, [*SYSTEM, 50, 51])
    assert computed(client, deployment) - before == 2 + NUM_NEW - 1
    assert deployment.caches.num_hits == 1
    assert deployment.caches.hit_tokens == len(SYSTEM)


def test_switched_off_everything_is_computed(
    client: Client, model: tuple[Any, dagflow.Model]
) -> None:
    with dagflow.Deployment(model[1], client, prefix_reuse=False) as deployment:
        found = [answer(deployment, PROMPT) for _ in range(2)]
        assert ids(found[0]) == ids(found[1]) == greedy(model[0], PROMPT, NUM_NEW)
        assert computed(client, deployment) == 2 * (len(PROMPT) + NUM_NEW - 1)
        assert found[1][0].num_cached == 0
        assert deployment.caches.kept_tokens == 0


def test_sessions_that_are_live_are_gone_on_from(
    model: tuple[Any, dagflow.Model], deployment: dagflow.Deployment
) -> None:
    with dagflow.Session(deployment) as session:
        session.prefill(PROMPT)
        # What comes and goes in the source afterwards is its own business.
        stream = deployment.stream(
            [deployment.request([*SYSTEM, 50], max_new_tokens=NUM_NEW, ignore_end=True)]
        )
        first = next(stream)
        session.rewind(3)
        session.prefill([1] * 20)
        assert first.num_cached == len(SYSTEM)
        assert ids([first, *stream]) == greedy(model[0], [*SYSTEM, 50], NUM_NEW)


def test_sampled_answers_are_the_same_from_shared_beginnings(
    client: Client, model: tuple[Any, dagflow.Model], deployment: dagflow.Deployment
) -> None:
    options = {"temperature": 1.3, "seed": 5}
    with dagflow.Deployment(model[1], client, prefix_reuse=False) as plain:
        wanted = ids(answer(plain, PROMPT, **options))
    answer(deployment, [*SYSTEM, 1])
    found = answer(deployment, PROMPT, **options)
    assert found[0].num_cached == len(SYSTEM)
    assert ids(found) == wanted


def test_a_cancelled_answer_leaves_what_it_has_computed(
    client: Client, model: tuple[Any, dagflow.Model], deployment: dagflow.Deployment
) -> None:
    stream = deployment.stream([deployment.request(PROMPT, ignore_end=True, speculate=False)])
    next(stream)
    stream.close()
    wait_until(lambda: deployment.caches.kept_tokens > 0, "it is kept")
    found = answer(deployment, PROMPT)
    assert found[0].num_cached == len(PROMPT) - 1
    assert ids(found) == greedy(model[0], PROMPT, NUM_NEW)


# With workers that leave


class Swarm:
    """Two stages on two workers, with room for a few sessions."""

    def __init__(self, client: Client, deployment: dagflow.Deployment) -> None:
        self.client = client
        self.deployment = deployment

    def kill(self, stage: int) -> None:
        address = self.deployment.engine.placement.addresses[stage]
        os.kill(self.client.run(os.getpid, workers=[address])[address], signal.SIGKILL)


@pytest.fixture
def swarm(model: tuple[Any, dagflow.Model], num_spares: int) -> Iterator[Swarm]:
    """Workers that are killed don't come back: neither nannies nor the cluster start them again."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}),
        local_cluster(2 + num_spares) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for nanny in cluster.workers.values():
            nanny.close_gracefully()
        with dagflow.Deployment(model[1], client, num_stages=2) as probe:
            budget = 4 * BLOCK_TOKENS * max(n.token_bytes for n in probe.engine.placement.needs)
        with dagflow.Deployment(model[1], client, num_stages=2, cache_bytes=budget) as deployment:
            wait_until(lambda: len(deployment.engine.placement.spares()) == num_spares, "spares")
            yield Swarm(client, deployment)


@pytest.mark.parametrize("num_spares", [1])
def test_a_worker_that_leaves_takes_kept_tokens_along_and_nothing_else(
    model: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    deployment = swarm.deployment
    answer(deployment, PROMPT)
    assert deployment.caches.kept_tokens == BLOCK_TOKENS
    swarm.kill(1)
    wait_until(lambda: deployment.caches.kept_tokens == 0, "nothing is kept")
    found = answer(deployment, [*SYSTEM, 50])
    assert ids(found) == greedy(model[0], [*SYSTEM, 50], NUM_NEW)
    assert deployment.caches.kept_tokens == BLOCK_TOKENS
    again = answer(deployment, PROMPT)
    assert again[0].num_cached == len(SYSTEM)
    assert ids(again) == greedy(model[0], PROMPT, NUM_NEW)


@pytest.mark.parametrize("num_spares", [0])
def test_with_room_for_fewer_answers_the_latest_are_put_off_and_come_out_the_same(
    model: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    deployment = swarm.deployment
    before = deployment.caches.capacity_tokens
    assert before == 4 * BLOCK_TOKENS
    # Three have room beside the session, and the rest wait: there is no less under way for a while. They
    # don't end together.
    lengths = {n: 20 - 3 * (n % 3) for n in range(60, 72)}
    prompts = [[n, *SYSTEM[:9]] for n in lengths]
    requests = [
        deployment.request(p, max_new_tokens=lengths[p[0]], ignore_end=True) for p in prompts
    ]
    found: list[list[int]] = [[] for _ in prompts]
    with dagflow.Session(deployment) as session:
        session.prefill(SYSTEM)
        killed = False
        for token in deployment.stream(requests):
            assert token.token is not None
            found[token.prompt].append(token.token)
            if all(found[:3]) and not killed:
                killed = True
                assert deployment.caches.used_tokens > before / 2
                swarm.kill(0)  # both stages are on one worker now, and share its budget
        assert found == [greedy(model[0], prompt, lengths[prompt[0]]) for prompt in prompts]
        # The session came first, and wasn't put off.
        logits = session.decode(7)
        assert torch.allclose(logits, logits_of(model[0], [*SYSTEM, 7])[-1], atol=1e-4)
        assert deployment.caches.capacity_tokens == 2 * BLOCK_TOKENS
    state = deployment.caches
    assert (state.used_tokens, state.num_waiting) == (0, 0)
