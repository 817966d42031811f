"""Carries out what `mending` decides, one instruction after the other. On the client's loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from dagflow.errors import WorkersLost
from dagflow.serving.live import Live, to_send_again
from dagflow.serving.mending import (
    Event,
    Instruction,
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
)
from dagflow.serving.passes import Passes
from dagflow.serving.placement import Placement
from dagflow_tasks.decode.decoder_stage import Part


class Repairs:
    """Has lost stages placed again, and sent again what they lack.

    Parameters
    ----------
    placement : Placement
    lives : mapping
        Sessions by name.
    passes : Passes
    make_room : callable
        Awaited to give caches the room that there is where the stages are now.
    fail : callable
        Gets the error that all who wait are to hear.
    placed : callable
        Is told of a stage that has been opened on another worker, and of its address.
    spawn : callable
        Begins a coroutine whose errors somebody hears of.
    """

    def __init__(
        self,
        placement: Placement,
        lives: Mapping[str, Live],
        passes: Passes,
        make_room: Callable[[], Awaitable[None]],
        fail: Callable[[WorkersLost], None],
        placed: Callable[[int, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._placement = placement
        self._lives = lives
        self._passes = passes
        self._make_room, self._fail, self._spawn = make_room, fail, spawn
        self._placed = placed
        self._mending = Mending(len(placement.needs))
        self._instructions: deque[Instruction] = deque()
        self._is_finished = asyncio.Event()
        self._is_finished.set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being mended."""
        return self._is_finished.is_set()

    async def finished(self) -> None:
        """Wait until nothing is being mended, or nobody is there to take a stage."""
        await self._is_finished.wait()

    def about(self, event: Event) -> None:
        """Decide what is done about an event, and begin to do it."""
        self._instructions += self._mending.handle(event)
        if self._instructions and self.is_idle:
            self._is_finished.clear()
            self._spawn(self._carry_out())

    async def _carry_out(self) -> None:
        try:
            while self._instructions:
                report = await self._do(self._instructions.popleft())
                if report is not None:
                    self._instructions += self._mending.handle(report)
        except BaseException:
            self._mending.abandon()
            raise
        finally:
            self._is_finished.set()

    async def _do(self, instruction: Instruction) -> Report | None:
        """Carry out an instruction, and return what became of it."""
        match instruction:
            case Place(attempt, stage):
                try:
                    address = await self._placement.replace(stage)
                    self._placed(stage, address)
                    return Placed(attempt, address)
                except WorkersLost as error:
                    return NobodyCame(attempt, error)
            case MakeRoom(attempt):
                await self._make_room()
                return RoomMade(attempt)
            case Send(attempt, routes, resends):
                for stage in routes:
                    await self.route(stage)
                for resend in resends:
                    await self._resend(resend)
                return Sent(attempt)
            case _:
                self._fail(instruction.error)
                return None

    async def route(self, stage: int) -> None:
        """Tell a stage where its successor is."""
        following = (*self._placement.addresses, "")[stage + 1]
        await self._placement.tell(stage, {"kind": "route", "following": following or None})

    async def _resend(self, resend: Resend) -> None:
        """Have a stage sent again what it has got so far."""
        for name in resend.sessions or ():
            live = self._lives.get(name)
            if live is not None and live.is_away and live.reserved:
                live.is_away, live.most_tokens = False, len(live.tokens)
        lives = to_send_again(self._lives.values(), resend.sessions)
        if resend.sessions is None:
            for live in lives:
                live.num_unmoved = 0
        if resend.stage == 0:
            # While one is being sent others are fed, or rewound: each as it is when its turn comes.
            for live in lives:
                part = Part(live.name, live.epoch, 0, len(live.tokens), *live.still_wanted())
                if part.count:
                    await self._passes.send([part], live.tokens, resend.rebuilt)
        elif following := self._placement.addresses[resend.stage]:
            message = {
                "kind": "resend",
                "following": following,
                "sessions": [(live.name, *live.still_wanted()) for live in lives],
                "rebuilt": list(resend.rebuilt),
            }
            await self._placement.tell(resend.stage - 1, message)
