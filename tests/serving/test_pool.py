"""Who gets room in the caches, who waits, and who goes on from whose tokens; no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dagflow.errors import CacheFull, RequestTooLarge
from dagflow.plan import serving_memory
from dagflow.serving.pool import LEAST_SHARED_TOKENS, CachePool, Holder, common
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS
from dagflow_tasks.kernels.states import REACH_TOKENS

ONE = BLOCK_TOKENS
PROMPT = list(range(LEAST_SHARED_TOKENS + 4))


class Room(CachePool[Holder]):
    """A pool whose decisions are noted, and carried out when a test says so."""

    def __init__(self, blocks: int, reuse: bool = True) -> None:
        self.decided: list[tuple[Any, ...]] = []
        self.dropped: list[int] = []
        super().__init__(reuse, self.shared, self.taken_over, self.drop)
        self.resize(serving_memory.Room(blocks * ONE))

    def shared(self, source: Holder, new: Holder, length: int) -> None:
        self.decided.append(("fork", source, length))
        new.tokens, new.num_computed = source.tokens[:length], length

    def taken_over(self, kept: Holder, length: int) -> None:
        self.decided.append(("take over", kept, length))
        del kept.tokens[length:]

    def drop(self, holder: Holder) -> None:
        self.decided.append(("drop", holder))
        self.dropped.append(self.leave(holder))

    def carry_out(self) -> None:
        while self.dropped:
            self.forgotten(self.dropped.pop())

    def end(self, holder: Holder) -> None:
        self.forgotten(self.leave(holder))

    def computed(self, holder: Holder, tokens: list[int]) -> Holder:
        holder.tokens = list(tokens)
        holder.num_computed = holder.most_tokens = len(tokens)
        return holder


def scenario(blocks: int, **options: Any) -> Callable[..., Callable[[], None]]:
    """Run a test on a loop, with a pool of so many blocks."""

    def decorate(test: Callable[[Room], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def run() -> None:
            await test(Room(blocks, **options))

        def wrapped() -> None:
            asyncio.run(run())

        wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
        return wrapped

    return decorate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@scenario(4)
async def test_nobody_is_overtaken_and_long_ones_have_their_turn(room: Room) -> None:
    first, second = [await room.admit(Holder(), 2 * ONE) for _ in "ab"]
    admitted: list[str] = []

    async def ask(name: str, num_tokens: int) -> None:
        await room.admit(Holder(), num_tokens)
        admitted.append(name)

    tasks = [asyncio.create_task(ask("long", 3 * ONE)), asyncio.create_task(ask("short", 1))]
    await settle()
    room.end(first)
    await settle()
    assert admitted == []  # the short one has to wait for the long one
    assert room.state.num_waiting == 2
    room.end(second)
    await asyncio.gather(*tasks)
    assert admitted == ["long", "short"]
    assert room.state.used_tokens == 4 * ONE


@scenario(4)
async def test_what_can_never_fit_is_refused_with_the_numbers(room: Room) -> None:
    with pytest.raises(RequestTooLarge, match=f"{4 * ONE + 1} tokens.*{4 * ONE}"):
        await room.admit(Holder(), 4 * ONE + 1)
    await room.admit(Holder(), 4 * ONE)


@scenario(2)
async def test_who_stops_waiting_lets_the_next_one_in(room: Room) -> None:
    await room.admit(Holder(), ONE)
    long = asyncio.create_task(room.admit(Holder(), 2 * ONE))
    short = asyncio.create_task(room.admit(Holder(), ONE))
    await settle()
    long.cancel()
    await short
    assert room.state.used_tokens == 2 * ONE


@scenario(1)
async def test_who_stops_waiting_in_the_moment_of_its_turn_takes_no_room(room: Room) -> None:
    first = await room.admit(Holder(), 1)
    second = asyncio.create_task(room.admit(Holder(), 1))
    await settle()
    room.end(first)
    second.cancel()
    await settle()
    room.carry_out()
    assert room.state.used_tokens == 0
    await room.admit(Holder(), 1)


@scenario(3)
async def test_sessions_fed_by_hand_get_what_is_left_or_an_error(room: Room) -> None:
    hand = Holder()
    await room.extend(hand, 1)
    await room.admit(Holder(), ONE)
    await room.extend(hand, ONE + 1)
    with pytest.raises(CacheFull, match="0 of"):
        await room.extend(hand, 2 * ONE + 1)
    assert hand.reserved == 2 * ONE
    # Nobody knows when it ends: who would have to wait for it isn't left waiting.
    with pytest.raises(CacheFull, match="fed by hand"):
        await room.admit(Holder(), 2 * ONE)


@scenario(3)
async def test_what_is_kept_goes_when_somebody_needs_the_room_the_oldest_first(room: Room) -> None:
    kept = []
    for number in range(3):
        holder = await room.admit(Holder(), ONE)
        kept.append(room.computed(holder, [number + 50, *PROMPT]))
        assert room.keep(holder)
    assert (room.state.kept_tokens, room.state.used_tokens) == (3 * ONE, 0)
    new = asyncio.create_task(room.admit(Holder(), 2 * ONE))
    await settle()
    assert room.decided == [("drop", kept[0]), ("drop", kept[1])]
    assert not new.done()  # the stages haven't forgotten them yet
    room.carry_out()
    await new
    assert (room.state.kept_tokens, room.state.used_tokens) == (ONE, 2 * ONE)


@scenario(2)
async def test_nothing_is_dropped_for_somebody_who_has_to_wait_all_the_same(room: Room) -> None:
    kept = room.computed(await room.admit(Holder(), ONE), PROMPT)
    room.keep(kept)
    await room.admit(Holder(), ONE)
    waiting = asyncio.create_task(room.admit(Holder(), 2 * ONE))
    await settle()
    assert room.decided == []
    waiting.cancel()


@scenario(4)
async def test_a_prompt_goes_on_from_whoever_has_most_of_it(room: Room) -> None:
    short = room.computed(await room.admit(Holder(), ONE), PROMPT)
    long = room.computed(await room.admit(Holder(), ONE), [*PROMPT, 7, 8, 9])
    room.keep(short)
    new = await room.admit(Holder(), ONE, [*PROMPT, 7, 8, 1])
    assert room.decided == [("fork", long, len(PROMPT) + 2)]
    assert new.num_computed == len(PROMPT) + 2
    assert (room.state.num_hits, room.state.hit_tokens) == (1, len(PROMPT) + 2)


@scenario(4)
async def test_only_what_all_stages_have_computed_is_shared(room: Room) -> None:
    source = room.computed(await room.admit(Holder(), ONE), PROMPT)
    source.num_computed = LEAST_SHARED_TOKENS + 1
    await room.admit(Holder(), ONE, [*PROMPT, 1])
    assert room.decided == [("fork", source, LEAST_SHARED_TOKENS + 1)]


@scenario(4)
async def test_the_last_token_of_a_prompt_is_computed_in_any_case(room: Room) -> None:
    source = room.computed(await room.admit(Holder(), ONE), PROMPT)
    await room.admit(Holder(), ONE, PROMPT)
    assert room.decided == [("fork", source, len(PROMPT) - 1)]


@scenario(4)
async def test_a_kept_session_that_is_the_beginning_is_gone_on_with(room: Room) -> None:
    kept = room.computed(await room.admit(Holder(), ONE), PROMPT)
    room.keep(kept)
    assert await room.admit(Holder(), ONE, [*PROMPT, 1]) is kept
    assert room.decided == [("take over", kept, len(PROMPT))]
    assert (room.state.kept_tokens, room.state.used_tokens) == (0, ONE)


@scenario(2)
async def test_without_room_for_a_copy_a_kept_session_is_cut_short(room: Room) -> None:
    kept = room.computed(await room.admit(Holder(), ONE + 1), [*PROMPT, *range(40, 60)])
    room.keep(kept)
    assert await room.admit(Holder(), 1, [*PROMPT, 1]) is kept
    assert room.decided == [("take over", kept, len(PROMPT))]
    assert kept.reserved == 2 * ONE  # caches don't shrink


@scenario(4, reuse=False)
async def test_switched_off_nothing_is_kept_or_shared(room: Room) -> None:
    source = room.computed(await room.admit(Holder(), ONE), PROMPT)
    await room.admit(Holder(), ONE, [*PROMPT, 1])
    assert not room.keep(source)
    assert room.decided == []


@scenario(4)
async def test_with_less_capacity_the_latest_sessions_leave_and_come_back_first(room: Room) -> None:
    holders = [await room.admit(Holder(), ONE) for _ in range(4)]
    waiting = asyncio.create_task(room.admit(Holder(), ONE))
    await settle()
    leaving = room.resize(serving_memory.Room(2 * ONE))
    assert leaving == [holders[3], holders[2]]
    numbers = [room.leave(holder) for holder in leaving]
    settled = asyncio.create_task(room.settle())
    back = [asyncio.create_task(room.readmit(holder, ONE)) for holder in leaving]
    await settle()
    assert not settled.done()
    for number in numbers:
        room.forgotten(number)
    await settled
    room.end(holders[0])
    await back[1]  # the earlier one of them
    assert not back[0].done()
    room.end(holders[1])
    await back[0]
    assert not waiting.done()
    room.end(holders[2])
    await waiting


@scenario(4)
async def test_who_comes_back_and_can_never_fit_hears_of_it(room: Room) -> None:
    holder = await room.admit(Holder(), 3 * ONE)
    assert room.resize(serving_memory.Room(2 * ONE)) == [holder]
    room.forgotten(room.leave(holder))
    with pytest.raises(CacheFull, match=f"{3 * ONE} tokens are wanted.*{2 * ONE}"):
        await room.readmit(holder, 3 * ONE)


@scenario(4)
async def test_with_states_only_what_can_be_gone_back_to_is_shared(room: Room) -> None:
    room.resize(serving_memory.Room(40 * ONE, session_tokens=ONE))
    source = room.computed(
        await room.admit(Holder(), ONE), [*PROMPT, *range(40, 40 + REACH_TOKENS)]
    )
    assert room.state.used_tokens == 2 * ONE
    room.end(await room.admit(Holder(), ONE, [*PROMPT, 1]))
    assert room.decided == [("fork", source, len(PROMPT))]
    source.tokens.append(7)
    await room.admit(Holder(), ONE, [*PROMPT, 2])
    assert len(room.decided) == 1


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("more", [0, 1, 40])
def test_common_counts_equal_tokens(length: int, more: int) -> None:
    one = list(range(length))
    assert common([*one, *[-1] * more], [*one, *[-2] * more]) == length
    assert common([*one, *[-1] * more], one) == length
