"""What `dagflow join` decides, without a process or a clock."""

from __future__ import annotations

import pytest

from dagflow.swarm.join import scheduler_endpoint
from dagflow.swarm.supervision import (
    EXIT_NOBODY_THERE,
    EXIT_REFUSED,
    EXIT_UNHEARD,
    HEALTHY_SECONDS,
    LEAVE_SECONDS,
    MAX_LOOK_PAUSE_SECONDS,
    MAX_PAUSE_SECONDS,
    REMIND_SECONDS,
    AskedToLeave,
    Begun,
    End,
    Event,
    Instruction,
    KillWorker,
    LetWorkerLeave,
    LifetimeOver,
    Look,
    NobodyAnswers,
    Pause,
    PauseOver,
    Say,
    SchedulerAnswers,
    StartWorker,
    Supervision,
    WorkerEnded,
)

ADDRESS = "tcp://10.0.0.1:8786"


class Play:
    """Tells a supervision what happens, and keeps what it says apart from what it does."""

    def __init__(self, jitter: float = 1.0, wait_seconds: float | None = None) -> None:
        self.supervision = Supervision(ADDRESS, lambda: jitter, wait_seconds)
        self.now = 1000.0
        self.said: list[str] = []

    def after(self, seconds: float, event: Event) -> list[Instruction]:
        self.now += seconds
        found = self.supervision.handle(event, self.now)
        self.said += [i.text for i in found if isinstance(i, Say)]
        return [i for i in found if not isinstance(i, Say)]

    def working(self) -> Play:
        assert self.after(0, Begun()) == [Look()]
        assert self.after(0, SchedulerAnswers()) == [StartWorker()]
        return self

    def fail(self, worked_seconds: float, status: int = 0) -> float:
        """Let the worker end and start again; return the pause between."""
        (pause,) = self.after(worked_seconds, WorkerEnded(status))
        assert isinstance(pause, Pause)
        assert self.after(pause.seconds, PauseOver()) == [Look()]
        assert self.after(0, SchedulerAnswers()) == [StartWorker()]
        return pause.seconds


def test_a_worker_whose_scheduler_went_away_looks_for_it_and_starts_again() -> None:
    play = Play().working()
    assert play.after(5, WorkerEnded(0)) == [Pause(1.0)]
    assert play.said == [f"The scheduler at {ADDRESS} went away; trying again in 1 s."]
    assert play.after(1, PauseOver()) == [Look()]
    assert play.after(0, NobodyAnswers("connection refused")) == [Pause(1.0)]
    assert play.after(1, PauseOver()) == [Look()]
    assert play.after(0, SchedulerAnswers()) == [StartWorker()]


def test_pauses_double_up_to_a_minute_and_start_anew_after_a_healthy_while() -> None:
    play = Play().working()
    assert [play.fail(3) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert play.fail(HEALTHY_SECONDS) == 1
    assert max(play.fail(3) for _ in range(2000)) == MAX_PAUSE_SECONDS


def test_jitter_takes_up_to_half_of_a_pause() -> None:
    assert [Play(jitter).working().fail(1) for jitter in (0.0, 1.0)] == [1, 1]
    pauses = []
    for jitter in (0.0, 0.5, 1.0):
        play = Play(jitter).working()
        pauses.append([play.fail(1) for _ in range(4)][-1])
    assert pauses == [4, 6, 8]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "The worker ended with status 1"),
        (-9, "The worker was ended by SIGKILL, perhaps for want of memory"),
        (-11, "The worker was ended by SIGSEGV; trying again in 1 s."),
        (-99, "The worker was ended by signal 99"),
    ],
)
def test_a_crash_is_called_by_its_name(status: int, words: str) -> None:
    play = Play().working()
    play.fail(5, status)
    assert play.said[0].startswith(words)


def test_a_retired_worker_is_not_started_again() -> None:
    play = Play().working()
    assert play.after(5, WorkerEnded(0, retired=True)) == [End(0)]
    assert "let this machine go" in play.said[0]


def test_a_worker_that_is_not_wanted_ends_at_once_unless_it_was_wanted_before() -> None:
    """Its name may be taken by itself, as long as the scheduler hasn't noticed that it had gone."""
    play = Play().working()
    assert play.after(2, WorkerEnded(EXIT_REFUSED)) == [End(EXIT_NOBODY_THERE)]
    assert play.said == []  # it has said why
    play = Play().working()
    play.fail(HEALTHY_SECONDS)
    assert play.after(2, WorkerEnded(EXIT_REFUSED)) == [Pause(2.0)]
    assert "taken before; trying again in 2 s" in play.said[-1]


def test_what_listens_without_answering_is_looked_at_again_and_given_up_after_wait() -> None:
    play = Play(wait_seconds=60).working()
    assert play.after(5, WorkerEnded(EXIT_UNHEARD)) == [Pause(1.0)]
    assert "whatever is there doesn't answer as one); trying on." in play.said[0]
    assert play.after(1, PauseOver()) == [Look()]
    assert play.after(0, SchedulerAnswers()) == [StartWorker()]
    assert play.after(60, WorkerEnded(EXIT_UNHEARD)) == [End(EXIT_NOBODY_THERE)]


def test_ctrl_c_lets_the_worker_hand_over_and_ends_with_0() -> None:
    play = Play().working()
    assert play.after(5, AskedToLeave()) == [LetWorkerLeave(), Pause(LEAVE_SECONDS)]
    assert "Ctrl-C again" in play.said[0]
    assert play.after(1, WorkerEnded(0, retired=True)) == [End(0)]


def test_a_second_ctrl_c_ends_at_once_with_130() -> None:
    play = Play().working()
    play.after(5, AskedToLeave())
    assert play.after(0.1, AskedToLeave()) == [KillWorker()]
    assert play.after(0.1, WorkerEnded(-9)) == [End(130)]


def test_a_worker_that_does_not_leave_in_time_is_ended() -> None:
    play = Play().working()
    play.after(5, AskedToLeave())
    assert play.after(LEAVE_SECONDS, PauseOver()) == [KillWorker()]
    assert play.after(0.1, WorkerEnded(-9)) == [End(0)]


def test_the_end_of_the_lifetime_is_a_leave_for_good() -> None:
    play = Play().working()
    assert play.after(5, LifetimeOver()) == [LetWorkerLeave(), Pause(LEAVE_SECONDS)]
    assert play.after(1, WorkerEnded(0)) == [End(0)]


def test_the_end_of_the_lifetime_does_not_kill_a_worker_that_is_leaving() -> None:
    play = Play().working()
    play.after(5, AskedToLeave())
    assert play.after(0.1, LifetimeOver()) == []


@pytest.mark.parametrize("event", [AskedToLeave(), LifetimeOver()])
def test_without_a_worker_leaving_takes_no_time(event: Event) -> None:
    looking = Play()
    looking.after(0, Begun())
    assert looking.after(1, event) == [End(0)]
    pausing = Play().working()
    pausing.after(1, WorkerEnded(0))
    assert pausing.after(0.1, event) == [End(0)]


def look_in_vain(play: Play, seconds: float) -> None:
    """Look as often as it wants to, for so long."""
    until = play.now + seconds
    found = play.after(0, Begun())
    while found == [Look()] and play.now < until:
        (pause,) = play.after(0.01, NobodyAnswers("connection refused"))
        if isinstance(pause, End):
            assert pause.status == 1
            return
        assert isinstance(pause, Pause)
        assert pause.seconds <= MAX_LOOK_PAUSE_SECONDS
        found = play.after(pause.seconds, PauseOver())


def test_an_address_where_nobody_answers_is_looked_at_for_ever_and_said_once_a_minute() -> None:
    play = Play()
    look_in_vain(play, 600)
    assert play.now > 1600
    assert 600 / (REMIND_SECONDS + MAX_LOOK_PAUSE_SECONDS) <= len(play.said) <= 11
    assert play.said[0] == f"No scheduler answers at {ADDRESS} (connection refused); trying on."
    assert "nobody for 60 s, still trying" in play.said[1] or "still trying" in play.said[1]


def test_wait_limits_how_long_nobody_may_answer() -> None:
    play = Play(wait_seconds=25)
    look_in_vain(play, 600)
    assert 1025 <= play.now < 1027
    assert "giving up after 25 s" in play.said[-1]
    at_once = Play(wait_seconds=0)
    at_once.after(0, Begun())
    assert at_once.after(0, NobodyAnswers("connection refused")) == [End(1)]


def test_wait_counts_from_when_the_scheduler_was_last_there() -> None:
    play = Play(wait_seconds=25).working()
    play.after(1000, WorkerEnded(0))
    play.after(1, PauseOver())
    assert play.after(0, NobodyAnswers("connection refused")) == [Pause(1.0)]


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("tcp://10.0.0.1:8786", ("tcp", "10.0.0.1", 8786)),
        ("10.0.0.1:8786", ("tcp", "10.0.0.1", 8786)),
        ("scheduler.example:1", ("tcp", "scheduler.example", 1)),
        ("tls://[::1]:8786", ("tls", "::1", 8786)),
        ("wss://host:443/", ("wss", "host", 443)),
    ],
)
def test_addresses_are_read_as_dask_reads_them(
    address: str, endpoint: tuple[str, str, int]
) -> None:
    assert scheduler_endpoint(address) == endpoint


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://host:8786", "'http' is none of the protocols"),
        ("tcp://host", "the port is missing"),
        ("tcp://host:", "the port is missing"),
        ("tcp://host:0", "the port is missing"),
        ("tcp://:8786", "like tcp://10.0.0.1:8786"),
        ("tcp://host:99999", "a number up to 65535"),
        ("tcp://host:port", "a number up to 65535"),
        ("tcp://a host:8786", "like tcp://10.0.0.1:8786"),
        ("tcp://host:8786/path", "like tcp://10.0.0.1:8786"),
        ("", "like tcp://10.0.0.1:8786"),
    ],
)
def test_wrong_addresses_are_refused_with_a_reason(address: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scheduler_endpoint(address)
