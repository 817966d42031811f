"""What is decided when stages and tokens are lost, event by event; no cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow.errors import WorkersLost
from dagflow.serving.mending import (
    Event,
    GiveUp,
    Instruction,
    Lacking,
    MakeRoom,
    Mending,
    NobodyCame,
    Place,
    Placed,
    Report,
    Resend,
    RoomMade,
    Send,
    Sent,
    SessionBack,
    StagesLost,
    TryAgain,
)


def told(mending: Mending, *events: Event) -> list[Instruction]:
    return [instruction for event in events for instruction in mending.handle(event)]


def test_a_lost_stage_is_placed_gets_room_and_is_sent_what_the_one_before_has() -> None:
    mending = Mending(3)
    assert told(mending, StagesLost("a", (1,))) == [Place(1, 1)]
    assert told(mending, Placed(1, "b")) == [MakeRoom(2)]
    assert told(mending, RoomMade(2)) == [Send(3, (1,), (Resend(1, (1,)),))]
    assert told(mending, Sent(3)) == []
    assert mending.is_idle


def test_neighbours_that_are_lost_together_are_sent_everything_once() -> None:
    mending = Mending(4)
    told(mending, StagesLost("a", (0, 2, 3)), Placed(1, "b"), Placed(2, "b"))
    assert told(mending, Placed(3, "c")) == [MakeRoom(4)]
    resends = (Resend(0, (0,)), Resend(2, (2, 3)))
    assert told(mending, RoomMade(4)) == [Send(5, (0, 2, 3), resends)]


def test_a_worker_that_leaves_before_it_is_known_that_it_has_a_stage_is_replaced() -> None:
    mending = Mending(2)
    assert told(mending, StagesLost("a", (1,)), StagesLost("b", ())) == [Place(1, 1)]
    assert told(mending, Placed(1, "b")) == [Place(2, 1)]
    assert told(mending, Placed(1, "b")) == []  # once more, and late
    assert told(mending, Placed(2, "c")) == [MakeRoom(3)]


def test_a_stage_that_is_lost_while_room_is_made_is_placed_before_anything_is_sent() -> None:
    mending = Mending(2)
    told(mending, StagesLost("a", (0,)), Placed(1, "b"))
    assert told(mending, StagesLost("b", (0, 1)), StagesLost("b", (0, 1))) == []
    assert told(mending, RoomMade(2)) == [Place(3, 0)]
    assert told(mending, Placed(3, "c"), Placed(4, "c")) == [Place(4, 1), MakeRoom(5)]
    assert told(mending, RoomMade(5)) == [Send(6, (0, 1), (Resend(0, (0, 1)),))]


def test_where_nobody_came_it_is_tried_again_when_there_is_a_reason_to() -> None:
    mending, error = Mending(1), WorkersLost("nobody")
    assert told(mending, StagesLost("a", (0,)), NobodyCame(1, error)) == [
        Place(1, 0),
        GiveUp(error),
    ]
    assert told(mending, SessionBack("x"), Lacking(0, ("y",))) == []
    assert told(mending, TryAgain()) == [Place(2, 0)]
    told(mending, Placed(2, "b"))
    # What had to wait goes with the rest; the new stage is sent all sessions in any case.
    wanted = (Resend(0, (0,)), Resend(0, (0,), ("x",)))
    assert told(mending, RoomMade(3)) == [Send(4, (0,), wanted)]


def test_what_comes_while_something_is_sent_is_sent_afterwards_and_once() -> None:
    mending = Mending(3)
    lacking = Lacking(2, ("b", "a"))
    assert told(mending, lacking) == [Send(1, (), (Resend(2, (2,), ("a", "b")),))]
    assert told(mending, lacking, lacking, Lacking(1, ("c",)), SessionBack("d")) == []
    resends = (
        Resend(1, (1,), ("c",)),
        Resend(2, (2,), ("a", "b")),
        Resend(0, (0, 1, 2), ("d",)),
    )
    assert told(mending, Sent(1)) == [Send(2, (), resends)]
    assert told(mending, Sent(1)) == []  # late
    assert told(mending, Sent(2)) == []


class World:
    """Workers, and what the instructions do to them; fails when one makes no sense."""

    def __init__(self, num_stages: int) -> None:
        self.mending = Mending(num_stages)
        self.owner: dict[int, str] = {stage: f"w{stage % 2}" for stage in range(num_stages)}
        self.has_past = dict.fromkeys(range(num_stages), True)
        self.workers = {"w0", "w1", "w2"}
        self.num_come = 3
        self.has_room = True
        self.open: Place | MakeRoom | Send | None = None
        self.reports: list[Report] = []
        self.owed: set[tuple[int, str]] = set()

    def tell(self, event: Event) -> None:
        for instruction in self.mending.handle(event):
            self._begin(instruction)
        for stage in self.has_past:
            assert (stage in self.mending.lost) or stage in self.owner or self._is_placing(stage)

    def _is_placing(self, stage: int) -> bool:
        return isinstance(self.open, Place) and self.open.stage == stage

    def _begin(self, instruction: Instruction) -> None:
        if isinstance(instruction, GiveUp):
            return
        assert self.open is None, "one thing at a time"
        self.open = instruction
        if isinstance(instruction, Place):
            assert instruction.stage not in self.owner, "nothing is rebuilt twice"
        elif isinstance(instruction, MakeRoom):
            assert set(self.owner) == set(self.has_past)
        else:
            assert self.has_room, "nothing is sent before there is room for it"
            for resend in instruction.resends:
                assert {resend.stage, *resend.rebuilt} <= set(self.owner), "somebody is there"
                if resend.sessions is None:
                    for stage in resend.rebuilt:
                        assert not self.has_past[stage], "nothing is rebuilt twice"
                        assert stage in instruction.routes
                        self.has_past[stage] = True
                        self.owed = {(s, name) for s, name in self.owed if s != stage}
                else:
                    named = set(resend.sessions)
                    self.owed -= {(s, name) for s in resend.rebuilt for name in named}

    def report(self) -> None:
        """Carry out what is open, if anything is."""
        done, self.open = self.open, None
        if isinstance(done, Place):
            if self.workers:
                self.owner[done.stage] = address = min(self.workers)
                self.has_past[done.stage], self.has_room = False, False
                self._tell(Placed(done.attempt, address))
            else:
                self._tell(NobodyCame(done.attempt, WorkersLost("nobody")))
        elif isinstance(done, MakeRoom):
            self.has_room = True
            self._tell(RoomMade(done.attempt))
        elif done is not None:
            self._tell(Sent(done.attempt))

    def _tell(self, report: Report) -> None:
        self.reports.append(report)
        self.tell(report)

    def leave(self, number: int) -> None:
        if self.workers:
            self._leave(sorted(self.workers)[number % len(self.workers)])

    def _leave(self, address: str) -> None:
        self.workers.discard(address)
        stages = tuple(stage for stage, owner in self.owner.items() if owner == address)
        for stage in stages:
            del self.owner[stage]
        self.tell(StagesLost(address, stages))
        self.tell(StagesLost(address, stages))

    def leave_with_new(self, number: int) -> None:
        """A worker takes the stage that is being placed, and leaves before anybody hears of it."""
        if isinstance(self.open, Place) and self.workers:
            done, address = self.open, sorted(self.workers)[number % len(self.workers)]
            self.owner[done.stage] = address
            self.has_past[done.stage], self.has_room = False, False
            self._leave(address)
            self.open = None
            self._tell(Placed(done.attempt, address))

    def come(self) -> None:
        self.workers.add(f"w{self.num_come}")
        self.num_come += 1
        self.tell(TryAgain())

    def lack(self, number: int) -> None:
        stage, session = number % len(self.has_past), f"s{number % 3}"
        if stage in self.owner:
            self.owed.add((stage, session))
            self.tell(Lacking(stage, (session,)))

    def back(self, number: int) -> None:
        self.owed |= {(stage, f"s{number % 3}") for stage in self.has_past}
        self.tell(SessionBack(f"s{number % 3}"))

    def repeat(self, number: int) -> None:
        """A report comes once more, much later."""
        if self.reports:
            self.tell(self.reports[number % len(self.reports)])


_MOVES = st.tuples(
    st.sampled_from(
        ["report", "report", "leave", "leave_with_new", "come", "lack", "back", "repeat"]
    ),
    st.integers(0, 11),
)


@pytest.mark.parametrize("num_stages", [1, 4])
@settings(max_examples=400, deadline=None)
@given(moves=st.lists(_MOVES, max_size=40))
def test_whatever_happens_every_stage_ends_with_one_owner_that_has_been_sent_its_past_once(
    num_stages: int, moves: list[tuple[str, int]]
) -> None:
    world = World(num_stages)
    for what, number in moves:
        if what in ("report", "come"):
            getattr(world, what)()
        else:
            getattr(world, what)(number)
    world.come()
    for _ in range(20 * num_stages):
        world.report()
    assert world.mending.is_idle
    assert set(world.owner) == set(range(num_stages))
    assert set(world.owner.values()) <= world.workers
    assert all(world.has_past.values())
    assert not world.owed
    assert not world.mending.lost | world.mending.bare
