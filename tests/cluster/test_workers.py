"""Machines join from the command line, and leave without a word."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from distributed import Client, Worker, WorkerPlugin
from local import wait_until
from processes import BIN, Copy, kill_group, swarm, volunteers
from small import assert_same_run, batches, example, train, train_with_torch

import dagflow
from dagflow.swarm import clusters, health
from dagflow.swarm.clusters import scheduler_info
from dagflow.swarm.membership import Membership, ResultGone
from dagflow.swarm.workers import describe

DASK_WORKER = [BIN / "dask", "worker", "ADDRESS", "--nthreads", "1", "--no-dashboard"]
PRELOAD = ["--preload", "dagflow.worker", "--torch-threads", "1"]
COMMANDS: dict[str, list[str | Path]] = {
    "preloaded": [*DASK_WORKER, "--name", "preloaded", *PRELOAD],
    "joined": [BIN / "dagflow", "join", "ADDRESS", "--name", "joined", "--torch-threads", "1"],
    "plain": [*DASK_WORKER, "--name", "plain"],
}
# A tensor of 8 MB has 2048 pages of 4 kB. Many rounds: what else a worker allocates may land where a
# tensor was, once or twice.
ROUNDS, PAGES = 100, 2048


def page_faults() -> int:
    """Count the page faults of making and dropping tensors of 8 MB."""
    import resource

    import torch

    torch.ones(2 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@dataclass
class Swarm:
    """A client, each worker's address, and its page faults before any training."""

    client: Client
    addresses: dict[str, str]
    faults: dict[str, int]


def faults_by_name(client: Client, addresses: dict[str, str]) -> dict[str, int]:
    # By value: the workers know nothing of the tests.
    import cloudpickle

    payload = cloudpickle.dumps(page_faults.__code__)

    def count() -> int:
        import marshal  # noqa: F401
        import pickle
        import types

        counted: int = types.FunctionType(pickle.loads(payload), {"__builtins__": __builtins__})()
        return counted

    found = client.run(count)
    return {name: found[address] for name, address in addresses.items()}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with swarm(COMMANDS, tmp_path_factory.mktemp("swarm")) as (client, _):
        workers = scheduler_info(client)["workers"]
        addresses = {info["name"]: address for address, info in workers.items()}
        yield Swarm(client, addresses, faults_by_name(client, addresses))


def test_preload_join_and_a_plain_worker_train_together(joined: Swarm, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 4)
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=joined.client)
    assert sorted(result.plan.workers) == ["joined", "plain", "preloaded"]
    assert set(result.plan.placement) == {0, 1, 2}
    assert result.losses == pytest.approx(wanted, rel=1e-6)


def test_the_plugin_makes_a_plain_worker_keep_freed_memory(joined: Swarm, tmp_path: Path) -> None:
    of = example()
    train(of, batches(of, 1), tmp_path / "run", client=joined.client)
    after = faults_by_name(joined.client, joined.addresses)
    # dask's own setting gives every tensor's pages back; the preload keeps them from the start.
    assert joined.faults["plain"] > ROUNDS * PAGES / 2
    assert max(joined.faults["preloaded"], joined.faults["joined"]) < ROUNDS * PAGES / 10
    assert max(after.values()) < ROUNDS * PAGES / 10


def test_workers_have_the_threads_they_were_asked_for(joined: Swarm, tmp_path: Path) -> None:
    of = example()
    train(of, batches(of, 1), tmp_path / "run", client=joined.client)
    facts = {fact["name"]: fact for fact in joined.client.run(describe).values()}
    assert facts["preloaded"]["num_torch_threads"] == facts["joined"]["num_torch_threads"] == 1
    assert {fact["num_threads"] for fact in facts.values()} == {1}
    assert {fact["dagflow"] for fact in facts.values()} == {dagflow.__version__}
    intervals = joined.client.run(lambda dask_worker: dask_worker.batched_stream.interval)
    assert set(intervals.values()) == {-math.inf}


def test_a_machine_that_joins_has_no_dashboard_of_its_own(joined: Swarm) -> None:
    loaded = joined.client.run(lambda: "bokeh" in __import__("sys").modules)
    assert not loaded[joined.addresses["joined"]]


NO_NANNY = ["--no-nanny", "--nthreads", "1", "--no-dashboard"]


def two(folder: Path) -> AbstractContextManager[tuple[Client, dict[str, Copy]]]:
    return volunteers(("first", "second"), [*NO_NANNY, *PRELOAD], folder)


def killer(step: int, *workers: Copy) -> Any:
    def kill(event: dagflow.StepEvent) -> None:
        if event.step == step:
            for worker in workers:
                kill_group(worker)

    return kill


def test_a_run_survives_a_killed_worker_with_the_same_bits(client: Client, tmp_path: Path) -> None:
    of = example(dropout=True)
    data = batches(of, 12)
    wanted = train(of, data, tmp_path / "undisturbed", client=client)
    heard: list[int] = []
    with two(tmp_path) as (swarmed, workers):
        result = train(
            of, data, tmp_path / "run", client=swarmed, snapshot_every=3,
            callbacks=[lambda event: heard.append(event.step), killer(5, workers["second"])],
        )  # fmt: skip
    assert_same_run(result, wanted)
    # The journal leads to where the stage was: no step is done, or heard of, twice.
    assert heard == list(range(1, 13))


def test_when_all_workers_are_gone_the_run_waits_then_ends_and_can_be_resumed(
    client: Client, tmp_path: Path
) -> None:
    of = example(dropout=True)
    data = batches(of, 8)
    wanted = train(of, data, tmp_path / "undisturbed", client=client)
    run = tmp_path / "run"
    config = dagflow.Config(cluster=dagflow.ClusterSettings(wait_seconds=1.0))
    with (
        two(tmp_path) as (swarmed, workers),
        pytest.raises(dagflow.WorkersLost, match=r"0 of 1 workers joined .* within 1 s"),
    ):
        train(
            of, data, run, client=swarmed, snapshot_every=2, config=config,
            callbacks=[killer(4, *workers.values())],
        )  # fmt: skip
    heard: list[int] = []
    again = train(of, data, run, client=client, callbacks=[lambda event: heard.append(event.step)])
    assert_same_run(again, wanted)
    assert heard == list(range(heard[0], 9))


def test_a_result_that_nobody_hands_out_is_not_waited_for(tmp_path: Path) -> None:
    with (
        volunteers(["plain"], NO_NANNY, tmp_path) as (asked, workers),
        Membership(asked) as membership,
    ):
        future = asked.submit(pow, 2, 5, pure=False)
        assert membership.result_of(future, lambda: None) == 32
        failing = asked.submit(divmod, 1, 0, pure=False)
        with pytest.raises(ZeroDivisionError):
            membership.result_of(failing, lambda: None)
        kill_group(workers["plain"], signal.SIGSTOP)
        with pytest.raises(ResultGone, match="went with its worker"):
            membership.result_of(future, lambda: None)


def test_a_run_starts_without_a_frozen_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LONG_SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(clusters, "_ANSWER_SECONDS", 2.0)
    of = example()
    data = batches(of, 2)
    wanted, _ = train_with_torch(of, data)
    with two(tmp_path) as (swarmed, workers):
        kill_group(workers["second"], signal.SIGSTOP)
        wait_until(lambda: bool(clusters._frozen(swarmed)), "the scheduler misses a worker")
        begin = time.monotonic()
        with pytest.warns(UserWarning, match="second .* doesn't answer"):
            result = train(of, data, tmp_path / "run", client=swarmed)
        assert time.monotonic() - begin < dagflow.ClusterSettings().wait_seconds
        assert list(result.plan.workers) == ["first"]
        assert result.losses == pytest.approx(wanted, rel=1e-6)

        kill_group(workers["first"], signal.SIGSTOP)
        config = dagflow.Config(cluster=dagflow.ClusterSettings(wait_seconds=1.0))
        with pytest.raises(dagflow.WorkersLost, match="don't answer: are they frozen"):
            train(of, data, tmp_path / "other", client=swarmed, config=config)

        # Whoever needs both, as of workers that it has started itself, waits for the silent one.
        kill_group(workers["first"], signal.SIGCONT)
        Timer(1.0, kill_group, [workers["second"], signal.SIGCONT]).start()
        assert [found.name for found in clusters.roster(swarmed, 2, 60.0)] == ["first", "second"]
        woken = train(of, data, tmp_path / "other", client=swarmed)
        assert sorted(woken.plan.workers) == ["first", "second"]


class Unplugged(WorkerPlugin):  # type: ignore[misc]
    """Fails on the first worker, as if that had left just then."""

    name = "unplugged"

    def __init__(self, failed: Path) -> None:
        self.failed = failed

    def setup(self, worker: Worker) -> None:
        worker.plugged = self.failed.exists()
        if not worker.plugged:
            self.failed.touch()
            raise ConnectionResetError("somebody stumbled over the cable")


def test_who_leaves_meanwhile_keeps_no_plugin_from_the_others(
    client: Client, tmp_path: Path
) -> None:
    clusters.register_on_workers(client, Unplugged(tmp_path / "failed"), 30.0)
    client.unregister_worker_plugin(Unplugged.name)
    assert set(client.run(lambda dask_worker: dask_worker.plugged).values()) == {True}


def test_an_iterator_that_cannot_be_read_again_is_no_trouble_with_a_journal(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 8)
    wanted = train(of, data, tmp_path / "undisturbed", client=client)
    with two(tmp_path) as (swarmed, workers):
        found = train(
            of, iter(data), tmp_path / "run", client=swarmed, snapshot_every=2, steps=8,
            callbacks=[killer(4, workers["second"])],
        )  # fmt: skip
    assert_same_run(found, wanted)


def test_without_a_journal_an_iterator_is_said_to_be_one(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 8)
    wanted = train(of, data, tmp_path / "undisturbed", client=client)
    run = tmp_path / "run"
    with (
        two(tmp_path) as (swarmed, workers),
        pytest.raises(dagflow.BatchInvalid, match=r"can be read once.*new iterator"),
    ):
        train(
            of, iter(data), run, client=swarmed, snapshot_every=2, steps=8,
            journal=False, callbacks=[killer(4, workers["second"])],
        )  # fmt: skip
    assert_same_run(train(of, iter(data), run, client=client, steps=8), wanted)
