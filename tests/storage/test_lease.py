import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagflow_storage import (
    DamagedData,
    FormatTooNew,
    Lease,
    LeaseLost,
    LeaseUnconfirmed,
    Store,
    StoreInUse,
    StoreUnreachable,
    hold_lease,
)
from dagflow_storage import lease as lease_module
from dagflow_storage._process import ProcessIdentity

BEAT, PATIENCE = 1000.0, 4000.0  # so long that no thread beats while a test runs
SCRIPT = """
import sys
from dagflow_storage import Store, hold_lease
with hold_lease(Store(sys.argv[1]), patience_seconds=1.0, beat_seconds=0.05) as lease:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lease.check()
        except Exception as error:
            print(type(error).__name__, flush=True)
        else:
            print("mine", flush=True)
"""


class Time:
    """A clock that only pauses move on; whatever is due happens meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now = 1e6
        self.paused = 0.0
        self._meanwhile = meanwhile

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.paused += seconds
        self.now += seconds
        self._meanwhile()


def hold(store: Store, with_time: Time, **options: Any) -> contextlib.AbstractContextManager[Lease]:
    settings: dict[str, Any] = {"patience_seconds": PATIENCE, "beat_seconds": BEAT, **options}
    return hold_lease(store, clock=with_time.clock, pause=with_time.pause, **settings)


def abandoned(store: Store, with_time: Time) -> Lease:
    """Take the lease as a machine does that then vanishes, in a way that can't be seen from here."""
    challenger = lease_module._Challenger(
        store, PATIENCE, BEAT, with_time.clock, with_time.pause, None
    )
    lease = challenger.next_epoch()
    challenger.wait_for_older_holders(lease)
    return lease


def epochs(store: Store) -> list[str]:
    return [name for name in store.list("lease") if name.startswith("epoch")]


def test_a_released_lease_is_taken_at_once(store: Store) -> None:
    moment = Time()
    for _ in range(3):
        with hold(store, moment) as lease:
            lease.check()
            lease.verify()
    assert moment.paused == 0.0


def test_after_the_block_the_lease_is_no_longer_held(store: Store) -> None:
    with hold(store, Time()) as lease:
        pass
    with pytest.raises(LeaseLost, match="was released"):
        lease.check()


def test_a_driver_that_fails_releases_too(store: Store) -> None:
    moment = Time()
    with pytest.raises(ZeroDivisionError), hold(store, moment):
        raise ZeroDivisionError
    with hold(store, moment):
        assert moment.paused == 0.0


def test_a_live_holder_is_left_alone_and_named(store: Store) -> None:
    with hold(store, Time()) as lease:
        challenger = Time(meanwhile=lease.beat)
        with pytest.raises(StoreInUse) as caught, hold(store, challenger):
            pytest.fail("two hold it")
        lease.verify()
    assert challenger.paused < BEAT
    process = lease.holder.process
    for words in (process.host, f"process {process.pid}", "within the last 250.0 s", "epoch 1"):
        assert words in str(caught.value)
    assert epochs(store) == ["epoch-00000001.json"]


def test_a_silent_holder_is_succeeded_after_patience_and_told(store: Store) -> None:
    lost = abandoned(store, Time())
    challenger, heard = Time(), []
    with hold(store, challenger, on_wait=heard.append) as lease:
        assert PATIENCE <= challenger.paused < PATIENCE + BEAT
        assert lease.holder.epoch == lost.holder.epoch + 1
        lost.beat()
        with pytest.raises(LeaseLost, match=r"epoch 1\) no longer holds .* epoch 2\) has taken"):
            lost.check()
        lease.verify()
    assert {waiting.holder for waiting in heard} == {lost.holder}
    assert [waiting.silent_seconds for waiting in heard] == sorted(
        waiting.silent_seconds for waiting in heard
    )
    assert {waiting.patience_seconds for waiting in heard} == {PATIENCE}


def test_clocks_that_are_hours_apart_change_nothing(store: Store) -> None:
    ahead, behind = Time(), Time()
    ahead.now, behind.now = 1e9, -1e9
    with hold(store, behind) as lease:
        ahead = Time(meanwhile=lease.beat)
        with pytest.raises(StoreInUse), hold(store, ahead):
            pytest.fail("two hold it")
        lease.check()


def test_the_more_patient_side_decides_how_long_silence_must_be(store: Store) -> None:
    abandoned(store, Time())
    challenger = Time()
    with hold(store, challenger, patience_seconds=PATIENCE / 4, beat_seconds=BEAT / 4):
        assert challenger.paused >= PATIENCE


def test_a_challenger_that_slept_has_not_seen_silence(store: Store) -> None:
    holder = abandoned(store, Time())
    looks: list[float] = []

    def meanwhile() -> None:
        looks.append(challenger.now)
        if len(looks) == 1:
            challenger.now += 100 * PATIENCE  # the lid was closed
        elif len(looks) == 3:
            holder.beat()  # it is alive and was as fast asleep

    challenger = Time(meanwhile)
    with pytest.raises(StoreInUse), hold(store, challenger):
        pytest.fail("two hold it")
    holder.verify()


def test_a_holder_that_was_silent_too_long_stops_until_it_has_looked(store: Store) -> None:
    moment = Time()
    with hold(store, moment) as lease:
        moment.now += PATIENCE - 1
        lease.check()
        moment.now += 1
        with pytest.raises(LeaseUnconfirmed, match=r"4000\.0 s ago"):
            lease.check()
        lease.verify()
        lease.check()


class Away:
    """Makes puts fail while `away`, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        put = Store.write_bytes

        def write_bytes(store: Store, path: str, data: bytes) -> None:
            if self.away:
                raise StoreUnreachable("the store is away")
            put(store, path, data)

        monkeypatch.setattr(Store, "write_bytes", write_bytes)


def test_a_store_that_is_away_costs_the_lease_only_after_patience(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, moment = Away(monkeypatch), Time()
    with hold(store, moment) as lease:
        network.away = True
        for _ in range(3):
            moment.now += BEAT
            lease.beat()
            lease.check()
        moment.now += BEAT
        lease.beat()
        with pytest.raises(LeaseUnconfirmed, match="the store is away"):
            lease.check()
        network.away = False
        lease.verify()


def test_a_store_that_is_away_at_the_end_hides_no_result(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Away(monkeypatch)
    with hold(store, Time()):
        network.away = True
    network.away = False
    successor = Time()
    with hold(store, successor):
        assert successor.paused >= PATIENCE


@pytest.mark.parametrize("beats_before_the_look", [True, False])
def test_a_holder_that_comes_back_during_the_takeover_yields_first(
    store: Store, monkeypatch: pytest.MonkeyPatch, beats_before_the_look: bool
) -> None:
    """Beat and look of the one fall between look and create of the other."""
    old_time = Time()
    old = abandoned(store, old_time)
    create = lease_module._LeaseFiles.create

    def create_late(files: Any, holder: Any) -> bool:
        old_time.now += 10 * PATIENCE
        with pytest.raises(LeaseUnconfirmed):
            old.check()
        if beats_before_the_look:
            old.verify()  # it sees no newer epoch: it holds the lease again
        return create(files, holder)

    held_by_old_during_the_wait: list[bool] = []

    def next_beat() -> None:
        if not epochs(store)[1:]:
            return  # still the wait before the takeover
        held_by_old_during_the_wait.append(holds(old))
        old.beat()

    monkeypatch.setattr(lease_module._LeaseFiles, "create", create_late)
    with hold(store, Time(next_beat)) as lease:
        assert not holds(old)
        lease.verify()
    # The newer one waited only where the older had got hold of the lease again.
    assert held_by_old_during_the_wait == ([True] if beats_before_the_look else [])


def holds(lease: Lease) -> bool:
    try:
        lease.check()
    except (LeaseLost, LeaseUnconfirmed):
        return False
    return True


def test_a_takeover_that_was_broken_off_does_not_hide_the_older_holder(store: Store) -> None:
    old = abandoned(store, Time())
    # A challenger created the next epoch, and gave up before the old holder had noticed.
    challenger = lease_module._Challenger(store, PATIENCE, BEAT, *two(Time()), None)
    challenger._files.create(replace(old.holder, epoch=2, nonce="b"))
    challenger._files.write_beat(
        replace(old.holder, epoch=2, nonce="b"), lease_module.Beat(1, released=True)
    )
    assert holds(old)
    third = Time(meanwhile=old.beat)
    with hold(store, third) as lease:
        assert third.paused > 0
        assert not holds(old)
        assert lease.holder.epoch == 3


def two(moment: Time) -> tuple[Callable[[], float], Callable[[float], None]]:
    return moment.clock, moment.pause


def test_newer_holders_tidy_up_after_older_ones(store: Store) -> None:
    for _ in range(4):
        with hold(store, Time()) as lease:
            assert len(store.list("lease")) == 2
    lost = abandoned(store, Time())
    with hold(store, Time()) as lease:
        lost.beat()
        assert all(f"{lease.holder.epoch:08d}" in name for name in store.list("lease"))


@pytest.mark.parametrize("tidied_before_the_first_look", [True, False])
def test_a_challenger_that_others_overtake_is_told_of_the_newest_holder(
    store: Store, monkeypatch: pytest.MonkeyPatch, tidied_before_the_first_look: bool
) -> None:
    old = abandoned(store, Time())
    newer: list[Lease] = []

    def overtake() -> None:
        if not newer:
            newer.append(abandoned(store, Time()))
        newer[0].beat()

    if tidied_before_the_first_look:
        overtake()
        newest = lease_module._LeaseFiles.newest
        stale = iter([old.holder])
        monkeypatch.setattr(
            lease_module._LeaseFiles, "newest", lambda files: next(stale, None) or newest(files)
        )
    challenger = Time(overtake)
    with pytest.raises(StoreInUse, match="epoch 2"), hold(store, challenger):
        pytest.fail("two hold it")
    assert challenger.paused < BEAT
    newer[0].verify()


def test_an_epoch_below_the_newest_is_no_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two holders came and went while a challenger made up its mind."""
    for _ in range(3):
        with hold(store, Time()):
            pass
    newest = lease_module._LeaseFiles.newest
    stale = iter([None])
    monkeypatch.setattr(
        lease_module._LeaseFiles, "newest", lambda files: next(stale, newest(files))
    )
    with hold(store, Time()) as lease:
        assert lease.holder.epoch == 4
        lease.verify()
    assert epochs(store) == ["epoch-00000004.json"]


def test_a_lost_answer_to_the_creation_is_found_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create_bytes
    monkeypatch.setattr(Store, "create_bytes", lambda *args: create(*args) and False)
    with hold(store, Time()) as lease:
        lease.verify()


def test_a_store_without_conditional_put_leaves_one_holder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_anyway(of: Store, path: str, data: bytes) -> bool:
        of.write_bytes(path, data)
        return True

    monkeypatch.setattr(Store, "create_bytes", put_anyway)
    first = abandoned(store, Time())
    # The second looked before the first put, and puts after it.
    newest = lease_module._LeaseFiles.newest
    looks = iter([None])
    monkeypatch.setattr(
        lease_module._LeaseFiles, "newest", lambda files: next(looks, newest(files))
    )
    with hold(store, Time()) as second:
        assert second.holder.epoch == first.holder.epoch
        first.beat()
        assert not holds(first)
        second.verify()


def test_a_deleted_lease_is_lost(store: Store) -> None:
    with hold(store, Time()) as lease:
        store.delete("lease")
        with pytest.raises(LeaseLost, match="its files have been deleted"):
            lease.verify()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", DamagedData),
        (b'{"format_version": 1, "epoch": 1}', DamagedData),
        (b'{"format_version": 99}', FormatTooNew),
    ],
)
def test_a_lease_that_makes_no_sense_is_not_guessed_at(
    store: Store, content: bytes, error: type[Exception]
) -> None:
    store.write_bytes("lease/epoch-00000001.json", content)
    with pytest.raises(error, match=r"epoch-00000001\.json"), hold(store, Time()):
        pytest.fail("held")


def test_patience_must_outlast_several_beats(store: Store) -> None:
    with (
        pytest.raises(ValueError, match=r"at least 3 times beat_seconds \(5\)"),
        hold_lease(store, patience_seconds=10, beat_seconds=5),
    ):
        pytest.fail("held")
    assert store.list() == []


def lease_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dagflow-lease"]


def test_the_thread_beats_and_does_not_outlive_the_block(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    beaten = threading.Semaphore(0)
    beat = Lease.beat
    monkeypatch.setattr(Lease, "beat", lambda lease: (beat(lease), beaten.release()))
    with hold_lease(store, patience_seconds=60, beat_seconds=0.001):
        assert len(lease_threads()) == 1
        assert all(beaten.acquire(timeout=60) for _ in range(5))
    assert lease_threads() == []
    with pytest.raises(StoreUnreachable), hold_lease(store):
        raise StoreUnreachable
    assert lease_threads() == []


@pytest.mark.parametrize("held_before", [False, True])
def test_of_16_threads_one_gets_the_lease(store: Store, held_before: bool) -> None:
    if held_before:
        abandoned(store, Time()).release()
    barrier, refused = threading.Barrier(16), threading.Semaphore(0)

    def challenge(_: int) -> int:
        barrier.wait()
        try:
            with hold_lease(store, patience_seconds=60, beat_seconds=0.01) as lease:
                assert all(refused.acquire(timeout=60) for _ in range(15))
                lease.verify()
                return lease.holder.epoch
        except StoreInUse:
            refused.release()
            return 0

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(challenge, range(16)))
    assert sorted(won)[-2:] == [0, 2 if held_before else 1]
    assert len(epochs(store)) == 1


@contextlib.contextmanager
def driver(folder: Store) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("check\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


linux_only = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux_only
def test_a_killed_driver_on_this_machine_is_succeeded_at_once(folder: Store) -> None:
    with driver(folder) as process:
        process.kill()
        # Not reaped: it is a zombie now, and ended all the same.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        moment = Time()
        with hold(folder, moment):
            assert moment.paused == 0.0
        process.wait()


def test_a_live_driver_in_another_process_is_named(folder: Store) -> None:
    with driver(folder) as process:
        with pytest.raises(StoreInUse, match=f"process {process.pid} on "), hold_lease(folder):
            pytest.fail("two hold it")
        assert ask(process) == "mine"


@linux_only
def test_a_frozen_driver_is_succeeded_and_finds_out_when_it_thaws(folder: Store) -> None:
    with driver(folder) as process:
        process.send_signal(signal.SIGSTOP)
        heard: list[Any] = []
        with hold_lease(
            folder, patience_seconds=1.0, beat_seconds=0.2, on_wait=heard.append
        ) as lease:
            assert heard[-1].silent_seconds > 0.5
            process.send_signal(signal.SIGCONT)
            # Which of the two depends on whether it has looked already; it writes in neither.
            assert ask(process) in ("LeaseUnconfirmed", "LeaseLost")
            lease.verify()


@linux_only
def test_a_process_that_got_a_dead_ones_number_is_not_taken_for_it() -> None:
    this = ProcessIdentity.of_this_process()
    assert not this.has_ended()
    assert replace(this, started="1").has_ended()
    assert not replace(this, started="1", machine="another boot, or a container").has_ended()
    assert not replace(this, started="").has_ended()
    assert not replace(this, machine="", started="1").has_ended()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert replace(this, pid=child.pid).has_ended()
    assert not replace(this, pid=1, started=ProcessIdentity("", 1).started).has_ended()
