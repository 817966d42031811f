"""Workers leave, freeze and come in the middle of an answer, which is the same all the same."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from distributed import Client, LocalCluster
from families import beam_search, greedy, logits_of, stored
from local import local_cluster, wait_until

import dagflow
from dagflow.errors import NoProgress
from dagflow.serving import stage_server
from dagflow.serving.stage_server import num_tokens_computed
from dagflow.swarm.events import EVENTS, Event, StagePlaced, WorkerLeft

PROMPT = [5, 17, 3, 42, 8, 23, 5, 17]
NUM_NEW = 24
NUM_WORKERS = 3
# A frozen worker must be noticed and replaced within so long; what it takes to answer comes on top.
NOTICED_SECONDS = 3.0


class Swarm:
    """A deployment of two stages, and its workers' processes."""

    def __init__(self, client: Client, deployment: dagflow.Deployment) -> None:
        self.client = client
        self.deployment = deployment
        self.engine = deployment.engine

    def wait_for_spares(self, count: int) -> None:
        """Wait until so many workers could replace any other at once."""
        wait_until(lambda: len(self.engine.placement.spares()) >= count, f"{count} spares")

    def address(self, stage: int) -> str:
        return self.engine.placement.addresses[stage]

    def pids(self) -> dict[str, int]:
        found: dict[str, int] = self.client.run(os.getpid)
        return found

    def computed(self, stage: int) -> int:
        """How many tokens a stage's present worker has computed."""
        address = self.address(stage)
        counts = self.client.run(num_tokens_computed, self.engine.name, workers=[address])
        found: int = counts[address][stage]
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three workers; those that are killed are started again, under another address.

    That is their nannies' work: the cluster, too, would replace them after a while, by name, and the
    two would refuse each other.
    """
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}),
        local_cluster(NUM_WORKERS) as local,
    ):
        yield local


@pytest.fixture
def swarm(cluster: LocalCluster, llama: tuple[Any, dagflow.Model]) -> Iterator[Swarm]:
    """Two stages and a spare."""
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(NUM_WORKERS, timeout=60)
        with dagflow.Deployment(llama[1], client, num_stages=2) as deployment:
            found = Swarm(client, deployment)
            found.wait_for_spares(1)
            yield found


def answer(swarm: Swarm, then: Callable[[], None], at: int = 6) -> list[int]:
    """Answer, and do something when so many tokens have come."""
    request = swarm.deployment.request(
        PROMPT, max_new_tokens=NUM_NEW, ignore_end=True, speculate=False
    )
    found: list[int] = []
    for token in swarm.deployment.stream([request]):
        assert token.token is not None
        found.append(token.token)
        if len(found) == at:
            then()
    return found


def kill(swarm: Swarm, stages: Iterable[int]) -> None:
    pids = swarm.pids()
    for address in {swarm.address(stage) for stage in stages}:
        os.kill(pids[address], signal.SIGKILL)


@pytest.mark.parametrize("stages", [[0], [1], [0, 1]])
def test_killed_workers_are_replaced_and_the_tokens_stay_the_same(
    llama: tuple[Any, dagflow.Model], swarm: Swarm, stages: list[int]
) -> None:
    others = [stage for stage in range(2) if stage not in stages]
    before = {stage: swarm.address(stage) for stage in range(2)}
    found = answer(swarm, lambda: kill(swarm, stages))
    assert found == greedy(llama[0], PROMPT, NUM_NEW)
    once = len(PROMPT) + NUM_NEW - 1
    for stage in others:
        assert swarm.address(stage) == before[stage]
        # What was under way may come a second time.
        assert once <= swarm.computed(stage) <= once + 1


def test_a_frozen_worker_is_noticed_and_replaced_in_seconds(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    pid = swarm.pids()[swarm.address(1)]
    frozen_at: list[float] = []

    def freeze() -> None:
        os.kill(pid, signal.SIGSTOP)
        frozen_at.append(time.monotonic())

    try:
        found = answer(swarm, freeze, at=NUM_NEW - 1)
        assert time.monotonic() - frozen_at[0] < NOTICED_SECONDS
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found == greedy(llama[0], PROMPT, NUM_NEW)
    swarm.wait_for_spares(1)  # awake again, it is one


def test_with_all_workers_gone_the_answer_goes_on_where_others_join(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    def kill_all() -> None:
        for pid in swarm.pids().values():
            os.kill(pid, signal.SIGKILL)

    assert answer(swarm, kill_all) == greedy(llama[0], PROMPT, NUM_NEW)


def test_between_sessions_a_lost_stage_is_replaced_as_well(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    before = swarm.address(1)
    kill(swarm, [1])
    wait_until(lambda: swarm.address(1) not in ("", before), "the stage was placed again")
    assert answer(swarm, lambda: None) == greedy(llama[0], PROMPT, NUM_NEW)


def test_sessions_forked_before_a_loss_go_on_after_it(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    with dagflow.Session(swarm.deployment) as session:
        session.prefill(PROMPT)
        before = swarm.address(1)
        with session.fork(5) as fork:
            kill(swarm, [1])
            rest, other = session.decode(7), fork.decode(9)
            assert torch.allclose(rest, logits_of(llama[0], [*PROMPT, 7])[-1], atol=1e-4)
            assert torch.allclose(other, logits_of(llama[0], [*PROMPT[:5], 9])[-1], atol=1e-4)
    assert swarm.address(1) != before


def test_several_answers_at_once_survive_a_loss(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    prompts = [PROMPT, PROMPT[:3], [9, 4, 4], [60]]
    requests = [
        swarm.deployment.request(p, max_new_tokens=NUM_NEW, ignore_end=True) for p in prompts
    ]
    found: list[list[int]] = [[] for _ in prompts]
    for count, token in enumerate(swarm.deployment.stream(requests)):
        assert token.token is not None
        found[token.prompt].append(token.token)
        if count == 10:
            kill(swarm, [1])
    assert found == [greedy(llama[0], p, NUM_NEW) for p in prompts]


@pytest.mark.parametrize("stages", [[0], [1], [0, 1]])
def test_a_beam_search_survives_a_loss(
    llama: tuple[Any, dagflow.Model],
    swarm: Swarm,
    stages: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids = swarm.pids()
    addresses = {swarm.address(stage) for stage in stages}
    step, num_steps = swarm.engine.step, itertools.count(1)

    async def kill_in_between(steps: Any) -> torch.Tensor:
        if next(num_steps) == NUM_NEW // 2:
            for address in addresses:
                os.kill(pids[address], signal.SIGKILL)
        return await step(steps)

    monkeypatch.setattr(swarm.engine, "step", kill_in_between)
    options = {"max_new_tokens": NUM_NEW, "num_beams": 4, "num_return_sequences": 4}
    prompts = [PROMPT, PROMPT[:3]]
    found = dagflow.generate(swarm.deployment, prompts, ignore_end=True, **options)
    answers = [
        answer for p in prompts for answer in beam_search(llama[0], p, eos_token_id=None, **options)
    ]
    assert [tokens.tolist() for tokens in found.tokens] == [tokens for tokens, _ in answers]
    assert not addresses & {swarm.address(stage) for stage in range(2)}


def hub_of(worker: Any) -> Any:
    return stage_server._hub(worker)


def forget_stage(dask_worker: Any) -> None:
    for running in hub_of(dask_worker)._stages.values():
        running.stop()
    hub_of(dask_worker)._stages.clear()


def stop_taking_messages(dask_worker: Any) -> None:
    for running in hub_of(dask_worker)._stages.values():
        running.stop()


def lose_a_pass(dask_worker: Any) -> None:
    hub, is_lost = hub_of(dask_worker), []

    def take(message: dict[str, Any]) -> None:
        if message["kind"] == "pass" and not is_lost:
            is_lost.append(True)
            del hub.take
        else:
            type(hub).take(hub, message)

    hub.take = take


def lose_all_but(num_passes: int, dask_worker: Any) -> None:
    hub, left = hub_of(dask_worker), [num_passes]

    def take(message: dict[str, Any]) -> None:
        left[0] -= message["kind"] == "pass"
        if message["kind"] != "pass" or left[0] >= 0:
            type(hub).take(hub, message)

    hub.take = take


def compute_for_ever_after(num_passes: int, dask_worker: Any) -> None:
    stage_server._SHORT_SECONDS = 0.0  # never on the loop, which would be a frozen worker
    for running in hub_of(dask_worker)._stages.values():
        run, left = running._stage.run, [num_passes]

        def counted(*given: Any, run: Any = run, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                threading.Event().wait(4)
            return run(*given)

        running._stage.run = counted


def break_in_mid_answer(swarm: Swarm, stage: int, how: Callable[[Any], None]) -> list[int]:
    address = swarm.address(stage)
    return answer(swarm, lambda: swarm.client.run(how, workers=[address]) and None)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", [forget_stage, stop_taking_messages])
def test_a_stage_that_is_gone_from_a_worker_that_answers_is_replaced(
    llama: tuple[Any, dagflow.Model], swarm: Swarm, stage: int, how: Callable[[Any], None]
) -> None:
    assert break_in_mid_answer(swarm, stage, how) == greedy(llama[0], PROMPT, NUM_NEW)
    swarm.wait_for_spares(1)  # the worker has read its weights again, and is as good as before


def test_tokens_that_are_lost_on_their_way_are_sent_again(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    swarm.engine.placement.patience_seconds = 1.0
    before = swarm.address(1)
    assert break_in_mid_answer(swarm, 1, lose_a_pass) == greedy(llama[0], PROMPT, NUM_NEW)
    assert swarm.address(1) == before


def test_a_request_that_makes_no_progress_ends_with_an_error(swarm: Swarm) -> None:
    swarm.engine.placement.patience_seconds = 1.0
    address = swarm.address(1)

    def heal(dask_worker: Any) -> None:
        del hub_of(dask_worker).take

    swarm.client.run(lose_all_but, 6, workers=[address])
    try:
        with pytest.raises(NoProgress, match=r"under way for 2 s.*ask again"):
            answer(swarm, lambda: None)
    finally:
        swarm.client.run(heal, workers=[address])
    assert len(answer(swarm, lambda: None)) == NUM_NEW


def test_a_worker_that_computes_one_pass_for_ever_is_replaced(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    swarm.engine.placement.patience_seconds = 1.0
    before = swarm.address(1)
    swarm.client.run(compute_for_ever_after, 6, workers=[before])
    assert answer(swarm, lambda: None) == greedy(llama[0], PROMPT, NUM_NEW)
    assert swarm.address(1) != before


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[0], [1], [0, 1]])
def test_states_of_recurrent_layers_are_made_again_after_a_loss(
    cluster: LocalCluster, tmp_path: Path, stages: list[int]
) -> None:
    model, loaded = stored("qwen3_5", tmp_path)
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(NUM_WORKERS, timeout=60)
        with dagflow.Deployment(loaded, client, num_stages=2) as deployment:
            swarm = Swarm(client, deployment)
            swarm.wait_for_spares(1)
            found = answer(swarm, lambda: kill(swarm, stages))
    assert found == greedy(model, PROMPT, NUM_NEW)


def test_what_happens_is_told_with_names(swarm: Swarm) -> None:
    heard: list[Event] = []
    swarm.engine.events.listen(heard.append)
    names = {a: str(w["name"]) for a, w in swarm.client.scheduler_info()["workers"].items()}
    lost = swarm.address(1)
    answer(swarm, lambda: kill(swarm, [1]))
    wait_until(lambda: swarm.address(1) not in ("", lost), "the stage is there again")
    (left,) = [event for event in heard if isinstance(event, WorkerLeft) and event.stages]
    assert (left.worker, left.name, left.stages) == (lost, names[lost], (1,))
    placed = [event for event in heard if isinstance(event, StagePlaced)]
    assert (1, swarm.address(1)) in [(event.stage, event.worker) for event in placed]
    told = [message for _, message in swarm.client.get_events(EVENTS)]
    ours = [m["event"] for m in told if m.get("deployment") == swarm.engine.name]
    assert {"stage-placed", "worker-left"} <= set(ours)


# Last: the cluster doesn't start another in its place.
def test_a_retired_worker_hands_its_stage_over(
    llama: tuple[Any, dagflow.Model], swarm: Swarm
) -> None:
    retired = swarm.address(0)

    def retire() -> None:
        swarm.client.retire_workers([retired], close_workers=False, remove=True)

    assert answer(swarm, retire) == greedy(llama[0], PROMPT, NUM_NEW)
    wait_until(lambda: swarm.address(0) != retired, "the stage has moved")
