"""Has workers open the stages of a model, and holds the connections to them.

Which worker gets which stage is decided in `dagflow.plan.placement`. Knows nothing of sessions. Between
the driver and each worker there is one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from distributed import Client, Future

from dagflow.errors import StoreUnreachable, WorkersLost
from dagflow.models.model import Model
from dagflow.plan import placement
from dagflow.plan.memory import WorkerMemory, fits
from dagflow.plan.partition import Partition
from dagflow.plan.placement import Assignment, NoRoom
from dagflow.plan.serving_memory import Room, room_of, serving_needs
from dagflow.serving.opening import opened
from dagflow.serving.stage_server import SessionWorker, StageSpec, take_part
from dagflow.swarm.clusters import reconnect, register_on_workers
from dagflow.swarm.dask_internals import client_stream, connection_arguments
from dagflow.swarm.health import LOOK_SECONDS, PASS_SECONDS, is_frozen
from dagflow.swarm.links import CommClosedError, Link, Message
from dagflow.swarm.membership import Membership
from dagflow.swarm.proofs import DRIVER, Issuer, introduced
from dagflow_tasks.tensors import TensorDict

_CONNECT_SECONDS = 5.0
_RETRY_SECONDS = 1.0


class Placement:
    """The stages of one model on one swarm. All but `start` and `stop` run on the client's loop.

    Parameters
    ----------
    name : str
        Tells the workers one deployment from another.
    model : Model
    cut : Partition
    client : Client
    wait_seconds : float
        How long to wait for workers when too few are left.
    cache_bytes : int, optional
        What sessions' caches may take on a worker; see `memory.worker_bytes`.
    hear : callable
        Gets the messages that workers send, and their addresses.
    lost : callable
        Hears which worker is gone, how, and with which stages; or which of its stages are.
    came : callable
        Awaited when a worker has come, before it is made a spare.
    note : callable
        Tells people what happens.
    spawn : callable
        Begins a coroutine whose errors somebody hears of.

    Attributes
    ----------
    assignment : Assignment
        The worker of each stage; nobody while it is lost.
    needs : list of StageNeeds
        Of each stage.
    patience_seconds : float
        A worker that computes one pass for longer is given up.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        cut: Partition,
        client: Client,
        *,
        wait_seconds: float,
        cache_bytes: int | None,
        hear: Callable[[Message, str], None],
        lost: Callable[[str, str, list[int]], None],
        came: Callable[[], Awaitable[None]],
        note: Callable[[str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.assignment = Assignment(())
        self.patience_seconds = PASS_SECONDS
        self.needs = [serving_needs(model.dag, program) for program in cut.programs]
        self._name = name
        self._ref = model.ref
        self._cut = cut
        self._client = client
        self._wait_seconds = wait_seconds
        self._cache_bytes = cache_bytes
        self._hear, self._lost, self._came = hear, lost, came
        self._note, self._spawn = note, spawn
        self._issuer = Issuer()
        self._membership = Membership(client)
        self._connection: object = None
        self._scheduler = client.scheduler.address
        self._memory: dict[str, WorkerMemory] = {}
        # Open stages, and those that are being opened, by stage and address.
        self._opened: dict[tuple[int, str], asyncio.Task[Future]] = {}
        self._links: dict[str, Link] = {}
        self._inviting: set[str] = set()
        self._joined = asyncio.Event()

    def name(self, address: str) -> str:
        """Return how a worker is called."""
        return self._membership.name(address)

    def start(self) -> None:
        """Hear of workers that come and go, and have them take part."""
        connection = client_stream(self._client)
        self._membership.__enter__()
        register_on_workers(self._client, SessionWorker(), self._wait_seconds)
        # Last: if it was lost meanwhile, all of it is to be done again.
        self._connection = connection

    def stop(self) -> None:
        """Hear of them no more."""
        self._membership.__exit__()

    def _start_again(self) -> None:
        """Go on with the scheduler that is there now: the connection to the one before was lost.

        Not on the client's loop: it waits.

        Raises
        ------
        SchedulerLost
            If none comes in time.
        """
        reconnect(self._client, self._wait_seconds)
        self.stop()
        self._membership = Membership(self._client)
        self.start()
        self._note(f"The scheduler {self._scheduler} is back.")

    async def place(self) -> None:
        """Connect to all workers, and have the stages opened.

        Raises
        ------
        WorkersLost
            If no worker has come in time.
        StageTooLarge
            If the workers can't hold the model.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        while not self._links:
            await asyncio.gather(*(self._connect(a) for a in self._membership.usable()))
            if not self._links:  # they may have come this moment, or come back
                if loop.time() > deadline:
                    raise WorkersLost(self._nobody_has_joined())
                await asyncio.sleep(LOOK_SECONDS)
        here = {address: self._memory[address] for address in self._links}
        self.assignment = placement.place(self.needs, here, self._cache_bytes)
        opening = (self._open(stage, address) for stage, address in enumerate(self.addresses))
        for error in await asyncio.gather(*opening, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, OSError):
                raise error
        self._unassign(  # to be replaced, be their workers there or not
            stage
            for stage, address in enumerate(self.addresses)
            if not self.is_open(stage, address)
        )

    def look_after(self) -> None:
        """From now on notice who leaves and who comes; spares read weights."""
        self._spawn(self._watch())
        for address in self._links.keys() - set(self.addresses):
            self._spawn(self._warm(address))

    async def end(self) -> None:
        """Hang up; workers forget their stages when their driver does."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        for opening in self._opened.values():
            opening.cancel()
        await asyncio.gather(*self._opened.values(), return_exceptions=True)
        self._opened.clear()

    # What is there

    @property
    def addresses(self) -> tuple[str, ...]:
        """The worker of each stage; empty while nobody has it."""
        return self.assignment.workers

    @property
    def num_workers(self) -> int:
        """How many workers take part, spares included."""
        return len(self._links)

    @property
    def num_placed_on(self) -> int:
        """How many workers have a stage."""
        return len(set(self.addresses))

    def is_here(self, address: str) -> bool:
        """Tell whether a worker takes part."""
        return address in self._links

    def missing(self) -> list[int]:
        """Return the stages that no worker has now."""
        return [s for s, address in enumerate(self.addresses) if address not in self._links]

    def places(self) -> set[tuple[int, str]]:
        """Return the stages that some worker has now, with its address."""
        return {(s, a) for s, a in enumerate(self.addresses) if a in self._links}

    def spares(self) -> list[str]:
        """Return the workers without a stage that have the weights of all."""
        return [
            address
            for address in list(self._links)
            if address not in self.addresses
            and all(self.is_open(stage, address) for stage in range(len(self._cut)))
        ]

    def is_open(self, stage: int, address: str) -> bool:
        """Tell whether a worker has the weights of a stage, be it its own or not."""
        opening = self._opened.get((stage, address))
        if opening is None or not opening.done():
            return False
        return not opening.cancelled() and opening.exception() is None

    def room(self) -> Room:
        """Return how many tokens all sessions together may have where the stages are now."""
        weights = {
            address: sum(self.needs[s].weight_bytes for s, a in self._opened if a == address)
            for address in self.addresses
        }
        here = self._memory_here()
        return room_of(self.addresses, self.needs, weights, here, self._cache_bytes)

    def _memory_here(self) -> dict[str, WorkerMemory]:
        return {address: self._memory[address] for address in self._links}

    def _unassign(self, stages: Iterable[int]) -> None:
        self.assignment = self.assignment.moved(dict.fromkeys(stages, ""))

    # Messages

    async def tell(self, stage: int, message: Message, values: TensorDict | None = None) -> None:
        """Send to a stage; if its worker is gone, mending sends again what matters."""
        link = self._links.get(self.addresses[stage])
        if link is not None:
            await self._send(link, {**message, "deployment": self._name, "stage": stage}, values)

    async def _listen(self, address: str, link: Link) -> None:
        try:
            while True:
                message = await link.receive()
                if message["kind"] == "pong":
                    self._hear_pong(address, message)
                else:
                    self._hear(message, address)
        except CommClosedError:
            if self._links.get(address) is link:
                self.give_up(address, "has left")

    @staticmethod
    async def _send(link: Link, message: Message, values: TensorDict | None = None) -> None:
        with contextlib.suppress(OSError):
            await link.send(message, values)

    # Workers come and go

    async def _connect(self, address: str) -> None:
        """Hold a connection to a worker, if it can be reached."""
        known = self._issuer.credentials(address)
        arguments = connection_arguments(self._client)
        link: Link | None = None
        try:
            ready = self._client.run(
                take_part, self._name, known, workers=[address], asynchronous=True
            )
            self._memory.update(await asyncio.wait_for(ready, _CONNECT_SECONDS))
            link = await introduced(address, arguments, self._name, DRIVER, known)
            # Before it knows the driver it opens no stage; its task would overtake a slow connection.
            await asyncio.wait_for(link.receive(), _CONNECT_SECONDS)
        except BaseException as error:
            if link is not None:
                link.close()
            if isinstance(error, OSError | ValueError):
                return  # frozen, or it has left; if it is still there at the next look, once more
            raise
        self._links[address] = link
        self._joined.set()
        self._spawn(self._listen(address, link))

    async def _watch(self) -> None:
        """Notice workers that are silent, though their connections are open, and those that come."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if client_stream(self._client) is not self._connection:
                with contextlib.suppress(OSError):  # lost once more: the next look tries again
                    await asyncio.to_thread(self._start_again)
            usable = set(self._membership.usable())
            for address, link in list(self._links.items()):
                link.num_unheard += 1
                if address not in usable:
                    self.give_up(address, "has left")
                # Looks are counted: if it is this process that didn't move, nobody else is to blame.
                elif is_frozen(link.num_unheard * LOOK_SECONDS, owes_answer=True):
                    self.give_up(address, "has fallen silent")
                elif not link.is_sending:
                    self._spawn(self._send(link, {"kind": "ping", "stages": self._on(address)}))
            for address in usable - self._links.keys() - self._inviting:
                self._spawn(self._invite(address))

    def _on(self, address: str) -> list[tuple[int, str]]:
        """Return the stages that a worker has open, as it told us, and which opening of them."""
        return [
            (stage, opening.result().key)
            for (stage, other), opening in self._opened.items()
            if other == address and self.is_open(stage, address)
        ]

    def _hear_pong(self, address: str, message: Message) -> None:
        """Notice that a worker which answers has lost a stage, or computes one pass for ever."""
        if message["busy_seconds"] > self.patience_seconds:
            why = f"has been computing one pass for {message['busy_seconds']:.0f} s"
            self._membership.exclude(address, why)
            self.give_up(address, why)
            return
        # One that was shut or opened again since the ping is another opening.
        lacking = {(stage, opening) for stage, opening in message["lacking"]}
        gone = [stage for stage, opening in self._on(address) if (stage, opening) in lacking]
        for stage in gone:
            del self._opened[stage, address]
        stages = [stage for stage in gone if self.addresses[stage] == address]
        self._unassign(stages)
        if stages:
            self._lost(address, "has lost what it had open", stages)
        if gone:
            self._spawn(self._make_useful(address))

    async def _invite(self, address: str) -> None:
        """Make a worker that has come, or come back, a spare."""
        self._inviting.add(address)
        try:
            await self._connect(address)
        finally:
            self._inviting.discard(address)
        if address in self._links:
            await self._make_useful(address)

    async def _make_useful(self, address: str) -> None:
        """Give a worker a stage that nobody has, or have it read weights as a spare."""
        await self._came()  # first: what it gets leaves less memory for a spare's weights
        await self._warm(address)

    def give_up(self, address: str, how: str) -> None:
        """A worker can't be reached any more, or doesn't move."""
        link = self._links.pop(address, None)
        if link is not None:
            link.close()
        self._opened = {place: o for place, o in self._opened.items() if place[1] != address}
        for other in self._links.values():  # they need wait no longer, either
            self._spawn(self._send(other, {"kind": "lost", "address": address}))
        stages = self.assignment.stages_of(address)
        self._unassign(stages)  # were it to come back, it would have forgotten
        self._lost(address, how, stages)

    # Stages are opened and shut

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
        key = f"open-stage-{self._name}-{stage}-{uuid.uuid4().hex[:6]}"
        spec = StageSpec(self._name, stage, self._ref, self._cut[stage].to_json(), key)
        return await opened(self._client, spec, address, link)

    async def _warm(self, address: str) -> None:
        """Have a spare read all weights that it has memory for: it may have to replace anybody."""
        try:
            while (stage := self._next_at_hand(address)) is not None:
                await self._open(stage, address)
        except OSError:
            return
        except Exception as error:
            self._note(f"The spare {address} can't read all weights: {error}")

    def _next_at_hand(self, address: str) -> int | None:
        """Return which stage's weights a spare should read next."""
        here = self._memory_here()
        idle = {a: here[a] for a in here.keys() - set(self.addresses)}
        reading = {(stage, a) for stage, a in self._opened if a in idle}
        stages, caches = range(len(self.needs)), self._cache_bytes
        wanted = placement.spares(stages, self.needs, idle, reading, cache_bytes=caches)
        return next((stage for stage, spare in wanted if spare == address), None)

    def shut_unneeded(self, address: str) -> None:
        """Have a worker forget weights of stages that it hasn't got."""
        for stage in range(len(self._cut)):
            if self.is_open(stage, address) and self.addresses[stage] != address:
                opening = self._opened.pop((stage, address)).result().key
                message = {"kind": "shut", "stage": stage, "opening": opening}
                self._spawn(self._send(self._links[address], message))

    async def replace(self, stage: int) -> str:
        """Put a stage on another worker that has memory for it, and return its address.

        Raises
        ------
        WorkersLost
            If none that could hold it has come in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        said = ""
        while True:
            try:
                address = self._best_for(stage)
            except NoRoom as full:
                self._joined.clear()
                lacking = str(full) if self._links else "All workers are gone"
                if lacking != said:
                    said = lacking
                    self._note(f"{lacking}; waiting for others (dagflow join {self._scheduler}).")
                try:
                    await asyncio.wait_for(self._joined.wait(), deadline - loop.time())
                except TimeoutError as error:
                    raise WorkersLost(self._nobody_for(full)) from error
                continue
            if not self.is_open(stage, address):
                self._note(f"Stage {stage} is being opened on {address}.")
                if not self._has_room_beside_all(stage, address):
                    self.shut_unneeded(address)
            try:
                await self._open(stage, address)
            except OSError:
                continue  # gone as well
            except StoreUnreachable as error:  # which isn't the worker's fault
                if loop.time() > deadline:
                    raise WorkersLost(
                        f"The weights of stage {stage} can't be read: {error}"
                    ) from error
                self._note(f"The weights of stage {stage} can't be read now: {error}")
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as error:
                self._membership.exclude(address, str(error))
                self.give_up(address, f"can't open stage {stage}: {error}")
            else:
                self.assignment = self.assignment.moved({stage: address})
                return address

    def _best_for(self, stage: int) -> str:
        """Return who should take a stage; raises NoRoom if nobody has the memory."""
        at_hand = {place for place in self._opened if self.is_open(*place)}
        here, caches = self._memory_here(), self._cache_bytes
        found = placement.replace(self.assignment, [stage], self.needs, here, at_hand, caches)
        return found.workers[stage]

    def _has_room_beside_all(self, stage: int, address: str) -> bool:
        """Tell whether a worker has memory for a stage beside all weights that it has read."""
        own = {*self.assignment.stages_of(address), stage}
        others = [self.needs[s] for s, a in self._opened if a == address and s not in own]
        needs = [self.needs[s] for s in sorted(own)]
        return fits(needs, self._memory[address], self._cache_bytes, others)

    def _nobody_has_joined(self) -> str:
        waited = f"within {self._wait_seconds:g} s"
        return f"0 of 1 workers joined {self._scheduler} {waited}."

    def _nobody_for(self, full: NoRoom) -> str:
        if not self._links:
            return self._nobody_has_joined()
        waited = f"{self._scheduler} within {self._wait_seconds:g} s"
        return f"{full} of {len(self._links)}, and none with room has joined {waited}."
