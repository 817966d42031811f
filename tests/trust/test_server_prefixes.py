"""Who may go on from what was computed for whom; no cluster."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from dagflow.plan.serving_memory import Room
from dagflow.serving.answers import Request
from dagflow.serving.pool import LEAST_SHARED_TOKENS, CachePool, Holder
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS

PROMPT = list(range(2 * LEAST_SHARED_TOKENS))


class Decided:
    """A pool of sessions, and what it has decided."""

    def __init__(self) -> None:
        self.shared: list[tuple[Holder, Holder, int]] = []
        self.taken: list[tuple[Holder, int]] = []
        self.pool: CachePool[Holder] = CachePool(
            True,
            lambda source, new, length: self.shared.append((source, new, length)),
            lambda kept, length: self.taken.append((kept, length)),
            lambda holder: self.pool.forgotten(self.pool.leave(holder)),
        )
        self.pool.resize(Room(64 * BLOCK_TOKENS))

    async def computed(self, owner: str) -> Holder:
        """Return a session that has computed the prompt."""
        holder = await self.pool.admit(Holder(owner=owner), BLOCK_TOKENS)
        holder.tokens = list(PROMPT)
        holder.num_computed = holder.most_tokens = len(PROMPT)
        return holder

    async def ask(self, owner: str) -> Holder:
        return await self.pool.admit(Holder(owner=owner), BLOCK_TOKENS, PROMPT)


def test_a_session_goes_on_from_none_of_another_owner_running_or_kept() -> None:
    async def scenario() -> None:
        decided = Decided()
        theirs = await decided.computed("theirs")
        for is_kept in (False, True):
            if is_kept:
                assert decided.pool.keep(theirs)
            for owner in ("mine", ""):
                assert not (await decided.ask(owner)).tokens
        assert decided.shared == decided.taken == []
        assert decided.pool.state.num_hits == decided.pool.state.hit_tokens == 0

    asyncio.run(scenario())


def test_of_several_owners_the_own_session_is_found() -> None:
    async def scenario() -> None:
        decided = Decided()
        theirs, mine = await decided.computed("theirs"), await decided.computed("mine")
        for holder in (mine, theirs):
            assert decided.pool.keep(holder)
        await decided.ask("mine")
        ((source, new, length),) = decided.shared
        assert (source, new.owner, length) == (mine, "mine", len(PROMPT) - 1)

    asyncio.run(scenario())


def test_whose_a_request_is_is_kept_nowhere() -> None:
    request = Request((1, 2), 3)
    owned = replace(request, owner="somebody")
    assert owned.to_json() == request.to_json()
    assert Request.from_json(owned.to_json(), "name").owner == ""
