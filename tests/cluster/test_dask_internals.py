"""dask's internals, and its unwritten promises, are still what `dagflow.swarm` takes them for."""

from __future__ import annotations

import ast
import asyncio
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import dask
import pytest
import set_clock
from chaos import warm
from dask.tokenize import tokenize
from dask.utils import key_split
from distributed import Client, Event, LocalCluster, get_worker
from distributed.batched import BatchedSend
from distributed.protocol.pickle import dumps, loads
from local import local_client, wait_until
from processes import Copy, kill_group, own_scheduler
from tornado.ioloop import IOLoop, PeriodicCallback

from dagflow.swarm import dask_internals
from dagflow.swarm.clusters import scheduler_info
from dagflow.swarm.dask_internals import (
    StepTask,
    Task,
    TaskRef,
    cause_of,
    client_stream,
    executing_seconds,
    keep_time,
    scheduler_streams,
    silent_seconds,
)
from dagflow.swarm.health import LONG_SILENCE_SECONDS
from dagflow.swarm.watch import TOPIC, is_ours
from dagflow.swarm.workers import StageScheduler, StageWorker
from dagflow.training.dask_tasks import Places

# Modules and attributes of dask that its documentation doesn't have.
_PUBLIC = {
    "dask", "dask.sizeof", "dask.system", "dask.utils", "distributed", "distributed.cli.dask_worker",
    "distributed.comm", "distributed.comm.core", "distributed.comm.registry",
    "distributed.protocol", "distributed.security",
}  # fmt: skip
_INTERNAL = {
    "asyncio_loop", "batched_stream", "client_comms", "dont_reply", "extensions",
    "handlers", "identity", "memory_manager", "nthreads", "periodic_callbacks", "processing_on",
    "scheduler_comm", "stream_comms", "stream_handlers", "transfer_outgoing_log",
}  # fmt: skip


def test_what_is_not_public_in_dask_is_in_one_module() -> None:
    package = Path(dask_internals.__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        if path == Path(dask_internals.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.partition(".")[0] in ("dask", "distributed"):
                    found = [alias.name for alias in node.names if alias.name.startswith("_")]
                    found += [node.module] if node.module not in _PUBLIC else []
            elif isinstance(node, ast.Attribute):
                found = [node.attr] if node.attr in _INTERNAL else []
            assert not found, f"{path}: {found}"


def test_batched_send_counts_its_interval_in_seconds() -> None:
    assert BatchedSend(interval="2ms").interval == 0.002


def test_plugins_shorten_both_directions_of_messages(cluster: LocalCluster, client: Client) -> None:
    client.register_plugin(StageScheduler())
    client.register_plugin(StageWorker())
    comms = cluster.scheduler.stream_comms
    assert len(comms) == 2
    assert all(isinstance(comm, BatchedSend) for comm in comms.values())
    assert {comm.interval for comm in scheduler_streams(cluster.scheduler)} == {-math.inf}

    def interval(dask_worker: Any) -> tuple[str, float]:
        return type(dask_worker.batched_stream).__name__, dask_worker.batched_stream.interval

    assert set(client.run(interval).values()) == {("BatchedSend", -math.inf)}


def test_a_client_that_has_connected_again_has_another_connection(cluster: LocalCluster) -> None:
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        before = client_stream(client)
        assert before is client_stream(client) is not None
        client.loop.add_callback(client.scheduler_comm.comm.abort)
        wait_until(lambda: client_stream(client) not in (None, before), "it is connected again")
        assert client.status == "running"


def test_workers_log_what_they_send_with_its_bandwidth(client: Client) -> None:
    first, second = sorted(scheduler_info(client)["workers"])
    with dask.annotate(workers=[first]):
        data = client.submit(bytes, 1 << 20, pure=False)
    client.submit(len, data, workers=[second], pure=False).result()

    def newest(dask_worker: Any) -> Any:
        return dask_worker.transfer_outgoing_log[-1]

    entry = client.run(newest, workers=[first])[first]
    assert entry["total"] >= 1 << 20
    assert entry["bandwidth"] > 0
    assert str(entry["who"]).startswith("tcp://127.0.0.1:")


def test_the_scheduler_tells_of_all_workers_whatever_the_client_asks_meanwhile(
    cluster: LocalCluster,
) -> None:
    with (
        dask.config.set({"distributed.client.scheduler-info-interval": "1ms"}),
        Client(cluster, set_as_default=False) as restless,
    ):
        found = [scheduler_info(restless)["workers"] for _ in range(200)]
    assert [len(workers) for workers in found] == 200 * [2]
    assert all({"name", "last_seen", "memory_limit"} <= info.keys() for info in found[0].values())


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there it can't lock workers up")
def test_workers_do_not_look_at_their_tasks_stacks() -> None:
    def profiles(dask_worker: Any) -> tuple[bool, int]:
        there = "profile" in dask_worker.periodic_callbacks
        profiles = [profile for _, profile in dask_worker.profile_history]
        return there, sum(p["count"] for p in [*profiles, dask_worker.profile_recent])

    def busy() -> int:
        return sum(range(3_000_000))

    with local_client(1) as client:
        # A loaded machine may not let the thread that looks run during one task.
        deadline = time.monotonic() + 60
        while not client.run(profiles).popitem()[1][1] and time.monotonic() < deadline:
            client.submit(busy, pure=False).result()
        [(there, count)] = client.run(profiles).values()
        assert there
        assert count > 0
        client.register_plugin(StageWorker())
        [(there, before)] = client.run(profiles).values()
        assert not there
        client.submit(busy, pure=False).result()
        assert client.run(profiles).popitem()[1] == (False, before)


def test_tasks_name_what_they_depend_on_and_get_its_value() -> None:
    first, second = ("x", 0), ("y", 0)
    for kind in (Task, StepTask):
        task = kind(second, lambda *parts: parts, TaskRef(first), 5, {"a": [1]})
        assert set(task.dependencies) == {first}
        assert task({first: 4}) == (4, 5, {"a": [1]})


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AssertionError("a token was made of a task's arguments")


def test_a_step_tasks_token_is_its_key() -> None:
    def token(key: Any) -> str:
        found: str = tokenize(StepTask(key, max, Unpicklable()))
        return found

    assert token(("x", 1)) == token(("x", 1)) != token(("x", 2))
    assert loads(dumps(StepTask(("x", 1), max, 2, 3)))({}) == 3


def test_callables_place_every_task(client: Client) -> None:
    addresses = sorted(scheduler_info(client)["workers"])

    def here() -> str:

        address: str = get_worker().address
        return address

    keys = [("here-placed", 0, stage, index) for stage in (0, 1) for index in range(4)]
    with dask.annotate(workers=Places(addresses)):
        futures = client.get({key: Task(key, here) for key in keys}, keys, sync=False)
    found = client.gather(futures)
    assert found == [addresses[0]] * 4 + [addresses[1]] * 4


def test_callables_order_what_is_ready(client: Client) -> None:
    address = min(scheduler_info(client)["workers"])
    gate, started = Event("gate", client=client), Event("started", client=client)

    def block() -> None:
        Event("started").set()
        Event("gate").wait(timeout=60)

    blocked = client.submit(block, workers=[address], pure=False)
    assert started.wait(timeout=60)
    order = [3, 0, 4, 1, 2]
    keys = [("clock-ordered", 0, 0, index) for index in range(5)]

    def priority(key: Any) -> float:
        return -float(order.index(key[3]))

    with dask.annotate(workers=Places([address]), priority=priority):
        futures = client.get({key: Task(key, time.monotonic_ns) for key in keys}, keys, sync=False)

    def waiting(dask_worker: Any) -> int:
        return sum(str(key).startswith("('clock-ordered'") for key in dask_worker.state.tasks)

    wait_until(lambda: client.run(waiting, workers=[address])[address] == 5, "all are waiting")
    gate.set()
    times = client.gather(futures)
    assert sorted(range(5), key=lambda index: times[index]) == order
    blocked.result()


def test_a_chain_of_futures_keeps_its_ancestors_on_the_scheduler(
    cluster: LocalCluster, client: Client
) -> None:
    tasks = cluster.scheduler.tasks
    wait_until(lambda: not tasks, "no task of another test is left")
    chain = client.submit(int, 0, pure=False)
    for _ in range(5):
        chain = client.submit(abs, chain, pure=False)
    assert chain.result() == 0
    assert len(tasks) == 6
    # Their results are gone all the same: only the last one's is held.
    wait_until(lambda: sum(task.state == "memory" for task in tasks.values()) == 1, "one result")
    chain.release()
    wait_until(lambda: not tasks, "the chain is forgotten")


def test_the_scheduler_knows_how_long_a_worker_has_been_running_a_task(
    cluster: LocalCluster, client: Client
) -> None:
    address = next(iter(scheduler_info(client)["workers"]))
    gate = Event("gate-of-a-long-task", client=client)

    def block() -> None:
        Event("gate-of-a-long-task").wait(timeout=60)

    key = ("forward-0123abcd", 0, 0, 0)
    with dask.annotate(workers=[address]):
        (blocked,) = client.get({key: Task(key, block)}, [key], sync=False)
    try:
        wait_until(
            lambda: executing_seconds(cluster.scheduler, address, is_ours) > 0.2,
            "a heartbeat tells of the task",
        )
        assert executing_seconds(cluster.scheduler, address, lambda _: False) == 0.0
        assert executing_seconds(cluster.scheduler, "tcp://nobody:1", is_ours) == 0.0
    finally:
        gate.set()
        blocked.result()


def test_a_transition_says_what_the_watch_wants_to_know(
    cluster: LocalCluster, client: Client
) -> None:
    client.register_plugin(StageScheduler())
    told: list[dict[str, Any]] = []
    client.subscribe_topic(TOPIC, lambda event: told.append(event[1]))
    good, bad = ("forward-0123abcd", 5, 1, 0), ("backward-0123abcd", 5, 1, 0)
    (first,) = client.get({good: Task(good, time.sleep, 0.1)}, [good], sync=False)
    (second,) = client.get({bad: Task(bad, int, "x")}, [bad], sync=False)
    try:
        first.result()
        watch = cluster.scheduler.plugins["dagflow-stage-scheduler"]._watch
        assert watch.longest["forward", 1][-1] > 0.05
        with pytest.raises(ValueError, match="invalid literal"):
            second.result()
        wait_until(lambda: bool(told), "the failure is told")
        assert told[0]["action"] == "erred"
        assert list(told[0]["key"]) == ["backward-0123abcd", "5", "1", "0"]
        assert told[0]["worker"] in scheduler_info(client)["workers"]
    finally:
        client.unsubscribe_topic(TOPIC)
        for future in (first, second):  # by hand: the traceback that was caught holds this frame
            future.release()


def test_the_scheduler_and_workers_remember_nothing_of_a_graph_that_is_done(
    cluster: LocalCluster, client: Client
) -> None:
    client.register_plugin(StageScheduler())
    spans = cluster.scheduler.extensions["spans"]

    def run(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            key = ("forward-0123abcd", step, 0, 0)
            client.get({key: Task(key, int, step)}, [key])

    def counted(dask_worker: Any) -> int:
        return len(dask_worker.digests_total)

    def remembered() -> tuple[int, int, int]:
        of_spans = len(spans.spans) + sum(len(span.groups) for span in spans.spans.values())
        in_all = len(cluster.scheduler.cumulative_worker_metrics)
        return of_spans, in_all, sum(client.run(counted).values())

    def heard_of() -> bool:
        """Heartbeats since have told of the last step."""
        seen = [info["last_seen"] for info in scheduler_info(client)["workers"].values()]
        return min(seen) > done + 1

    run(0, 20)
    done = time.time()
    wait_until(heard_of, "the workers have told what they counted")
    before = remembered()
    run(20, 40)
    done = time.time()
    wait_until(heard_of, "the workers have told what they counted")
    assert remembered() == before


def test_dask_remembers_keys_that_it_has_split_and_can_forget_them() -> None:
    key_split.cache_clear()  # other tests' schedulers have split keys in this process
    for number in range(10):
        key_split((f"forward-{number:08x}", number, 0))
    assert key_split.cache_info().maxsize > 10_000
    assert key_split.cache_info().currsize >= 10
    dask_internals.forget_split_keys(most=1000)
    assert key_split.cache_info().currsize >= 10
    dask_internals.forget_split_keys(most=9)
    assert key_split.cache_info().currsize < 10


def test_who_leaves_does_not_wait_for_who_is_frozen(
    cluster: LocalCluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.register_plugin(StageScheduler())
    state = cluster.scheduler
    frozen = min(state.workers)
    real = silent_seconds(state)
    assert max(real.values()) < LONG_SILENCE_SECONDS
    silence = {**real, frozen: LONG_SILENCE_SECONDS + 1}
    monkeypatch.setattr("dagflow.swarm.workers.silent_seconds", lambda _: silence)
    wait_until(lambda: state.workers[frozen] not in state.running, "it gets nothing any more")
    assert len(state.running) == 1
    monkeypatch.undo()
    wait_until(lambda: len(state.running) == 2, "it was heard of, and may be given work")


def test_timers_go_on_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time

    async def ticks(ahead: float) -> int:
        came = 0
        third = asyncio.Event()

        def tick() -> None:
            nonlocal came
            came += 1
            if came == 1:
                monkeypatch.setattr(time, "time", lambda: real() + ahead)
                keep_time(node)  # again, as by the next driver: it keeps to the clock it has
            if came == 3:
                third.set()

        node = SimpleNamespace(loop=IOLoop.current())
        keep_time(node)
        timer = PeriodicCallback(tick, 10)
        timer.start()
        async with asyncio.timeout(10):
            await third.wait()
        timer.stop()
        monkeypatch.undo()
        return came

    assert asyncio.run(ticks(-86400)) == 3
    assert asyncio.run(ticks(86400)) == 3


DAY = 86400.0


def test_a_worker_whose_clock_is_set_back_goes_on_working(tmp_path: Path) -> None:
    options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--preload", "dagflow.worker"]
    with own_scheduler() as (client, address):
        worker = Copy(warm.start(set_clock.worker, tmp_path / "log", [address, *options]))
        try:
            client.wait_for_workers(1, timeout=60)
            (name,) = scheduler_info(client)["workers"]
            for days in (-1, 2):
                client.run(set_clock.set_while_sending, days * DAY, workers=[name])
                assert client.submit(abs, days, pure=False).result(timeout=10) == abs(days)

                def is_heard_of(since: float = time.time()) -> bool:
                    seen = scheduler_info(client)["workers"][name]["last_seen"]
                    return float(seen) > since + 0.5

                wait_until(is_heard_of, "it is heard of again and again", 10)
        finally:
            kill_group(worker)
            worker.communicate()


def test_the_scheduler_knows_which_tasks_failure_made_others_fail(client: Client) -> None:
    def fail() -> NoReturn:
        raise ZeroDivisionError

    keys: list[Any] = [("cause-0123abcd", 0, 0), ("between-0123abcd", 0, 0), ("end-0123abcd", 0, 0)]
    cause, between, end = keys
    tasks = {
        cause: Task(cause, fail),
        between: Task(between, str, TaskRef(cause)),
        end: Task(end, str, TaskRef(between)),
    }
    with dask.annotate(workers=Places(sorted(scheduler_info(client)["workers"]))):
        (future,) = client.get(tasks, [end], sync=False)
    wait_until(future.done, "the last task has failed")
    assert cause_of(client, end) == cause
    assert cause_of(client, ("nobody-0123abcd", 0, 0)) is None
    future.release()
