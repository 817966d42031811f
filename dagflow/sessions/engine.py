"""The driver's side of sessions: places a model's stages, sends tokens, and mends what breaks.

All of it runs on the event loop of the dask client. Between the driver and the workers there is one
connection each; a pass goes from stage to stage without coming back, and the last stage answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from distributed import Client, Future

from dagflow.errors import TaskFailed, WorkersLost
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import Partition, partition
from dagflow.run.clusters import in_background
from dagflow.run.dask_internals import connection_arguments
from dagflow.run.membership import Membership
from dagflow.sessions.links import CommClosedError, Link, Message
from dagflow.sessions.models import Model
from dagflow.sessions.service import SessionWorker, StageSpec, close_deployment, open_stage
from dagflow_tasks.attention import ATTEND
from dagflow_tasks.decoding import ALL, LAST, NOTHING, TOKENS, Part
from dagflow_tasks.results import TensorDict

_LOOK_SECONDS = 0.2
_CHUNK_TOKENS = 256


@dataclass
class _Wanted:
    """Logits that somebody waits for: of the tokens from `start` to `end`, or of the last."""

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


class Engine:
    """One model on one swarm. Coroutines run on the client's loop; the rest may be called anywhere.

    Parameters
    ----------
    model : Model
    client : Client
    num_stages : int
    note : callable
        Tells people what happens.
    wait_seconds : float
        How long to wait for workers when too few are left.
    """

    def __init__(
        self,
        model: Model,
        client: Client,
        num_stages: int,
        *,
        note: Callable[[str], None] = lambda text: None,
        wait_seconds: float = 60.0,
    ) -> None:
        self.model = model
        self.name = uuid.uuid4().hex[:8]
        self.cut = cut_at_layers(model.dag, num_stages)
        self._client = client
        self._note = note
        self._wait_seconds = wait_seconds
        self._membership = Membership(client)
        self.addresses: list[str] = []
        self._opened: dict[tuple[int, str], Future] = {}
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live: dict[str, Live] = {}
        self._mending = asyncio.Lock()
        self._closed = False

    # From any thread

    def start(self) -> None:
        """Place and open the stages, and have spares read weights.

        Raises
        ------
        WorkersLost
            If there is no worker.
        """
        self._client.register_plugin(SessionWorker())
        self._membership.__enter__()
        workers = self._membership.usable()
        if not workers:
            raise WorkersLost("No worker is there to run the model on.")
        count = len(self.cut)
        self.addresses = [
            workers[stage * min(len(workers), count) // count] for stage in range(count)
        ]
        self._open([(stage, address) for stage, address in enumerate(self.addresses)])
        spares = [address for address in workers if address not in self.addresses]
        self._open([(stage, address) for address in spares for stage in range(count)])
        self.call(self._begin())

    def close(self) -> None:
        """End all sessions and forget the stages."""
        if self._closed:
            return
        self._closed = True
        self.call(self._end())
        self._membership.__exit__()
        for future in self._opened.values():
            future.release()
        with contextlib.suppress(OSError, TimeoutError):
            self._client.run(close_deployment, self.name)

    def call(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return what it returns."""
        return in_background(self._client, doing).result()

    def begin(self, doing: Any) -> Any:
        """Run a coroutine on the client's loop, and return its future at once."""
        return in_background(self._client, doing)

    def _open(self, places: Sequence[tuple[int, str]]) -> None:
        """Open stages on workers, and wait until they are."""
        futures = {}
        for stage, address in places:
            following = self.addresses[stage + 1] if stage + 1 < len(self.cut) else None
            spec = StageSpec(self.name, stage, self.model.ref, self.cut[stage].to_json(), following)
            key = f"open-stage-{self.name}-{stage}-{uuid.uuid4().hex[:6]}"
            futures[stage, address] = self._client.submit(
                open_stage, spec, key=key, workers=[address], pure=False, retries=0
            )
        for place, future in futures.items():
            future.result()
            self._opened[place] = future

    # On the loop

    async def _begin(self) -> None:
        for address in {address for _, address in self._opened}:
            await self._connect(address)
        self._spawn(self._watch())

    async def _end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for live in list(self._live.values()):
            self._give_up(live, TaskFailed("The model was closed."))
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _spawn(self, doing: Any) -> None:
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, address: str) -> None:
        if address in self._links:
            return
        hello = {"deployment": self.name, "role": "driver"}
        link = await Link.open(address, connection_arguments(self._client), hello)
        self._links[address] = link
        self._spawn(self._listen(address, link))

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
            self._opened.pop(place).release()
        if address in self.addresses and not self._closed:
            stages = [s for s, a in enumerate(self.addresses) if a == address]
            self._note(f"The worker {address} {how}, with stage {', '.join(map(str, stages))}.")
            self._spawn(self._mend())

    async def _watch(self) -> None:
        """Notice workers that are silent, though their connections are open."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            usable = set(self._membership.usable())
            for address in [a for a in self._links if a not in usable]:
                self._gone(address, "has fallen silent")

    def _hear(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "logits":
            self._answer([Part(*part) for part in message["parts"]], message["values"]["logits"])
        elif kind == "gap":
            self._spawn(self._refill(message["stage"], message["sessions"]))
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
        """
        futures = []
        for begin in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = list(tokens[begin : begin + _CHUNK_TOKENS])
            last = begin + len(chunk) == len(tokens)
            asked = want if last or want == ALL else NOTHING
            start = len(live.tokens)
            live.tokens += chunk
            part = Part(live.name, live.epoch, start, len(chunk), start, asked)
            if asked != NOTHING:
                future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
                live.wanted.append(_Wanted(live.epoch, start, part.end, asked, future))
                futures.append(future)
            await self._send_tokens([part], torch.tensor(chunk), [])
        return torch.cat([await future for future in futures])

    def rewind(self, live: Live, position: int) -> None:
        """Forget the tokens from a position on."""
        del live.tokens[position:]
        live.epoch += 1
        for wanted in live.wanted:
            wanted.future.cancel()
        live.wanted.clear()

    async def fork(self, live: Live, length: int) -> Live:
        """Begin a session with the first tokens of another."""
        new = await self.open()
        new.tokens = live.tokens[:length]
        for stage in range(len(self.cut)):
            await self._tell(
                stage, {"kind": "fork", "session": live.name, "new": new.name, "length": length}
            )
        return new

    async def end(self, live: Live) -> None:
        """Forget a session, here and on the workers."""
        self._live.pop(live.name, None)
        self._give_up(live, TaskFailed("The session was closed."))
        for stage in range(len(self.cut)):
            await self._tell(stage, {"kind": "close", "sessions": [live.name]})

    async def _send_tokens(
        self, parts: Sequence[Part], tokens: torch.Tensor, rebuilt: Sequence[int]
    ) -> None:
        body = {"kind": "pass", "parts": [astuple(part) for part in parts], "rebuilt": rebuilt}
        await self._tell(0, body, TensorDict({TOKENS: tokens}))

    async def _tell(self, stage: int, message: Message, values: TensorDict | None = None) -> None:
        """Send to a stage; if its worker is gone, mending sends again what matters."""
        link = self._links.get(self.addresses[stage])
        if link is None:
            return
        with contextlib.suppress(OSError):
            await link.send({**message, "deployment": self.name, "stage": stage}, values)

    # Mending

    async def _mend(self) -> None:
        """Put lost stages on other workers, and have what they knew sent to them again."""
        async with self._mending:
            while True:
                lost = [s for s, a in enumerate(self.addresses) if a not in self._links]
                if not lost:
                    return
                try:
                    for stage in lost:
                        self.addresses[stage] = await self._replacement(stage)
                except WorkersLost as error:
                    for live in self._live.values():
                        self._give_up(live, error)
                    return
                except OSError:
                    continue  # gone as well
                for stage in lost:
                    following = self.addresses[stage + 1] if stage + 1 < len(self.cut) else None
                    await self._tell(stage, {"kind": "route", "following": following})
                for first, last in _runs(lost):
                    await self._send_again(first, list(range(first, last + 1)), None)

    async def _replacement(self, stage: int) -> str:
        """Return a worker that has the stage open: a spare that has its weights, if there is one."""
        used = Counter(a for a in self.addresses if a in self._links)
        for address in sorted(self._links, key=lambda a: used[a]):
            if (stage, address) in self._opened and not used[address]:
                return address
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        while not (usable := self._membership.usable()):
            if loop.time() > deadline:
                raise WorkersLost(
                    f"0 of 1 workers joined {self._client.scheduler.address} within "
                    f"{self._wait_seconds:g} s."
                )
            await asyncio.sleep(_LOOK_SECONDS)
        address = min(usable, key=lambda a: (used[a], (stage, a) not in self._opened))
        if (stage, address) not in self._opened:
            self._note(f"Stage {stage} is being opened on {address}.")
            await loop.run_in_executor(None, self._open, [(stage, address)])
        await self._connect(address)
        return address

    async def _send_again(
        self, stage: int, rebuilt: list[int], names: Sequence[str] | None
    ) -> None:
        """Have a stage sent again what it has got so far, for all sessions or some."""
        lives = [live for live in self._live.values() if names is None or live.name in names]
        lives.sort(key=lambda live: not live.wanted)  # those that somebody waits for first
        sessions = [(live, *_still_wanted(live)) for live in lives if live.tokens]
        if not sessions:
            return
        if stage == 0:
            for live, deliver, want in sessions:
                tokens = torch.tensor(live.tokens)
                part = Part(live.name, live.epoch, 0, len(tokens), deliver, want)
                await self._send_tokens([part], tokens, rebuilt)
            return
        message = {
            "kind": "resend",
            "following": self.addresses[stage],
            "sessions": [(live.name, deliver, want) for live, deliver, want in sessions],
            "rebuilt": rebuilt,
        }
        await self._tell(stage - 1, message)

    async def _refill(self, stage: int, names: Sequence[str]) -> None:
        """A stage lacks what came before: it has got something out of turn."""
        async with self._mending:
            await self._send_again(stage, [stage], names)


def _still_wanted(live: Live) -> tuple[int, str]:
    """Return from which token on the stages behind must be given a session's tokens, and why."""
    if not live.wanted:
        return len(live.tokens), NOTHING
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
