"""The driver's side of sessions: sends their tokens, hears the answers, and mends what breaks.

All of it runs on the event loop of the dask client. A pass goes from stage to stage without coming
back, and the last stage answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence

import torch
from distributed import Client

from dagflow.errors import (
    CacheFull,
    DagflowError,
    NoProgress,
    SettingsInvalid,
    TaskFailed,
)
from dagflow.models.model import Model
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow.serving.forgetting import Forgetting
from dagflow.serving.live import Live, Step
from dagflow.serving.mending import Lacking, SessionBack, StagesLost, TryAgain
from dagflow.serving.pace import Pace
from dagflow.serving.passes import Passes
from dagflow.serving.placement import Placement
from dagflow.serving.pool import CachePool
from dagflow.serving.repairing import Repairs
from dagflow.swarm.events import Announcer, StagePlaced, WorkerLeft
from dagflow.swarm.links import Message
from dagflow.swarm.on_loop import OnLoop
from dagflow_tasks.decode.decoder_stage import ALL, LAST, NOTHING, Part

_LOGGER = logging.getLogger(__name__)
_CHUNK_TOKENS = 256
_LOOK_SECONDS = 0.5
_NO_ROOM = (
    "Workers have left, and the caches of those left have no room for the session now: try again "
    "later, or close others."
)


class Engine(OnLoop):
    """One model on one swarm. Coroutines run on the client's loop; the rest may be called anywhere.

    Parameters
    ----------
    model : Model
    client : Client
    num_stages : int
    wait_seconds : float
        How long to wait for workers when too few are left.
    cache_bytes : int, optional
        What sessions' caches may take on a worker; see `dagflow.plan.memory.worker_bytes`.
    prefix_reuse : bool
        Whether sessions go on from tokens that others have computed.

    Attributes
    ----------
    pool : CachePool
        Who may keep how many tokens on the workers.
    num_fed : int
        How often tokens were sent through the stages.
    num_refused : int
        How often workers have refused somebody who said to be the driver, or a stage.
    pace : Pace
    """

    def __init__(
        self,
        model: Model,
        client: Client,
        num_stages: int,
        *,
        wait_seconds: float = 60.0,
        cache_bytes: int | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        super().__init__(client)
        self.model = model
        self.name = uuid.uuid4().hex[:8]
        self.cut = cut_at_layers(model.dag, num_stages)
        self.num_fed = 0
        self.num_refused = 0
        self.pool: CachePool[Live] = CachePool(
            prefix_reuse, self._share, self._take_over, self._drop
        )
        self._forgetting = Forgetting(self.pool.forgotten)
        self.pace = Pace()
        self.placement = Placement(
            self.name,
            model,
            self.cut,
            client,
            wait_seconds=wait_seconds,
            cache_bytes=cache_bytes,
            hear=self._hear,
            lost=self._left,
            came=self._came,
            note=self.events.note,
            spawn=self.spawn,
        )
        self.events.listen(Announcer(client, {"deployment": self.name}))
        self._live: dict[str, Live] = {}
        self._passes = Passes(self.placement, self._live, self.spawn)
        self._repairs = Repairs(
            self.placement,
            self._live,
            self._passes,
            self._make_room,
            self.fail,
            self._placed,
            self.spawn,
        )

    # From any thread

    def start(self) -> None:
        """Place and open the stages; spares read weights meanwhile and afterwards.

        Raises
        ------
        WorkersLost
            If there is no worker.
        StageTooLarge
            If the workers can't hold the model.
        """
        self.placement.start()
        self.call(self._begin())

    def close(self) -> None:
        """End all sessions and forget the stages."""
        if self._close(self._end()):
            self.placement.stop()

    # On the loop

    async def _begin(self) -> None:
        await self.placement.place()
        for stage, address in enumerate(self.placement.addresses):
            self._placed(stage, address)
        self._resize()
        for stage in range(len(self.cut)):
            await self._repairs.route(stage)
        self.placement.look_after()
        self.spawn(self._look_after_requests())
        if missing := self.placement.missing():
            self._repairs.about(StagesLost("", tuple(missing)))
            await self._repairs.finished()

    async def _end(self) -> None:
        """End everything."""
        self.fail(TaskFailed("The model was closed."))
        self._live.clear()
        await self.placement.end()
        await self._cancel_all()

    def fail(self, error: Exception) -> None:
        """Let all who wait, for room or for tokens, hear that nothing comes."""
        self.pool.fail(error)
        for live in self._live.values():
            live.give_up(error)

    async def _look_after_requests(self) -> None:
        """Send tokens again that have been under way for too long, and then give them up.

        Looks are counted rather than seconds: if it is this process that didn't move, nobody else is
        to blame. While stages are missing, nothing can move.
        """
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self.placement.missing() or not self._repairs.is_idle:
                continue
            most = math.ceil(self.placement.patience_seconds / _LOOK_SECONDS)
            for live in [live for live in self._live.values() if live.wanted and not live.is_away]:
                live.num_unmoved += 1
                seconds = f"{live.num_unmoved * _LOOK_SECONDS:.0f} s"
                if live.num_unmoved == most:
                    self.events.note(
                        f"Tokens have been under way for {seconds}; they are sent again."
                    )
                    self._repairs.about(SessionBack(live.name))
                elif live.num_unmoved >= 2 * most:
                    error = NoProgress(
                        f"The request's tokens have been under way for {seconds}, and nothing came "
                        "of them, though all stages answer: ask again."
                    )
                    live.give_up(error)

    # Workers

    def _placed(self, stage: int, address: str) -> None:
        if address:
            self.events.tell(StagePlaced(address, self.placement.name(address), stage))

    def _left(self, address: str, how: str, stages: Sequence[int]) -> None:
        """A worker is gone, or some of its stages."""
        if self._closed:
            return
        self._forgetting.left(address, stages if self.placement.is_here(address) else None)
        self._repairs.about(StagesLost(address, tuple(stages)))
        if stages:
            self.pool.drop_kept()  # cheaper than having them computed again for nobody yet
            self.events.tell(WorkerLeft(address, self.placement.name(address), tuple(stages), how))

    def _resize(self) -> None:
        """Take the capacity that the workers have for sessions where the stages are now."""
        if self.placement.missing():
            return  # known when they are placed again
        if self.placement.room().capacity < self.pool.capacity:
            for address in set(self.placement.addresses):
                self.placement.shut_unneeded(address)
        for live in self.pool.resize(self.placement.room()):
            self._send_away(live)

    async def _make_room(self) -> None:
        """Take the room that caches have now, and wait until those who must leave have left."""
        self._resize()
        await self.pool.settle()

    async def _came(self) -> None:
        """A worker has come: it may be needed."""
        self._repairs.about(TryAgain())
        await self._repairs.finished()

    def _hear(self, message: Message, address: str) -> None:
        kind = message["kind"]
        if kind == "moved":
            for name in message["sessions"]:
                if name in self._live:
                    self._live[name].num_unmoved = 0
        elif kind == "logits":
            self.pace.add_computing(message["computed"])
            self._answer([Part(*part) for part in message["parts"]], message["values"]["logits"])
        elif kind == "gap":
            self._repairs.about(Lacking(message["stage"], tuple(message["sessions"])))
        elif kind == "closed":
            for name in message["sessions"]:
                self._forgetting.heard(name, (message["stage"], address))
        elif kind == "refused":
            self._tell_of_stranger(message["peer"], message["role"], address)
        elif kind == "unreached":
            self.placement.give_up(message["address"], "can't be reached by another")
        elif kind == "failed":
            for name in message["sessions"]:
                if name in self._live:
                    self._live[name].give_up(TaskFailed(message["why"]))

    def _tell_of_stranger(self, peer: str, role: str, worker: str) -> None:
        """Somebody has told a worker to be the driver, or a stage, and couldn't prove it."""
        self.num_refused += 1
        if self.num_refused & (self.num_refused - 1):
            return  # told of at the 1st, 2nd, 4th, 8th, ...: a stranger mustn't fill the log
        what = (
            f"{peer} told the worker {worker} to be the {role} of this deployment and was refused: it "
            f"has no part in it ({self.num_refused} so far)."
        )
        _LOGGER.warning(what)
        self.events.note(what)

    def _answer(self, parts: Sequence[Part], logits: torch.Tensor) -> None:
        row = 0
        for part in parts:
            first = max(part.start, part.deliver) if part.want == ALL else part.end - 1
            rows, row = logits[row : row + part.end - first], row + part.end - first
            live = self._live.get(part.session)
            if live is None:
                continue
            for wanted in live.hear(part, first, rows):
                if wanted.alone_since is not None:
                    seconds = asyncio.get_running_loop().time() - wanted.alone_since
                    self.pace.add_traversal(wanted.end - wanted.start, seconds)

    # Sessions

    async def open(self) -> Live:
        """Begin a session that is fed by hand; it costs nothing until it has tokens."""
        live = Live()
        self._live[live.name] = live
        return live

    async def admit(
        self,
        num_tokens: int,
        prompt: Sequence[int] = (),
        num_sequences: int = 1,
        owner: str = "",
    ) -> Live:
        """Begin a session that will have at most so many tokens, when there is room for them.

        With several sequences (beams) these are the tokens of all of them.
        If others of the same owner have computed the beginning of the prompt, it has these tokens
        already.

        Raises
        ------
        RequestTooLarge
            If there never will be.
        CacheFull
            If sessions that are fed by hand hold too much, or workers have left.
        """
        wanted = Live(num_sequences=num_sequences, owner=owner)
        live = await self.pool.admit(wanted, num_tokens, prompt)
        self._live[live.name] = live
        try:
            if live.sharing is not None:
                await asyncio.shield(live.sharing)
        except BaseException:
            self._drop(live)
            raise
        return live

    @property
    def num_waiting(self) -> int:
        """How many sessions have tokens on their way."""
        return self._passes.num_waiting

    async def feed(self, live: Live, tokens: Sequence[int], want: str = LAST) -> torch.Tensor:
        """Send tokens after those sent before, and return logits (R, V): the last token's, or all.

        Raises
        ------
        TaskFailed
            If a stage can't compute them, or the model is being closed.
        CacheFull
            If the session is fed by hand, and there is no room for so many tokens more.
        SettingsInvalid
            If the session was closed.
        """
        return torch.cat([await future for future in await self.send(live, tokens, want)])

    async def send(
        self, live: Live, tokens: Sequence[int], want: str = LAST
    ) -> list[asyncio.Future[torch.Tensor]]:
        """Send tokens after those sent before, which may still be on their way.

        Returns
        -------
        list of Future
            Of the logits that `feed` returns, in this order. A rewind cancels them.
        """
        self._check_open(live)
        if not (live.is_away and not live.by_hand):  # one that waits for its room has asked for it
            await self.pool.extend(live, len(live.tokens) + len(tokens))
        if live.is_away and live.by_hand:
            await self._come_back(live)
            if live.is_away:
                raise CacheFull(_NO_ROOM)
        self._begin_traversal()
        loop = asyncio.get_running_loop()
        alone = not live.wanted and len(tokens) <= _CHUNK_TOKENS
        futures = []
        for begin in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = list(tokens[begin : begin + _CHUNK_TOKENS])
            last = begin + len(chunk) == len(tokens)
            asked = want if last or want == ALL else NOTHING
            part = live.add(chunk, asked)
            if asked != NOTHING:
                futures.append(live.want(part, part.start, loop.time() if alone else None))
            if not live.is_away:
                self._passes.post(part, chunk)
        return futures

    async def step(self, steps: Sequence[Step]) -> torch.Tensor:
        """Send a token of each of several sessions, in one pass, and return their logits (S, V).

        A step's origin is no session that gives up its own tokens in another step.

        Raises
        ------
        TaskFailed, SettingsInvalid
            As `feed` does.
        """
        for step in steps:
            self._check_open(step.live)
        self._begin_traversal()
        parts = [step.part() for step in steps]  # before any has its new token
        futures = []
        for step, part in zip(steps, parts, strict=True):
            step.live.add([step.token], LAST)
            futures.append(step.live.want(part, part.shared if part.origin else part.start))
        await self._passes.send(parts, [step.token for step in steps])
        return torch.cat(await asyncio.gather(*futures))

    def _begin_traversal(self) -> None:
        self.num_fed += 1
        if self.placement.missing():
            self._repairs.about(TryAgain())  # nobody was there when it was tried last

    def rewind(self, live: Live, position: int) -> None:
        """Forget the tokens from a position on."""
        self._check_open(live)
        live.rewind(position)

    async def fork(self, live: Live, length: int) -> Live:
        """Begin a session, fed by hand, with the first tokens of another.

        Raises
        ------
        CacheFull
            If there is no room for them.
        """
        self._check_open(live)
        new = Live(owner=live.owner)
        await self.pool.extend(new, length)
        if new.is_away:  # its room was there, and went in the same moment
            await asyncio.shield(self._drop(new))
            raise CacheFull(_NO_ROOM)
        self._share(live, new, length)
        if new.sharing is not None:
            await asyncio.shield(new.sharing)
        return new

    async def end(self, live: Live, *, keep: bool = False) -> None:
        """End a session: forget it, here and on the workers, or keep it for others to go on from."""
        if live.name not in self._live:
            return
        useful = keep and live.error is None and not live.is_away
        live.give_up(TaskFailed("The session was closed."))
        if useful and not self.placement.missing() and self._repairs.is_idle:
            if len(live.tokens) > live.num_computed:
                self.rewind(live, live.num_computed)
            del self._live[live.name]  # first: somebody may wait for just this one, or for its room
            if self.pool.keep(live):
                return
        await asyncio.shield(self._drop(live))

    # What the pool has decided

    def _share(self, source: Live, new: Live, length: int) -> None:
        """Give a new session the first tokens of another, from stage to stage."""
        new.tokens = source.tokens[:length]
        new.num_computed = min(source.num_computed, length)
        new.most_tokens = new.num_shared = length
        self._live[new.name] = new
        message = {"kind": "fork", "session": source.name, "new": new.name, "length": length}
        new.sharing = self.spawn(self.placement.tell(0, message))

    def _take_over(self, kept: Live, length: int) -> None:
        """Make a session that was kept one again, from a position on."""
        self._live[kept.name] = kept
        kept.error, kept.sharing = None, None
        kept.num_shared = length
        if length < len(kept.tokens):
            self.rewind(kept, length)

    def _drop(self, live: Live) -> asyncio.Task[None]:
        """Forget a session; the task returns when the stages have been told."""
        self._live.pop(live.name, None)
        return self.spawn(self._forget(live.name, self.pool.leave(live)))

    async def _forget(self, name: str, num_tokens: int) -> None:
        self._forgetting.begin(name, num_tokens, self.placement.places())
        for stage in range(len(self.cut)):
            await self.placement.tell(stage, {"kind": "close", "sessions": [name]})
        self._forgetting.heard(name)

    def _send_away(self, live: Live) -> None:
        """Have the stages forget a session, for want of room; it comes back when there is some."""
        num_tokens = self.pool.leave(live)
        # It isn't there if its turn came a moment ago: whoever asked for it hasn't heard yet.
        self._live.pop(live.name, None)
        self.spawn(self._forget(live.name, num_tokens))
        live.name, live.is_away, live.num_computed = Live().name, True, 0
        self._live[live.name] = live
        if live.by_hand or live.is_lead:
            live.give_up(CacheFull(_NO_ROOM))
        else:
            self.spawn(self._readmit(live, num_tokens))

    async def _readmit(self, live: Live, num_tokens: int) -> None:
        if live.name not in self._live:
            return  # it has ended since: nobody would give the room back
        try:
            await self.pool.readmit(live, num_tokens)
        except DagflowError as error:
            live.give_up(error)
        else:
            await self._come_back(live)

    async def _come_back(self, live: Live) -> None:
        """Have the stages compute again what a session had; it isn't away any more then."""
        if live.reserved:
            self._repairs.about(SessionBack(live.name))
            await self._repairs.finished()

    def _check_open(self, live: Live) -> None:
        if self._closed:
            raise TaskFailed("The model was closed.")
        if live.name not in self._live:
            raise SettingsInvalid("The session was closed: open another, or fork it before.")
        if live.is_away and not live.by_hand and live.error is not None:
            raise live.error
