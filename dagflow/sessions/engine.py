"""The driver's side of sessions: sends their tokens, hears the answers, and mends what breaks.

All of it runs on the event loop of the dask client. A pass goes from stage to stage without coming
back, and the last stage answers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from distributed import Client

from dagflow.errors import CacheFull, DagflowError, SettingsInvalid, TaskFailed, WorkersLost
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import Partition, partition
from dagflow.run.clusters import in_background
from dagflow.sessions.links import Message
from dagflow.sessions.models import Model
from dagflow.sessions.pace import Pace
from dagflow.sessions.placement import Placement
from dagflow.sessions.pool import CachePool, Holder, common
from dagflow.sessions.service import MOST_TOKENS
from dagflow_tasks.attention import ATTEND
from dagflow_tasks.decoding import ALL, LAST, NOTHING, TOKENS, Part
from dagflow_tasks.recurrence import RECURRENT
from dagflow_tasks.results import TensorDict

_LOGGER = logging.getLogger(__name__)
_CHUNK_TOKENS = 256
_LAST_WORDS_SECONDS = 5.0
_NO_ROOM = (
    "Workers have left, and the caches of those left have no room for the session now: try again "
    "later, or close others."
)


@dataclass
class _Wanted:
    """Logits that somebody waits for: of the tokens from `start` to `end`, or of the last.

    Stages that have computed all that was waited for before have the tokens up to `start`.

    Attributes
    ----------
    alone_since : float or None
        When they were sent, unless the session had other tokens on their way.
    """

    epoch: int
    start: int
    end: int
    want: str
    future: asyncio.Future[torch.Tensor]
    alone_since: float | None

    @property
    def first_row(self) -> int:
        return self.end - 1 if self.want == LAST else self.start


@dataclass(eq=False)
class Live(Holder):
    """A session as the driver knows it.

    Attributes
    ----------
    name : str
        By which the stages know it.
    epoch : int
        Counts rewinds.
    num_shared : int
        Tokens that another session had computed.
    is_away : bool
        Whether the stages have had to forget it, for want of room. The tokens are here.
    error : Exception or None
        Why it can't go on.
    sharing : Task or None
        Tells the stages whose tokens it begins with.
    is_lead : bool
        Whether it was admitted with room for others, too, that come and go with it.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    epoch: int = 0
    wanted: list[_Wanted] = field(default_factory=list)
    num_shared: int = 0
    is_away: bool = False
    error: Exception | None = None
    sharing: asyncio.Task[None] | None = None
    is_lead: bool = False


@dataclass
class _Forgetting:
    """Tokens whose room is free again when some places, stages and addresses, have forgotten them."""

    num_tokens: int
    places: set[tuple[int, str]]


@dataclass(frozen=True)
class Step:
    """One token that follows a session's, or those of another, which it takes over first."""

    live: Live
    token: int
    origin: Live | None = None


class Engine:
    """One model on one swarm. Coroutines run on the client's loop; the rest may be called anywhere.

    Parameters
    ----------
    model : Model
    client : Client
    num_stages : int
    wait_seconds : float
        How long to wait for workers when too few are left.
    cache_bytes : int, optional
        What sessions' caches may take on a worker; see `memory.cache_budget`.
    prefix_reuse : bool
        Whether sessions go on from tokens that others have computed.

    Attributes
    ----------
    pool : CachePool
        Who may keep how many tokens on the workers.
    note : callable
        Tells people what happens; says nothing unless it is set.
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
        self.model = model
        self.name = uuid.uuid4().hex[:8]
        self.cut = cut_at_layers(model.dag, num_stages)
        self.num_fed = 0
        self.num_refused = 0
        self.pool: CachePool[Live] = CachePool(
            prefix_reuse, self._share, self._take_over, self._drop
        )
        self._forgetting: dict[str, _Forgetting] = {}
        self._posted: list[tuple[Part, Sequence[int]]] = []
        self.pace = Pace()
        self.note: Callable[[str], None] = lambda text: None
        self.placement = Placement(
            self.name,
            model,
            self.cut,
            client,
            wait_seconds=wait_seconds,
            cache_bytes=cache_bytes,
            hear=self._hear,
            lost=self._left,
            came=self._mend,
            note=lambda text: self.note(text),
            spawn=self._spawn,
        )
        self._client = client
        # Stages that were placed again and haven't been told what those before them know.
        self._bare: set[int] = set()
        self._lacking: set[tuple[int, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live: dict[str, Live] = {}
        self._mending = asyncio.Lock()
        self._begun: set[concurrent.futures.Future[Any]] = set()
        self._closed = False

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
        if self._closed:
            return
        self._closed = True
        if self.is_over:
            return
        in_background(self._client, self._end()).result()
        # Whoever waits for tokens hears why none come before the loop ends.
        concurrent.futures.wait(set(self._begun), _LAST_WORDS_SECONDS)
        self.placement.stop()

    def call(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return what it returns."""
        return self.begin(doing).result()

    def begin(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return its future at once.

        Raises
        ------
        SettingsInvalid
            If the model or the client was closed.
        """
        if self._closed or self.is_over:
            doing.close()
            what = "deployment" if self._closed else "dask client"
            raise SettingsInvalid(f"The {what} was closed: open another.")
        begun = in_background(self._client, doing)
        self._begun.add(begun)
        begun.add_done_callback(self._begun.discard)
        return begun

    @property
    def is_over(self) -> bool:
        """Whether the client was closed, and with it the loop that all of this runs on."""
        return bool(self._client.status == "closed")

    # On the loop

    async def _begin(self) -> None:
        await self.placement.place()
        self._resize()
        for stage in range(len(self.cut)):
            await self._route(stage)
        self.placement.look_after()
        await self._mend()

    async def _end(self) -> None:
        """End everything."""
        closed = TaskFailed("The model was closed.")
        self.pool.fail(closed)
        for live in list(self._live.values()):
            self._give_up(live, closed)
        self._live.clear()
        ended = list(self._tasks)
        for task in ended:
            task.cancel()
        await self.placement.end()
        await asyncio.gather(*ended, return_exceptions=True)

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Have whoever waits hear of an error that nobody has expected."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.note(f"{type(error).__name__}: {error}")
            self.pool.fail(TaskFailed(f"{type(error).__name__}: {error}"))
            for live in self._live.values():
                self._give_up(live, TaskFailed(f"{type(error).__name__}: {error}"))

    # Workers

    def _left(self, address: str, how: str, stages: Sequence[int]) -> None:
        """A worker is gone."""
        if self._closed:
            return
        for name, forgetting in list(self._forgetting.items()):
            forgetting.places = {place for place in forgetting.places if place[1] != address}
            self._forgotten(name)
        if stages:
            self.pool.drop_kept()  # cheaper than having them computed again for nobody yet
            self.note(f"The worker {address} {how}, with stage {', '.join(map(str, stages))}.")
            self._spawn(self._mend())

    def _resize(self) -> None:
        """Take the capacity that the workers have for sessions where the stages are now."""
        if self.placement.missing():
            return  # known when they are placed again
        if self.placement.room().capacity < self.pool.capacity:
            for address in set(self.placement.addresses):
                self.placement.shut_unneeded(address)
        for live in self.pool.resize(self.placement.room()):
            self._send_away(live)

    def _hear(self, message: Message, address: str) -> None:
        kind = message["kind"]
        if kind == "logits":
            self.pace.add_computing(message["computed"])
            self._answer([Part(*part) for part in message["parts"]], message["values"]["logits"])
        elif kind == "gap":
            self._lacking |= {(message["stage"], name) for name in message["sessions"]}
            self._spawn(self._refill())
        elif kind == "closed":
            for name in message["sessions"]:
                if name in self._forgetting:
                    self._forgetting[name].places.discard((message["stage"], address))
                    self._forgotten(name)
        elif kind == "refused":
            self._tell_of_stranger(message["peer"], message["role"], address)
        elif kind == "unreached":
            self.placement.give_up(message["address"], "can't be reached by another")
        elif kind == "failed":
            for name in message["sessions"]:
                if name in self._live:
                    self._give_up(self._live[name], TaskFailed(message["why"]))

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
        self.note(what)

    def _answer(self, parts: Sequence[Part], logits: torch.Tensor) -> None:
        row = 0
        for part in parts:
            first = max(part.start, part.deliver) if part.want == ALL else part.end - 1
            rows, row = logits[row : row + part.end - first], row + part.end - first
            live = self._live.get(part.session)
            if live is None:
                continue
            for wanted in list(live.wanted):
                same = wanted.epoch == part.epoch
                if same and first <= wanted.first_row and wanted.end <= part.end:
                    live.wanted.remove(wanted)
                    live.num_computed = max(live.num_computed, wanted.end)
                    if wanted.alone_since is not None:
                        seconds = asyncio.get_running_loop().time() - wanted.alone_since
                        self.pace.add_traversal(wanted.end - wanted.start, seconds)
                    if not wanted.future.done():
                        found = rows[wanted.first_row - first : wanted.end - first]
                        wanted.future.set_result(found)

    @staticmethod
    def _give_up(live: Live, error: Exception) -> None:
        live.error = error
        for wanted in live.wanted:
            if not wanted.future.done():
                wanted.future.set_exception(error)
        live.wanted.clear()

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
        return sum(bool(live.wanted) for live in self._live.values())

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
            start = len(live.tokens)
            live.tokens += chunk
            live.most_tokens = max(live.most_tokens, len(live.tokens))
            part = Part(live.name, live.epoch, start, len(chunk), start, asked)
            if asked != NOTHING:
                since = loop.time() if alone else None
                futures.append(_want(live, part, start, since))
            if not live.is_away:
                self._post(part, chunk)
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
        parts = [self._part_of(step) for step in steps]  # before any has its new token
        futures = []
        for step, part in zip(steps, parts, strict=True):
            step.live.tokens.append(step.token)
            step.live.most_tokens = max(step.live.most_tokens, len(step.live.tokens))
            futures.append(_want(step.live, part, part.shared if part.origin else part.start))
        await self._send_tokens(parts, torch.tensor([step.token for step in steps]), [])
        return torch.cat(await asyncio.gather(*futures))

    @staticmethod
    def _part_of(step: Step) -> Part:
        live, origin = step.live, step.origin
        if origin is None:
            return Part(live.name, live.epoch, len(live.tokens), 1, len(live.tokens), LAST)
        shared, start = common(live.tokens, origin.tokens), len(origin.tokens)
        live.tokens = list(origin.tokens)
        live.num_computed = min(live.num_computed, shared)
        live.epoch += 1
        return Part(live.name, live.epoch, start, 1, start, LAST, origin.name, origin.epoch, shared)

    def _begin_traversal(self) -> None:
        self.num_fed += 1
        if self.placement.missing() and not self._mending.locked():
            self._spawn(self._mend())  # nobody was there when it was tried last

    def rewind(self, live: Live, position: int) -> None:
        """Forget the tokens from a position on."""
        self._check_open(live)
        del live.tokens[position:]
        live.num_computed = min(live.num_computed, position)
        live.epoch += 1
        for wanted in live.wanted:
            wanted.future.cancel()
        live.wanted.clear()

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
        self._share(live, new, length)
        if new.sharing is not None:
            await asyncio.shield(new.sharing)
        return new

    async def end(self, live: Live, *, keep: bool = False) -> None:
        """End a session: forget it, here and on the workers, or keep it for others to go on from."""
        if live.name not in self._live:
            return
        useful = keep and live.error is None and not live.is_away
        self._give_up(live, TaskFailed("The session was closed."))
        if useful and not self.placement.missing() and not self._mending.locked():
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
        new.sharing = self._spawn(self.placement.tell(0, message))

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
        return self._spawn(self._forget(live.name, self.pool.leave(live)))

    async def _forget(self, name: str, num_tokens: int) -> None:
        self._forgetting[name] = _Forgetting(num_tokens, self.placement.places())
        for stage in range(len(self.cut)):
            await self.placement.tell(stage, {"kind": "close", "sessions": [name]})
        self._forgotten(name)

    def _forgotten(self, name: str) -> None:
        """Free a session's room once all stages that are there have forgotten it."""
        forgetting = self._forgetting.get(name)
        if forgetting is not None and not forgetting.places:
            del self._forgetting[name]
            self.pool.forgotten(forgetting.num_tokens)

    def _send_away(self, live: Live) -> None:
        """Have the stages forget a session, for want of room; it comes back when there is some."""
        num_tokens = self.pool.leave(live)
        del self._live[live.name]
        self._spawn(self._forget(live.name, num_tokens))
        live.name, live.is_away, live.num_computed = Live().name, True, 0
        self._live[live.name] = live
        if live.by_hand or live.is_lead:
            self._give_up(live, CacheFull(_NO_ROOM))
        else:
            self._spawn(self._readmit(live, num_tokens))

    async def _readmit(self, live: Live, num_tokens: int) -> None:
        try:
            await self.pool.readmit(live, num_tokens)
        except DagflowError as error:
            self._give_up(live, error)
        else:
            await self._come_back(live)

    async def _come_back(self, live: Live) -> None:
        """Have the stages compute again what a session had."""
        async with self._mending:
            if not live.reserved:
                return  # it has ended, or was sent away once more: then it comes back once more
            live.is_away = False
            live.most_tokens = len(live.tokens)
            await self._send_again(0, list(range(len(self.cut))), [live.name])

    def _check_open(self, live: Live) -> None:
        if self._closed:
            raise TaskFailed("The model was closed.")
        if live.name not in self._live:
            raise SettingsInvalid("The session was closed: open another, or fork it before.")
        if live.is_away and not live.by_hand and live.error is not None:
            raise live.error

    def _post(self, part: Part, tokens: Sequence[int]) -> None:
        """Send tokens, along with those that other sessions send at the same time."""
        self._posted.append((part, tokens))
        if len(self._posted) == 1:
            self._spawn(self._send_posted())

    async def _send_posted(self) -> None:
        posted, self._posted = self._posted, []
        for group in _groups(posted, self._most_sessions):
            tokens = torch.tensor([token for _, some in group for token in some])
            await self._send_tokens([part for part, _ in group], tokens, [])

    async def _send_tokens(
        self, parts: Sequence[Part], tokens: torch.Tensor, rebuilt: Sequence[int]
    ) -> None:
        message = {
            "kind": "pass",
            "parts": [astuple(part) for part in parts],
            "rebuilt": rebuilt,
            "most_sessions": self._most_sessions,
        }
        await self.placement.tell(0, message, TensorDict({TOKENS: tokens}))

    @property
    def _most_sessions(self) -> int:
        """How many sessions may share a pass: so many that every worker has one to compute.

        With all of them in one pass, the workers would take turns.
        """
        return math.ceil(self.num_waiting / self.placement.num_placed_on)

    # Mending

    async def _mend(self) -> None:
        """Put lost stages on other workers, and have what they knew sent to them again."""
        async with self._mending:
            while self.placement.missing() or self._bare:
                try:
                    for stage in self.placement.missing():
                        self._bare.add(stage)
                        await self.placement.replace(stage)
                except WorkersLost as error:
                    self.pool.fail(error)
                    for live in self._live.values():
                        self._give_up(live, error)
                    return
                self._resize()
                await self.pool.settle()
                if self.placement.missing():
                    continue  # another one has left meanwhile
                bare = sorted(self._bare)
                self._bare.clear()
                for stage in bare:
                    await self._route(stage)
                for first, last in _runs(bare):
                    await self._send_again(first, list(range(first, last + 1)), None)

    async def _route(self, stage: int) -> None:
        following = (*self.placement.addresses, None)[stage + 1]
        await self.placement.tell(stage, {"kind": "route", "following": following})

    async def _send_again(
        self, stage: int, rebuilt: list[int], names: Sequence[str] | None
    ) -> None:
        """Have a stage sent again what it has got so far, for all sessions or some."""
        lives = [
            live
            for live in self._live.values()
            if not live.is_away and (names is None or live.name in names)
        ]
        lives.sort(key=lambda live: not live.wanted)  # those that somebody waits for first
        sessions = [(live, *_still_wanted(live)) for live in lives if live.tokens]
        if stage == 0:
            for live, deliver, want in sessions:
                tokens = torch.tensor(live.tokens)
                part = Part(live.name, live.epoch, 0, len(tokens), deliver, want)
                await self._send_tokens([part], tokens, rebuilt)
            return
        message = {
            "kind": "resend",
            "following": self.placement.addresses[stage],
            "sessions": [(live.name, deliver, want) for live, deliver, want in sessions],
            "rebuilt": rebuilt,
        }
        await self.placement.tell(stage - 1, message)

    async def _refill(self) -> None:
        """Some stages lack what came before: they have got something out of turn."""
        async with self._mending:
            lacking, self._lacking = self._lacking, set()
            for stage in sorted({stage for stage, _ in lacking}):
                names = [name for number, name in lacking if number == stage]
                await self._send_again(stage, [stage], names)


def _groups(
    posted: Sequence[tuple[Part, Sequence[int]]], most_sessions: int
) -> list[list[tuple[Part, Sequence[int]]]]:
    """Divide parts into passes: so many sessions in each that every worker has one to compute.

    >>> posted = [(Part(name, 0, 0, 1, 0, "last"), [7]) for name in "abcbd"]
    >>> [[part.session for part, _ in group] for group in _groups(posted, 4)]
    [['a', 'b', 'c'], ['b', 'd']]
    >>> [len(group) for group in _groups(posted, 2)]
    [2, 2, 1]
    """
    groups: list[list[tuple[Part, Sequence[int]]]] = []
    sessions: set[str] = set()
    room = 0
    for part, tokens in posted:
        room -= part.count
        if not groups or part.session in sessions or len(sessions) >= most_sessions or room < 0:
            groups.append([])
            sessions, room = set(), MOST_TOKENS - part.count
        groups[-1].append((part, tokens))
        sessions.add(part.session)
    return groups


def _want(
    live: Live, part: Part, start: int, since: float | None = None
) -> asyncio.Future[torch.Tensor]:
    """Note that somebody waits for a part's logits, and from where on stages may lack tokens."""
    future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
    future.add_done_callback(_heard)
    live.wanted.append(_Wanted(part.epoch, start, part.end, part.want, future, since))
    return future


def _heard(future: asyncio.Future[torch.Tensor]) -> None:
    """Nobody need wait for guesses behind a wrong one: their errors aren't lost but known."""
    if not future.cancelled():
        future.exception()


def _still_wanted(live: Live) -> tuple[int, str]:
    """Return from which token on the stages behind must be given a session's tokens, and why.

    Tokens that are fed from now on may get to the stage that sends again before it is told to: what
    they are wanted for isn't known yet, so it is all.
    """
    if not live.wanted:
        return len(live.tokens), ALL
    first = min(wanted.start for wanted in live.wanted)
    one = len(live.wanted) == 1 and live.wanted[0].want == LAST
    return first, LAST if one and live.wanted[0].end == len(live.tokens) else ALL


def _runs(stages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring stages, first and last.

    >>> _runs([0, 2, 3])
    [(0, 0), (2, 3)]
    """
    found: list[tuple[int, int]] = []
    for stage in stages:
        if found and found[-1][1] == stage - 1:
            found[-1] = (found[-1][0], stage)
        else:
            found.append((stage, stage))
    return found


def cut_at_layers(dag: OperatorDag, num_stages: int) -> Partition:
    """Cut a decoder between its layers, evenly."""
    layers: list[str] = []
    for node in dag.nodes:
        if node.op == ATTEND or node.op in RECURRENT:
            layer = _layer_of(node.module)
            layers += [layer] if layer not in layers else []
    count = max(1, min(num_stages, len(layers)))
    points = [layers[len(layers) * stage // count] for stage in range(1, count)]
    return partition(dag, split_points=points) if points else partition(dag, 1)


def _layer_of(module: str) -> str:
    """Return the path of the layer that a module is in.

    >>> _layer_of("model.layers.3.self_attn")
    'model.layers.3'
    """
    parts = module.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])
