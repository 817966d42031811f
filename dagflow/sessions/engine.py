"""The driver's side of sessions: places a model's stages, sends tokens, and mends what breaks.

All of it runs on the event loop of the dask client. Between the driver and the workers there is one
connection each; a pass goes from stage to stage without coming back, and the last stage answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from distributed import Client, Future

from dagflow.errors import SettingsInvalid, TaskFailed, WorkersLost
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import Partition, partition
from dagflow.run.clusters import in_background
from dagflow.run.dask_internals import connection_arguments
from dagflow.run.membership import Membership
from dagflow.sessions.links import CommClosedError, Link, Message
from dagflow.sessions.models import Model
from dagflow.sessions.service import SessionWorker, StageSpec, open_stage, take_part
from dagflow_tasks.attention import ATTEND
from dagflow_tasks.decoding import ALL, LAST, NOTHING, TOKENS, Part
from dagflow_tasks.results import TensorDict

# A worker that hasn't answered for so many looks is frozen. Looks are counted rather than seconds:
# if it is this process that didn't move, nobody else is to blame.
_LOOK_SECONDS = 0.25
_MOST_UNHEARD = 8
_CONNECT_SECONDS = 5.0
_CHUNK_TOKENS = 256


@dataclass
class _Wanted:
    """Logits that somebody waits for: of the tokens from `start` to `end`, or of the last.

    Stages that have computed all that was waited for before have the tokens up to `start`.
    """

    epoch: int
    start: int
    end: int
    want: str
    future: asyncio.Future[torch.Tensor]

    @property
    def first_row(self) -> int:
        return self.end - 1 if self.want == LAST else self.start


@dataclass
class Live:
    """A session as the driver knows it.

    Attributes
    ----------
    tokens : list of int
        Everything that was sent.
    epoch : int
        Counts rewinds.
    """

    name: str
    tokens: list[int] = field(default_factory=list)
    epoch: int = 0
    wanted: list[_Wanted] = field(default_factory=list)


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

    Attributes
    ----------
    note : callable
        Tells people what happens; says nothing unless it is set.
    num_fed : int
        How often tokens were sent through the stages.
    """

    def __init__(
        self,
        model: Model,
        client: Client,
        num_stages: int,
        *,
        wait_seconds: float = 60.0,
    ) -> None:
        self.model = model
        self.name = uuid.uuid4().hex[:8]
        self.cut = cut_at_layers(model.dag, num_stages)
        self.num_fed = 0
        self._client = client
        self.note: Callable[[str], None] = lambda text: None
        self._wait_seconds = wait_seconds
        self._membership = Membership(client)
        self._addresses: list[str] = []
        # Open stages, and those that are being opened, by stage and address.
        self._opened: dict[tuple[int, str], asyncio.Task[Future]] = {}
        self._links: dict[str, Link] = {}
        self._inviting: set[str] = set()
        self._joined = asyncio.Event()
        # Stages that were placed again and haven't been told what those before them know.
        self._bare: set[int] = set()
        self._lacking: set[tuple[int, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live: dict[str, Live] = {}
        self._mending = asyncio.Lock()
        self._closed = False

    # From any thread

    def start(self) -> None:
        """Place and open the stages; spares read weights meanwhile and afterwards.

        Raises
        ------
        WorkersLost
            If there is no worker.
        """
        self._membership.__enter__()
        self._client.register_plugin(SessionWorker())
        self.call(self._begin())

    def close(self) -> None:
        """End all sessions and forget the stages."""
        if self._closed:
            return
        self._closed = True
        self.call(self._end())
        self._membership.__exit__()

    def address_of(self, stage: int) -> str:
        """Return which worker has a stage; empty while nobody has."""
        return self._addresses[stage]

    @property
    def num_workers(self) -> int:
        """How many workers take part, spares included."""
        return len(self._links)

    def missing(self) -> list[int]:
        """Return the stages that no worker has now; requests wait for these."""
        return self._lost()

    def spares(self) -> list[str]:
        """Return the workers without a stage that have the weights of all."""
        return [
            address
            for address in list(self._links)
            if address not in self._addresses
            and all(self._is_open(stage, address) for stage in range(len(self.cut)))
        ]

    def call(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return what it returns."""
        return in_background(self._client, doing).result()

    def begin(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return its future at once."""
        return in_background(self._client, doing)

    # On the loop

    async def _begin(self) -> None:
        await asyncio.gather(*(self._connect(a) for a in self._membership.usable()))
        workers = sorted(self._links)
        if not workers:
            raise WorkersLost("No worker is there to run the model on.")
        count = len(self.cut)
        self._addresses = [
            workers[stage * min(len(workers), count) // count] for stage in range(count)
        ]
        opening = (self._open(stage, address) for stage, address in enumerate(self._addresses))
        for error in await asyncio.gather(*opening, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, OSError):
                raise error
        for stage in range(count):
            await self._route(stage)
        self._spawn(self._watch())
        for address in self._links.keys() - set(self._addresses):
            self._spawn(self._warm(address))

    async def _end(self) -> None:
        """End everything; workers forget their stages when their driver hangs up."""
        for live in list(self._live.values()):
            self._give_up(live, TaskFailed("The model was closed."))
        self._live.clear()
        for link in self._links.values():
            link.close()
        self._links.clear()
        ended = [*self._tasks, *self._opened.values()]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        self._opened.clear()

    def _spawn(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Have whoever waits hear of an error that nobody has expected."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.note(f"{type(error).__name__}: {error}")
            for live in self._live.values():
                self._give_up(live, TaskFailed(f"{type(error).__name__}: {error}"))

    # Workers

    async def _connect(self, address: str) -> None:
        """Hold a connection to a worker, if it can be reached."""
        hello = {"deployment": self.name, "role": "driver"}
        try:
            ready = self._client.run(take_part, workers=[address], asynchronous=True)
            await asyncio.wait_for(ready, _CONNECT_SECONDS)
            link = await Link.open(address, connection_arguments(self._client), hello)
        except (OSError, ValueError):
            return  # frozen, or it has left; if it is still there at the next look, once more
        self._links[address] = link
        self._joined.set()
        self._spawn(self._listen(address, link))

    async def _open(self, stage: int, address: str) -> None:
        """Have a worker open a stage, unless it has it open.

        Raises
        ------
        CommClosedError
            If the worker leaves meanwhile.
        """
        place = (stage, address)
        if place not in self._opened:
            link = self._links.get(address)
            if link is None:
                raise CommClosedError(f"The worker {address} has left.")
            self._opened[place] = asyncio.ensure_future(self._opening(stage, address, link))
        opening = self._opened[place]
        try:
            await asyncio.shield(opening)
        except BaseException:
            if opening.done() and self._opened.get(place) is opening:
                del self._opened[place]
            raise

    async def _opening(self, stage: int, address: str, link: Link) -> Future:
        spec = StageSpec(self.name, stage, self.model.ref, self.cut[stage].to_json())
        key = f"open-stage-{self.name}-{stage}-{uuid.uuid4().hex[:6]}"
        future = self._client.submit(
            open_stage, spec, key=key, workers=[address], pure=False, retries=0
        )
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        waiting = [asyncio.ensure_future(event.wait()) for event in (ended, link.closed)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waiting:
                wait.cancel()
        if link.closed.is_set() or future.status in ("lost", "cancelled"):
            raise CommClosedError(f"The worker {address} left while it opened stage {stage}.")
        if future.status == "error":
            raise await loop.run_in_executor(None, future.exception)
        return future

    async def _invite(self, address: str) -> None:
        """Make a worker that has come, or come back, a spare."""
        self._inviting.add(address)
        try:
            await self._connect(address)
        finally:
            self._inviting.discard(address)
        if address in self._links:
            if self._lost():
                self._spawn(self._mend())
            await self._warm(address)

    async def _warm(self, address: str) -> None:
        """Have a spare read all stages' weights: it may have to replace anybody."""
        try:
            for stage in range(len(self.cut)):
                await self._open(stage, address)
        except OSError:
            return
        except Exception as error:
            self.note(f"The spare {address} can't read all weights: {error}")

    async def _ping(self, link: Link) -> None:
        with contextlib.suppress(OSError):
            await link.send({"kind": "ping"})

    async def _hang_up(self, link: Link, address: str) -> None:
        """Tell a worker to wait no longer for one that is gone."""
        with contextlib.suppress(OSError):
            await link.send({"kind": "lost", "address": address})

    def _lost(self) -> list[int]:
        return [s for s, address in enumerate(self._addresses) if address not in self._links]

    async def _listen(self, address: str, link: Link) -> None:
        try:
            while True:
                self._hear(await link.receive())
        except CommClosedError:
            if self._links.get(address) is link:
                self._gone(address, "has left")

    def _gone(self, address: str, how: str) -> None:
        """A worker can't be reached any more, or doesn't move."""
        link = self._links.pop(address, None)
        if link is not None:
            link.close()
        for place in [place for place in self._opened if place[1] == address]:
            del self._opened[place]
        if self._closed:
            return
        for other in self._links.values():
            self._spawn(self._hang_up(other, address))
        stages = [s for s, a in enumerate(self._addresses) if a == address]
        for stage in stages:
            self._addresses[stage] = ""  # were it to come back, it would have forgotten
        if stages:
            self.note(f"The worker {address} {how}, with stage {', '.join(map(str, stages))}.")
            self._spawn(self._mend())

    async def _watch(self) -> None:
        """Notice workers that are silent, though their connections are open, and those that come."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            usable = set(self._membership.usable())
            for address, link in list(self._links.items()):
                link.num_unheard += 1
                if address not in usable:
                    self._gone(address, "has left")
                elif link.num_unheard > _MOST_UNHEARD:
                    self._gone(address, "has fallen silent")
                elif not link.is_sending:
                    self._spawn(self._ping(link))
            for address in usable - self._links.keys() - self._inviting:
                self._spawn(self._invite(address))

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "logits":
            self._answer([Part(*part) for part in message["parts"]], message["values"]["logits"])
        elif kind == "gap":
            self._lacking |= {(message["stage"], name) for name in message["sessions"]}
            self._spawn(self._refill())
        elif kind == "unreached":
            self._gone(message["address"], "can't be reached by another")
        elif kind == "failed":
            for name in message["sessions"]:
                if name in self._live:
                    self._give_up(self._live[name], TaskFailed(message["why"]))

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
                    if not wanted.future.done():
                        found = rows[wanted.first_row - first : wanted.end - first]
                        wanted.future.set_result(found)

    @staticmethod
    def _give_up(live: Live, error: Exception) -> None:
        for wanted in live.wanted:
            if not wanted.future.done():
                wanted.future.set_exception(error)
                wanted.future.exception()  # who asked may have left: asyncio needn't complain
        live.wanted.clear()

    # Sessions

    async def open(self) -> Live:
        """Begin a session; it costs nothing until it has tokens."""
        live = Live(uuid.uuid4().hex[:12])
        self._live[live.name] = live
        return live

    async def feed(self, live: Live, tokens: Sequence[int], want: str = LAST) -> torch.Tensor:
        """Send tokens after those sent before, and return logits (R, V): the last token's, or all.

        Raises
        ------
        TaskFailed
            If a stage can't compute them.
        SettingsInvalid
            If the session or the model was closed.
        """
        self._check_open(live)
        self._begin_traversal()
        futures = []
        for begin in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = list(tokens[begin : begin + _CHUNK_TOKENS])
            last = begin + len(chunk) == len(tokens)
            asked = want if last or want == ALL else NOTHING
            start = len(live.tokens)
            live.tokens += chunk
            part = Part(live.name, live.epoch, start, len(chunk), start, asked)
            if asked != NOTHING:
                futures.append(_want(live, part, start))
            await self._send_tokens([part], torch.tensor(chunk), [])
        return torch.cat([await future for future in futures])

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
        parts = [self._take_over(step) for step in steps]  # before any has its new token
        futures = []
        for step, part in zip(steps, parts, strict=True):
            step.live.tokens.append(step.token)
            futures.append(_want(step.live, part, part.shared if part.origin else part.start))
        await self._send_tokens(parts, torch.tensor([step.token for step in steps]), [])
        return torch.cat(await asyncio.gather(*futures))

    @staticmethod
    def _take_over(step: Step) -> Part:
        live, origin = step.live, step.origin
        if origin is None:
            return Part(live.name, live.epoch, len(live.tokens), 1, len(live.tokens), LAST)
        shared, start = _num_shared(live.tokens, origin.tokens), len(origin.tokens)
        live.tokens = list(origin.tokens)
        live.epoch += 1
        return Part(live.name, live.epoch, start, 1, start, LAST, origin.name, origin.epoch, shared)

    def _begin_traversal(self) -> None:
        self.num_fed += 1
        if self._lost() and not self._mending.locked():
            self._spawn(self._mend())  # nobody was there when it was tried last

    def rewind(self, live: Live, position: int) -> None:
        """Forget the tokens from a position on."""
        self._check_open(live)
        del live.tokens[position:]
        live.epoch += 1
        for wanted in live.wanted:
            wanted.future.cancel()
        live.wanted.clear()

    async def fork(self, live: Live, length: int) -> Live:
        """Begin a session with the first tokens of another."""
        self._check_open(live)
        new = await self.open()
        new.tokens = live.tokens[:length]
        for stage in range(len(self.cut)):
            await self._tell(
                stage, {"kind": "fork", "session": live.name, "new": new.name, "length": length}
            )
        return new

    async def end(self, live: Live) -> None:
        """Forget a session, here and on the workers."""
        if self._live.pop(live.name, None) is None:
            return
        self._give_up(live, TaskFailed("The session was closed."))
        # Not by the caller, who may be cancelled in the middle: some stages would keep it for ever.
        self._spawn(self._tell_ended(live.name))

    async def _tell_ended(self, session: str) -> None:
        for stage in range(len(self.cut)):
            await self._tell(stage, {"kind": "close", "sessions": [session]})

    def _check_open(self, live: Live) -> None:
        if live.name not in self._live:
            raise SettingsInvalid("The session was closed: open another, or fork it before.")

    async def _send_tokens(
        self, parts: Sequence[Part], tokens: torch.Tensor, rebuilt: Sequence[int]
    ) -> None:
        body = {"kind": "pass", "parts": [astuple(part) for part in parts], "rebuilt": rebuilt}
        await self._tell(0, body, TensorDict({TOKENS: tokens}))

    async def _tell(self, stage: int, message: Message, values: TensorDict | None = None) -> None:
        """Send to a stage; if its worker is gone, mending sends again what matters."""
        link = self._links.get(self._addresses[stage])
        if link is None:
            return
        with contextlib.suppress(OSError):
            await link.send({**message, "deployment": self.name, "stage": stage}, values)

    # Mending

    async def _mend(self) -> None:
        """Put lost stages on other workers, and have what they knew sent to them again."""
        async with self._mending:
            while self._lost() or self._bare:
                try:
                    for stage in self._lost():
                        self._bare.add(stage)
                        self._addresses[stage] = await self._replacement(stage)
                except WorkersLost as error:
                    for live in self._live.values():
                        self._give_up(live, error)
                    return
                if self._lost():
                    continue  # another one has left meanwhile
                bare = sorted(self._bare)
                self._bare.clear()
                for stage in {0, *bare}:  # the first has to know how many workers there are
                    await self._route(stage)
                for first, last in _runs(bare):
                    await self._send_again(first, list(range(first, last + 1)), None)

    async def _route(self, stage: int) -> None:
        following = self._addresses[stage + 1] if stage + 1 < len(self.cut) else None
        message = {"kind": "route", "following": following}
        await self._tell(stage, {**message, "num_workers": len(set(self._addresses))})

    async def _replacement(self, stage: int) -> str:
        """Return a worker that has the stage open: a spare that has its weights, if there is one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        while True:
            used = Counter(self._addresses)
            address = min(
                self._links, key=lambda a: (used[a], not self._is_open(stage, a), a), default=None
            )
            if address is None:
                self._joined.clear()
                try:
                    await asyncio.wait_for(self._joined.wait(), deadline - loop.time())
                except TimeoutError as error:
                    raise WorkersLost(
                        f"0 of 1 workers joined {self._client.scheduler.address} within "
                        f"{self._wait_seconds:g} s."
                    ) from error
                continue
            if not self._is_open(stage, address):
                self.note(f"Stage {stage} is being opened on {address}.")
            try:
                await self._open(stage, address)
                return address
            except OSError:
                continue  # gone as well
            except Exception as error:
                self._membership.exclude(address, str(error))
                self._gone(address, f"can't open stage {stage}: {error}")

    def _is_open(self, stage: int, address: str) -> bool:
        opening = self._opened.get((stage, address))
        return opening is not None and opening.done()

    async def _send_again(
        self, stage: int, rebuilt: list[int], names: Sequence[str] | None
    ) -> None:
        """Have a stage sent again what it has got so far, for all sessions or some."""
        lives = [live for live in self._live.values() if names is None or live.name in names]
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
            "following": self._addresses[stage],
            "sessions": [(live.name, deliver, want) for live, deliver, want in sessions],
            "rebuilt": rebuilt,
        }
        await self._tell(stage - 1, message)

    async def _refill(self) -> None:
        """Some stages lack what came before: they have got something out of turn."""
        async with self._mending:
            lacking, self._lacking = self._lacking, set()
            for stage in sorted({stage for stage, _ in lacking}):
                names = [name for number, name in lacking if number == stage]
                await self._send_again(stage, [stage], names)


def _want(live: Live, part: Part, start: int) -> asyncio.Future[torch.Tensor]:
    """Note that somebody waits for a part's logits, and from where on stages may lack tokens."""
    future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
    live.wanted.append(_Wanted(part.epoch, start, part.end, part.want, future))
    return future


def _num_shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with.

    >>> _num_shared([5, 3, 8, 1], [5, 3, 7])
    2
    """
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(tokens), len(others)))


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
        if node.op == ATTEND:
            layers.append(_layer_of(node.module))
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
