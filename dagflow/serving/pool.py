"""Who may keep how many tokens on the workers, who waits, and whose tokens others go on from.

All stages keep the same tokens, so one count stands for all workers. A long session counts for less
than its tokens where layers have windows, and any session for more where layers have states
(`Room.taken`). Decides only: messages are its user's business. Of one event loop.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from dagflow.errors import CacheFull, RequestTooLarge
from dagflow.plan.serving_memory import Room
from dagflow_tasks.kernels.session_cache import whole_blocks

# Fewer tokens are computed faster than their caches are copied.
LEAST_SHARED_TOKENS = 16
# More would be looked through for too long.
_MOST_KEPT = 1024


@dataclass(eq=False)
class Holder:
    """A session, as far as its room is concerned.

    Attributes
    ----------
    tokens : list of int
        Everything that was sent.
    num_computed : int
        The first tokens that all stages have computed.
    most_tokens : int
        How many there ever were: caches don't shrink when a session is rewound.
    reserved : int
        How many tokens it may have without asking, over all its sequences.
    num_sequences : int
        How many sequences share them: with beams, those of others that come and go with it.
    by_hand : bool
        Whether it grows as its owner likes, and ends when that one likes.
    ticket : int
        Its place in the order in which sessions came.
    owner : str
        Whose it is: only sessions of the same owner go on from its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    most_tokens: int = 0
    reserved: int = 0
    num_sequences: int = 1
    by_hand: bool = False
    ticket: int = -1
    owner: str = ""


Some = TypeVar("Some", bound=Holder)


@dataclass(frozen=True)
class CacheState:
    """How full the caches are, and how often they helped.

    Attributes
    ----------
    capacity_tokens : int
        What all sessions together may have.
    used_tokens : int
        Reserved for sessions.
    kept_tokens : int
        Of sessions that have ended, kept for others that begin with the same tokens.
    num_waiting : int
        Sessions that wait for room.
    num_hits, hit_tokens : int
        Sessions that went on from another's tokens, and how many these were.
    """

    capacity_tokens: int
    used_tokens: int
    kept_tokens: int
    num_waiting: int
    num_hits: int
    hit_tokens: int


@dataclass(eq=False)
class _Waiting(Generic[Some]):
    rank: tuple[bool, int]
    holder: Some
    need: int
    prompt: Sequence[int]
    patient: bool
    granted: asyncio.Future[Some]

    def __lt__(self, other: _Waiting[Some]) -> bool:
        return self.rank < other.rank


class CachePool(Generic[Some]):
    """Shares the room for tokens out among sessions.

    Sessions that say what they may need wait for it in the order in which they came: nobody is
    overtaken, so long ones have their turn, too. Those fed by hand get what is left, or an error.
    What ended sessions have left is kept while nobody needs the room; the longest unused goes first.

    Parameters
    ----------
    reuse : bool
        Whether to keep ended sessions, and let new ones go on from tokens that are there.
    fork, take_over, drop : callable
        Called with what was decided: that a new session gets the first tokens of another, that a
        kept session is one again and goes on from a position, and that one is to be forgotten. For
        that the user calls `leave`, and later `forgotten`.
    """

    def __init__(
        self,
        reuse: bool,
        fork: Callable[[Some, Some, int], None],
        take_over: Callable[[Some, int], None],
        drop: Callable[[Some], object],
    ) -> None:
        self.room = Room(0)
        self._reuse = reuse
        self._fork, self._take_over, self._drop = fork, take_over, drop
        self._holders: list[Some] = []
        self._kept: list[Some] = []  # the longest unused first
        self._leavers: list[tuple[int, int]] = []  # tokens and sequences
        self._waiting: list[_Waiting[Some]] = []
        self._settled = asyncio.Event()
        self._tickets = count()
        self._num_hits = self._hit_tokens = 0

    @property
    def capacity(self) -> int:
        return self.room.capacity

    @property
    def state(self) -> CacheState:
        return CacheState(
            self.capacity,
            self._used,
            self._num_kept,
            len(self._waiting),
            self._num_hits,
            self._hit_tokens,
        )

    def check(self, num_tokens: int, num_sequences: int = 1) -> None:
        """Raise `RequestTooLarge` if so many tokens, over all sequences, could never be had."""
        if self._cost(whole_blocks(num_tokens), num_sequences) > self.capacity:
            raise RequestTooLarge(
                f"The request may need {num_tokens} tokens, prompt and answer, and the workers' "
                f"caches hold {self.room.longest}: shorten the prompt, ask for fewer new tokens, or give "
                "the caches more memory."
            )

    async def admit(self, holder: Some, num_tokens: int, prompt: Sequence[int] = ()) -> Some:
        """Wait for the turn of a session that may have so many tokens; return it, or its like.

        That is a kept one which the prompt begins with.

        Raises
        ------
        RequestTooLarge
            If it could never be its turn.
        CacheFull
            If sessions fed by hand hold too much, or workers have left.
        """
        self.check(num_tokens, holder.num_sequences)
        holder.ticket = next(self._tickets)
        return await self._wait(holder, num_tokens, prompt, patient=True)

    async def readmit(self, holder: Some, num_tokens: int) -> None:
        """Wait for room for a session that had to give its own back; it comes before later ones."""
        await self._wait(holder, num_tokens, (), patient=True)

    async def extend(self, holder: Some, num_tokens: int) -> None:
        """Let a session fed by hand have so many tokens in all, now.

        Raises
        ------
        CacheFull
            If that isn't left, even if nothing is kept.
        """
        if whole_blocks(num_tokens) <= holder.reserved:
            return
        if holder.ticket < 0:
            holder.ticket, holder.by_hand = next(self._tickets), True
        await self._wait(holder, num_tokens, (), patient=False)

    def leave(self, holder: Some) -> int:
        """Take a session out; return how many tokens are `forgotten` once its stages say so."""
        for waiting in self._waiting:
            if waiting.holder is holder and not waiting.granted.done():
                waiting.granted.set_exception(CacheFull("The session has left."))
        reserved, holder.reserved = holder.reserved, 0
        if holder in self._holders:
            self._holders.remove(holder)
        if holder in self._kept:
            self._kept.remove(holder)
        self._leavers.append((reserved, holder.num_sequences))
        return reserved

    def forgotten(self, num_tokens: int) -> None:
        """Hear that stages have forgotten tokens of a session that has left."""
        self._leavers.remove(next(one for one in self._leavers if one[0] == num_tokens))
        if self._used + self._leaving <= self.capacity:
            self._settled.set()
        self._turn()

    def keep(self, holder: Some) -> bool:
        """Keep what a session that has ended has computed; False if it is of no use."""
        if not self._reuse or holder.num_computed < LEAST_SHARED_TOKENS:
            return False
        self._holders.remove(holder)
        holder.reserved, holder.num_sequences = whole_blocks(holder.most_tokens), 1
        self._kept.append(holder)
        if len(self._kept) > _MOST_KEPT:
            self._drop(self._kept[0])
        self._turn()
        return True

    def drop_kept(self) -> None:
        """Keep nothing of what is kept now."""
        for holder in list(self._kept):
            self._drop(holder)

    def resize(self, room: Room) -> list[Some]:
        """Take another room; return sessions that must leave for it, the latest first."""
        self.room = room
        if self._used + self._num_kept > self.capacity:
            self.drop_kept()
        over = self._used - self.capacity
        leaving: list[Some] = []
        for holder in sorted(self._holders, key=lambda h: -h.ticket):
            if over > 0:
                leaving.append(holder)
                over -= self._taken(holder)
        self._turn()
        return leaving

    async def settle(self) -> None:
        """Wait until what has left, and what is there, is no more than the capacity."""
        while self._used + self._leaving > self.capacity:
            self._settled.clear()
            await self._settled.wait()

    def fail(self, error: Exception) -> None:
        """Let all who wait hear that nothing comes."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.granted.done():
                one.granted.set_exception(error)

    def _taken(self, *holders: Holder) -> int:
        return sum(self._cost(holder.reserved, holder.num_sequences) for holder in holders)

    def _cost(self, num_tokens: int, num_sequences: int = 1) -> int:
        """Return what sequences of so many tokens together take of the capacity."""
        return num_sequences * self.room.taken(num_tokens // num_sequences)

    @property
    def _used(self) -> int:
        return self._taken(*self._holders)

    @property
    def _num_kept(self) -> int:
        return self._taken(*self._kept)

    @property
    def _leaving(self) -> int:
        return sum(self._cost(*leaver) for leaver in self._leavers)

    @property
    def _free(self) -> int:
        return self.capacity - self._used - self._num_kept - self._leaving

    async def _wait(
        self, holder: Some, num_tokens: int, prompt: Sequence[int], patient: bool
    ) -> Some:
        granted: asyncio.Future[Some] = asyncio.get_running_loop().create_future()
        need = whole_blocks(num_tokens)
        rank = (patient, holder.ticket)
        insort(self._waiting, _Waiting(rank, holder, need, prompt, patient, granted))
        self._turn()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._drop(granted.result())  # its turn had come in the same moment
            self._turn()
            raise

    def _turn(self) -> None:
        """Let in whoever comes first, as long as there is room for it."""
        while self._waiting:
            first = self._waiting[0]
            if not first.granted.done():
                error = self._refusal(first)
                source, shared = self._source(first.prompt, first.holder.owner)
                if error is not None:
                    first.granted.set_exception(error)
                elif self._has_room(first, source):
                    self._grant(first, source, shared)
                else:
                    return
            self._waiting.remove(first)

    def _refusal(self, first: _Waiting[Some]) -> Exception | None:
        need = self._cost(first.need, first.holder.num_sequences)
        more = need - self._taken(first.holder)
        by_hand = self._taken(*(h for h in self._holders if h.by_hand))
        if not first.patient:
            left = self._free + self._leaving + self._num_kept
            if more > left:
                return CacheFull(
                    f"The session would have {first.need} tokens, {more} more than it has room for, "
                    f"and {left} of {self.capacity} are left: rewind it, close others, or give the "
                    "caches more memory."
                )
        elif need > self.capacity - by_hand:
            return CacheFull(
                f"{first.need} tokens are wanted, and the workers' caches hold {self.capacity}, "
                f"{by_hand} of them of sessions that are fed by hand: close some, or wait for workers."
            )
        return None

    def _source(self, prompt: Sequence[int], owner: str) -> tuple[Some | None, int]:
        """Return which session has computed most of a prompt's beginning, and how many tokens of it.

        Others' sessions are passed over: from whether a prompt had to be computed, and how long that
        took, its sender could read what they hold, a token at a time.
        """
        best, most = None, LEAST_SHARED_TOKENS - 1
        if not self._reuse or len(prompt) <= LEAST_SHARED_TOKENS:
            return None, 0
        # The last token's logits are wanted, so it is computed in any case.
        usable, reach = list(prompt[:-1]), self.room.reach
        for holder in [*reversed(self._kept), *self._holders]:
            if holder.owner != owner:
                continue
            shared = min(common(usable, holder.tokens), holder.num_computed)
            if shared > most and (reach is None or len(holder.tokens) - shared <= reach):
                best, most = holder, shared
        return best, most if best is not None else 0

    def _has_room(self, first: _Waiting[Some], source: Some | None) -> bool:
        """Tell whether there is room now; if there will be without what is kept, have that dropped."""
        more = self._cost(first.need, first.holder.num_sequences) - self._taken(first.holder)
        if more <= self._free:
            return True
        others = [holder for holder in self._kept if holder is not source]
        missing = more - self._free - self._leaving
        if missing > self._taken(*others) and source in self._kept:
            assert source is not None
            more -= self._taken(source)  # it is taken over itself
            missing -= self._taken(source)
        if missing > self._taken(*others):
            return False
        for holder in others:
            if missing > 0:
                missing -= self._taken(holder)
                self._drop(holder)
        return more <= self._free

    def _grant(self, first: _Waiting[Some], source: Some | None, shared: int) -> None:
        holder = first.holder
        if source is not None:
            self._num_hits += 1
            self._hit_tokens += shared
            whole = shared == len(source.tokens)
            need = self._cost(first.need, holder.num_sequences)
            if source in self._kept and (whole or need > self._free):
                self._kept.remove(source)
                source.num_sequences = holder.num_sequences
                source.ticket, holder = holder.ticket, source
                self._take_over(source, shared)
            else:
                if source in self._kept:
                    self._kept.remove(source)
                    self._kept.append(source)  # used just now
                self._fork(source, holder, shared)
        holder.reserved = max(first.need, whole_blocks(holder.most_tokens))
        if holder not in self._holders:
            self._holders.append(holder)
        first.granted.set_result(holder)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike.

    >>> common([1, 2, 3], [1, 2, 4, 5]), common([1], [1, 2]), common([], [1])
    (2, 1, 0)
    """
    shortest = min(len(one), len(other))
    low, step = 0, LEAST_SHARED_TOKENS
    # Slices are compared much faster than tokens; most sequences differ in their first ones.
    while low < shortest and one[low : low + step] == other[low : low + step]:
        low, step = low + step, 2 * step
    low = min(low, shortest)
    while low < shortest and one[low] == other[low]:
        low += 1
    return low
