"""What a worker does for sessions: it takes in passes, computes its stages, and sends them on.

Passes that wait are computed together, whoever's they are. They come and go over connections that
stay open; dask's tasks only open and close stages.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any
from weakref import WeakKeyDictionary

from distributed import Worker, WorkerPlugin, get_worker

from dagflow.models.model import ModelRef, read_stage
from dagflow.plan.memory import WorkerMemory
from dagflow.serving.queueing import is_rewound, rewound, together
from dagflow.swarm import wire
from dagflow.swarm.dask_internals import DONT_REPLY, add_handler, connection_arguments, event_loop
from dagflow.swarm.links import OPERATION, CommClosedError, Link, Message
from dagflow.swarm.proofs import DRIVER, STAGE, Credentials, introduced, is_proven, may_send
from dagflow.swarm.workers import describe
from dagflow_tasks.decode.decoder_stage import (
    NOTHING,
    DecoderStage,
    Part,
    join,
    keep_from,
    select,
    split_logits,
)
from dagflow_tasks.device import current_device
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.tensors import TensorDict

# A pass of few tokens that is done so soon is computed on the event loop itself: it would be handed
# to another thread and back in a quarter of a millisecond, and in several if the machine is busy.
_FEW_TOKENS = 8
# A driver proves itself as soon as it has been announced.
UNPROVEN_SECONDS = 30.0
_SHORT_SECONDS = 0.02


@dataclass(frozen=True)
class StageSpec:
    """What a worker is asked to open.

    Attributes
    ----------
    deployment : str
        The model on a swarm that the stage is part of.
    stage : int
    model : ModelRef
    program : str
        As JSON.
    opening : str
        Tells it from an earlier opening of the same stage.
    """

    deployment: str
    stage: int
    model: ModelRef
    program: str
    opening: str


def open_stage(spec: StageSpec) -> int:
    """Read a stage's weights and have it take passes; returns the bytes of its weights."""
    return _hub(get_worker()).open(spec)


def take_part(deployment: str, credentials: Credentials, dask_worker: Any = None) -> WorkerMemory:
    """Have a worker listen to a deployment's driver, and say what memory it has for it.

    dask sets plugins up some time after a worker has joined.

    Raises
    ------
    PermissionError
        If another driver of that deployment is there.
    """
    limit = int(describe(dask_worker)["memory_bytes"])
    hub = _hub(dask_worker)
    hub.expect(deployment, credentials)
    return WorkerMemory(limit, hub.taken_bytes(deployment))


def cache_bytes(deployment: str, dask_worker: Any = None) -> dict[int, tuple[int, int]]:
    """Return what sessions' caches take in each of a deployment's stages on a worker, and their peak."""
    return _hub(dask_worker).cache_bytes(deployment)


def num_tokens_computed(deployment: str, dask_worker: Any = None) -> dict[int, int]:
    """Return how many tokens each of a deployment's stages on a worker has computed."""
    return _hub(dask_worker).num_tokens(deployment)


def sessions_open(dask_worker: Any = None) -> dict[tuple[str, int], int]:
    """Return how many sessions each stage on a worker remembers, by deployment and stage."""
    return _hub(dask_worker).num_sessions()


class SessionWorker(WorkerPlugin):  # type: ignore[misc]
    """Lets a worker take part in sessions."""

    name = "dagflow-sessions"
    # Registered once more by the next deployment it would be torn down before, with all stages.
    idempotent = True

    def setup(self, worker: Worker) -> None:
        wire.register()
        _hub(worker)

    def teardown(self, worker: Worker) -> None:
        hub = _HUBS.pop(worker, None)
        if hub is not None:
            hub.stop()


class _Hub:
    """A worker's stages and connections."""

    def __init__(self, worker: Worker) -> None:
        self.address = worker.address
        self._loop = event_loop(worker)
        self._arguments = connection_arguments(worker)
        self._stages: dict[tuple[str, int], _Running] = {}
        self._links: dict[tuple[str, str], asyncio.Task[Link]] = {}
        self.drivers: dict[str, Link] = {}
        self._known: dict[str, Credentials] = {}
        # Of its own: dask's threads may be busy with training.
        self.computing = ThreadPoolExecutor(1, "dagflow-sessions")
        add_handler(worker, OPERATION, self._serve)

    def expect(self, deployment: str, credentials: Credentials) -> None:
        """Take what a deployment's driver will prove itself with."""
        if self._known.get(deployment, credentials) != credentials and deployment in self.drivers:
            raise PermissionError(f"The deployment {deployment} has another driver.")
        self._known[deployment] = credentials
        later = (UNPROVEN_SECONDS, self._forget_unproven, deployment, credentials)
        self._loop.call_soon_threadsafe(self._loop.call_later, *later)

    def _forget_unproven(self, deployment: str, credentials: Credentials) -> None:
        """A driver that hasn't come by now has left on the way."""
        if deployment not in self.drivers and self._known.get(deployment) == credentials:
            self._forget(deployment)

    def open(self, spec: StageSpec) -> int:
        key = (spec.deployment, spec.stage)
        program = StageProgram.from_json(spec.program)
        stage = read_stage(spec.model, program, current_device())
        opened: Future[None] = Future()

        def take_up() -> None:
            if spec.deployment not in self.drivers:
                opened.set_exception(CommClosedError("The driver has left."))
                return
            known = self._stages.pop(key, None)
            if known is not None:
                known.stop()
            self._stages[key] = _Running(self, spec, stage)
            opened.set_result(None)

        self._loop.call_soon_threadsafe(take_up)
        opened.result()
        return stage.num_weight_bytes

    def num_tokens(self, deployment: str) -> dict[int, int]:
        return {s: r.num_tokens for (name, s), r in self._stages.items() if name == deployment}

    def num_sessions(self) -> dict[tuple[str, int], int]:
        return {key: running.num_sessions for key, running in self._stages.items()}

    def cache_bytes(self, deployment: str) -> dict[int, tuple[int, int]]:
        return {s: r.cache_bytes for (name, s), r in self._stages.items() if name == deployment}

    def taken_bytes(self, deployment: str) -> int:
        """What the stages of other deployments take."""
        others = [r for (name, _), r in list(self._stages.items()) if name != deployment]
        return sum(r.weight_bytes + r.cache_bytes[0] for r in others)

    def stop(self) -> None:
        for deployment in {key[0] for key in [*self._stages, *self._links]}:
            self._forget(deployment)
        self.computing.shutdown(wait=False)

    def _forget(self, deployment: str) -> None:
        """A driver has left: its stages and connections go, too."""
        self._known.pop(deployment, None)
        for key in [key for key in self._stages if key[0] == deployment]:
            self._stages.pop(key).stop()
        for name, address in [key for key in self._links if key[0] == deployment]:
            self._hang_up(name, address)

    async def _serve(self, comm: Any, deployment: str, role: str) -> Any:
        """Take messages from one connection until it ends."""
        link = Link(comm)
        try:
            known = self._known.get(deployment)
            if not await is_proven(link, self.address, deployment, role, known):
                await self._refuse(link, comm.peer_address, deployment, role)
            if role == DRIVER:
                self.drivers[deployment] = link
                await link.send({"kind": "welcome"})  # stages may be opened for it now
            while True:
                message = await link.receive()
                if not may_send(role, message, deployment):
                    await self._refuse(link, comm.peer_address, deployment, role)
                if message["kind"] == "ping":
                    await link.send(self._how_it_goes(deployment, message["stages"]))
                elif message["kind"] == "lost":
                    self._hang_up(deployment, message["address"])
                elif message["kind"] == "shut":
                    self._shut((deployment, message["stage"]), message["opening"])
                else:
                    self.take(message)
        except CommClosedError:
            return DONT_REPLY
        finally:
            if self.drivers.get(deployment) is link:
                del self.drivers[deployment]
                self._forget(deployment)

    async def _refuse(self, link: Link, peer: str, deployment: str, role: str) -> None:
        """Hang up on somebody who isn't who that says, and tell the deployment's driver."""
        link.close()
        await self.tell_driver(deployment, {"kind": "refused", "peer": peer, "role": str(role)})
        raise CommClosedError(f"{peer} isn't a {role} of the deployment {deployment}.")

    def _shut(self, key: tuple[str, int], opening: str) -> None:
        """Forget a stage, unless it has been opened again."""
        running = self._stages.get(key)
        if running is not None and running.opening == opening:
            self._stages.pop(key).stop()

    def _how_it_goes(self, deployment: str, stages: Sequence[tuple[int, str]]) -> Message:
        """Return which of the stages that a driver has open here aren't, and how long passes take.

        Parameters
        ----------
        stages
            Numbers and openings.
        """
        there = {
            (number, running.opening): running
            for (name, number), running in self._stages.items()
            if name == deployment and running.is_running
        }
        lacking = [(stage, opening) for stage, opening in stages if (stage, opening) not in there]
        seconds = max((running.busy_seconds for running in there.values()), default=0.0)
        return {"kind": "pong", "lacking": lacking, "busy_seconds": seconds}

    def take(self, message: Message) -> None:
        """Queue a message for its stage.

        Those for stages that aren't here any more are dropped: the driver learns from the next ping
        that the stage is gone, and has what matters sent to another.
        """
        running = self._stages.get((message["deployment"], message["stage"]))
        if running is None:
            return
        if message["kind"] == "pass":
            message["parts"] = [Part(*part) for part in message["parts"]]
        running.queue.put_nowait(message)

    async def send(self, address: str, message: Message, values: TensorDict | None = None) -> None:
        """Send to a stage on some worker. If that is gone, the driver has it sent again."""
        if address == self.address:
            self.take({**message, "values": values})
            return
        key = (message["deployment"], address)
        try:
            await (await self._link(key)).send(message, values)
        except OSError:
            # Without a connection of its own to that worker the driver wouldn't hear of it.
            if self._links.pop(key, None) is not None:
                await self.tell_driver(key[0], {"kind": "unreached", "address": address})

    async def tell_driver(
        self, deployment: str, message: Message, values: TensorDict | None = None
    ) -> None:
        """Send to a driver; if it is gone, nobody waits for it."""
        driver = self.drivers.get(deployment)
        if driver is not None:
            with suppress(OSError):
                await driver.send(message, values)

    async def _link(self, key: tuple[str, str]) -> Link:
        known = self._links.get(key)
        if known is None:
            known = asyncio.ensure_future(self._introduced(*key))
            self._links[key] = known
        if not known.done():
            await asyncio.wait([known])
        if known.cancelled():
            raise CommClosedError(f"The worker {key[1]} was given up.")
        return known.result()

    async def _introduced(self, deployment: str, address: str) -> Link:
        credentials = self._known.get(deployment)
        if credentials is None:
            raise CommClosedError("The driver has left.")
        return await introduced(address, self._arguments, deployment, STAGE, credentials)

    def _hang_up(self, deployment: str, address: str) -> None:
        """Wait no longer for a worker that may never read again what is sent to it."""
        link = self._links.pop((deployment, address), None)
        if link is None:
            return
        if not link.cancel() and link.exception() is None:
            link.result().close()


class _Running:
    """A stage, and the messages that wait for it."""

    def __init__(self, hub: _Hub, spec: StageSpec, stage: DecoderStage) -> None:
        self._hub = hub
        self._deployment = spec.deployment
        self._number = spec.stage
        self.opening = spec.opening
        self.weight_bytes = stage.num_weight_bytes
        self._last_seconds = math.inf  # of passes of few tokens
        self._busy_since: float | None = None
        self._following: str | None = None
        self._stage = stage
        self.queue: asyncio.Queue[Message] = asyncio.Queue()
        self._pump = asyncio.ensure_future(self._run())

    @property
    def num_tokens(self) -> int:
        return self._stage.num_tokens

    @property
    def num_sessions(self) -> int:
        return len(self._stage.sessions)

    @property
    def is_running(self) -> bool:
        """Whether anybody takes its messages."""
        return not self._pump.done()

    @property
    def busy_seconds(self) -> float:
        """For how long it has been computing the pass of this moment."""
        return 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since

    @property
    def cache_bytes(self) -> tuple[int, int]:
        return self._stage.num_cache_bytes, self._stage.peak_cache_bytes

    def stop(self) -> None:
        self._pump.cancel()

    async def _run(self) -> None:
        waiting: list[Message] = []
        while True:
            if not waiting:
                waiting.append(await self.queue.get())
            while not self.queue.empty():
                waiting.append(self.queue.get_nowait())
            passes = together(waiting)
            try:
                if passes:
                    del waiting[: len(passes)]
                    await self._compute(passes, rewound(waiting))
                    await asyncio.sleep(0)  # what has come meanwhile may join the next pass
                else:
                    await self._obey(waiting.pop(0))
            except Exception as error:
                sessions = list(self._stage.sessions)
                await self._tell({"kind": "failed", "sessions": sessions, "why": str(error)})

    async def _compute(
        self, messages: Sequence[Message], newest: Mapping[str, tuple[int, int]]
    ) -> None:
        """Compute one pass and send it on, without what sessions have been rewound from meanwhile."""
        rebuilt = messages[0]["rebuilt"]
        accepted: list[tuple[list[Part], TensorDict]] = []
        for message in messages:
            parts = message["parts"]
            over = {p for p in parts if self._stage.is_over(p) or is_rewound(p, newest)}
            gaps = {part for part in parts if part not in over and not self._stage.accepts(part)}
            if gaps:
                await self._tell({"kind": "gap", "sessions": [part.session for part in gaps]})
            dropped = over | gaps
            begins = [part.end if part in dropped else part.start for part in parts]
            kept, values = keep_from(parts, message["values"], begins)
            if kept:
                accepted.append((kept, values))
        if not accepted:
            return
        parts, values = join(accepted)
        try:
            done, outputs, seconds = await self._run_timed(parts, values)
        except Exception as error:
            sessions = [part.session for part in parts]
            await self._tell({"kind": "failed", "sessions": sessions, "why": str(error)})
            return
        # Those before have computed them in passes of theirs: one stands for all.
        computed = [*messages[0].get("computed", ()), (sum(p.count for p in parts), seconds)]
        if self._stage.is_last:
            await self._answer(done, outputs, computed)
            return
        wanted, outputs = select(done, outputs, self._number + 1 in rebuilt)
        if wanted:
            await self._send_on(wanted, outputs, rebuilt, computed)

    async def _run_timed(
        self, parts: Sequence[Part], values: TensorDict
    ) -> tuple[list[Part], TensorDict, float]:
        def timed() -> tuple[list[Part], TensorDict, float]:
            begin = time.perf_counter()
            done, outputs = self._stage.run(parts, values)
            return done, outputs, time.perf_counter() - begin

        few = sum(part.count for part in parts) <= _FEW_TOKENS
        if few and self._last_seconds < _SHORT_SECONDS:
            found = timed()
        else:
            self._busy_since = time.perf_counter()
            try:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self._hub.computing, timed)
            finally:
                self._busy_since = None
        if few:
            self._last_seconds = found[2]
        return found

    async def _answer(
        self, parts: Sequence[Part], outputs: TensorDict, computed: Sequence[tuple[int, float]]
    ) -> None:
        found = [p for p, logits in split_logits(parts, outputs["logits"]) if len(logits)]
        if found:
            message = {"kind": "logits", "parts": [astuple(part) for part in found]}
            await self._tell({**message, "computed": computed}, outputs)
        if silent := [part.session for part in parts if part.want == NOTHING]:
            await self._tell({"kind": "moved", "sessions": silent})

    async def _send_on(
        self,
        parts: Sequence[Part],
        values: TensorDict,
        rebuilt: Sequence[int],
        computed: Sequence[tuple[int, float]] = (),
    ) -> None:
        if self._following is None:
            return
        message = {
            "kind": "pass",
            "deployment": self._deployment,
            "stage": self._number + 1,
            "parts": [astuple(part) for part in parts],
            "rebuilt": list(rebuilt),
            "computed": list(computed),
        }
        await self._hub.send(self._following, message, values)

    async def _obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "close":
            for session in message["sessions"]:
                self._stage.close(session)
            await self._tell({"kind": "closed", "sessions": message["sessions"]})
        elif kind == "fork":
            if not self._stage.fork(message["session"], message["new"], message["length"]):
                await self._tell({"kind": "gap", "sessions": [message["new"]]})
            # From stage to stage, as tokens go: no later token comes before it.
            if self._following is not None:
                await self._hub.send(self._following, {**message, "stage": self._number + 1})
        elif kind == "route":
            self._following = message["following"]
        elif kind == "resend":
            self._following = message["following"]
            for session, deliver, want in message["sessions"]:
                sent = self._stage.resend(session, deliver, want)
                if sent is not None:
                    await self._send_on([sent[0]], sent[1], message["rebuilt"])

    async def _tell(self, message: Message, values: TensorDict | None = None) -> None:
        await self._hub.tell_driver(self._deployment, {**message, "stage": self._number}, values)


_HUBS: WeakKeyDictionary[Any, _Hub] = WeakKeyDictionary()


def _hub(worker: Any) -> _Hub:
    hub = _HUBS.get(worker)
    if hub is None:
        hub = _HUBS[worker] = _Hub(worker)
    return hub
