"""Brings each step's batch to the workers: scattered by the driver, or read by the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from distributed import Client

from dagflow.errors import BatchInvalid, WorkersLost
from dagflow.graph.batch import flatten_batch, take_rows, without_columns
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.swarm.clusters import in_background
from dagflow.swarm.dask_internals import Task, TaskRef
from dagflow.swarm.interrupts import TICK_SECONDS
from dagflow.training.dask_tasks import Key, task
from dagflow.training.data import BatchStream, TokenDataset, num_rows, read_rows, split_rows
from dagflow.training.seen import SeenBatches
from dagflow.training.step_graph import StepGraph
from dagflow_storage import shown_url
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.exchange import tensors_of
from dagflow_tasks.train.references import Microbatch
from dagflow_tasks.train.worker_journal import JOURNAL, EntryKey, Sent


@dataclass(frozen=True)
class StepBatch:
    """A step's batch, on its way to the workers.

    Attributes
    ----------
    microbatches : tuple of Microbatch
    argument : callable
        ``argument(stage, index)`` is what stands for the batch in the graph.
    tasks : mapping
        Tasks that the graph needs besides its own.
    held : list
        Futures to keep until the step is done.
    amount, unit
        Size of the batch in tokens or samples.
    samples : mapping
        Which samples of the data these are, for the ledger.
    parts : sequence
        The micro-batches' tensors, where the driver holds them.
    """

    microbatches: tuple[Microbatch, ...]
    argument: Callable[[int, int], Any]
    tasks: Mapping[Key, Task]
    amount: int
    unit: str
    samples: Mapping[str, Any]
    held: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    parts: Sequence[Mapping[str, torch.Tensor]] = ()


class Feed(ABC):
    """Prepares the batch of one step after the other.

    Attributes
    ----------
    look_around : callable
        Called while the feed waits; may raise, which ends the wait.
    """

    look_around: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def prepare(self, step: int, graph: StepGraph) -> StepBatch | None:
        """Return the step's batch, or None when there is no more data.

        Called again after an error, it returns the same step's batch.
        """

    @abstractmethod
    def prepare_again(
        self, batch: StepBatch, step: int, graph: StepGraph, lost: Collection[int]
    ) -> StepBatch:
        """Return a batch that is on its way for another graph; some stages have lost theirs."""


class StreamFeed(Feed):
    """Takes batches from the user's data and scatters each stage's part to its worker."""

    def __init__(
        self,
        stream: BatchStream,
        dag: OperatorDag,
        num_microbatches: int,
        loss_weights: LossWeights,
        client: Client,
        addresses: Sequence[str],
        seen: SeenBatches,
    ) -> None:
        self._stream = stream
        self._seen = seen
        self._dag = dag
        self._num_microbatches = num_microbatches
        self._client = client
        self._addresses = addresses
        self._loss_weights = loss_weights
        self._taken: tuple[Any, dict[str, Any]] | None = None

    def prepare(self, step: int, graph: StepGraph) -> StepBatch | None:
        if self._taken is None:
            batch = self._stream.take()
            if batch is None:
                return None
            epoch, number = self._stream.position
            known = self._seen.check(step, (epoch, number), batch)
            self._taken = (batch, {"epoch": epoch, "batch": number, "fingerprint": known})
        batch, samples = self._taken
        parts, microbatches = split_batch(
            self._dag, batch, step, self._num_microbatches, self._loss_weights
        )
        held = self._sent(graph.programs, parts, step, graph)
        amount, unit = measure(parts)
        self._taken = None
        return StepBatch(microbatches, _of(held), {}, amount, unit, samples, held, parts)

    def prepare_again(
        self, batch: StepBatch, step: int, graph: StepGraph, lost: Collection[int]
    ) -> StepBatch:
        held = {place: future for place, future in batch.held.items() if place[0] not in lost}
        again = [program for program in graph.programs if program.stage in lost]
        held |= self._sent(again, batch.parts, step, graph)
        return replace(batch, argument=_of(held), held=held)

    def _sent(
        self,
        programs: Sequence[StageProgram],
        parts: Sequence[Mapping[str, torch.Tensor]],
        step: int,
        graph: StepGraph,
    ) -> dict[tuple[int, int], Any]:
        """Send some stages their parts of a batch; all of them, or none is kept on the workers."""
        held: dict[tuple[int, int], Any] = {}
        try:
            for program in programs:
                held |= self._sent_to(program, parts, step, graph)
        except BaseException:
            # By hand: the error's traceback holds them, and a cycle of frames may hold that for long.
            for future in held.values():
                future.release()
            raise
        return held

    def _sent_to(
        self,
        program: StageProgram,
        parts: Sequence[Mapping[str, torch.Tensor]],
        step: int,
        graph: StepGraph,
    ) -> dict[tuple[int, int], Any]:
        names = program.batch_inputs
        if not names:
            return {}
        data = [TensorDict({n: part[n] for n in names}) for part in parts]
        # Nobody else can say again what only the driver has read.
        for index, part in enumerate(data):
            key = EntryKey("batch", program.stage, index)
            JOURNAL.put(graph.refs[program.stage], step, key, Sent(part, {}))
        futures = self._scatter(data, self._addresses[program.stage])
        return {(program.stage, index): future for index, future in enumerate(futures)}

    def _scatter(self, data: Sequence[TensorDict], address: str) -> Sequence[Any]:
        """Send data to a worker, looking around while it takes: a frozen one takes for ever."""
        sending = self._client.scatter(data, workers=[address], hash=False, asynchronous=True)
        pending = in_background(self._client, sending)
        try:
            while not wait([pending], TICK_SECONDS).done:
                self.look_around()
            try:
                futures: Sequence[Any] = pending.result()
            except (OSError, KeyError) as error:  # dask's ways of saying that nobody is there
                raise WorkersLost(f"The worker {address} left, and takes no more data.") from error
            return futures
        finally:
            # Whoever has looked around and leaves doesn't cancel: the scheduler would remember what
            # arrives all the same. So its futures come, and as nobody has them, they go at once. And
            # an error in it has a traceback, which would hold it.
            del pending


@dataclass(frozen=True)
class TokenRows:
    """Reads the micro-batches of a token dataset; what a worker is given to read them itself."""

    dataset: TokenDataset
    bounds: tuple[tuple[int, int], ...]
    names: tuple[str, ...]

    def __call__(self, step: int, index: int) -> TensorDict:
        return read_rows(self.dataset, step, *self.bounds[index], self.names)


class TokenFeed(Feed):
    """Has the workers read their own rows of a token dataset."""

    def __init__(
        self,
        dataset: TokenDataset,
        dag: OperatorDag,
        num_microbatches: int,
        loss_weights: LossWeights,
    ) -> None:
        self._dataset = dataset
        self._bounds = split_rows(dataset.batch_size, num_microbatches, least_rows(dag))
        self._split = partial(
            split_batch, dag, num_microbatches=num_microbatches, loss_weights=loss_weights
        )
        # Most losses weigh every step's micro-batches alike; then the driver reads no tokens.
        self._reads_all = loss_weights.need_values
        self._first = self._split(self._rows(0), 0)[1]
        self._amount = dataset.batch_size * dataset.sequence_length

    def _rows(self, step: int) -> dict[str, torch.Tensor]:
        return self._dataset.rows(step, 0, self._dataset.batch_size)

    def prepare(self, step: int, graph: StepGraph) -> StepBatch | None:
        if self._reads_all:
            microbatches = self._split(self._rows(step), step)[1]
        else:
            microbatches = tuple(replace(microbatch, step=step) for microbatch in self._first)
        return StepBatch(
            microbatches,
            lambda stage, index: TaskRef(graph.key("batch", step, stage, index)),
            self._reads(step, graph),
            self._amount,
            "tokens",
            {
                "tokens": shown_url(self._dataset.url),
                "seed": self._dataset.seed,
                "rows": self._dataset.batch_size,
            },
        )

    def prepare_again(
        self, batch: StepBatch, step: int, graph: StepGraph, lost: Collection[int]
    ) -> StepBatch:
        found = self.prepare(step, graph)
        assert found is not None
        return found

    def _reads(self, step: int, graph: StepGraph) -> dict[Key, Task]:
        tasks: dict[Key, Task] = {}
        for program in graph.programs:
            if program.batch_inputs:
                read = self.rows(program)
                for index in range(len(self._bounds)):
                    key = graph.key("batch", step, program.stage, index)
                    tasks[key] = task(key, read, step, index)
        return tasks

    def rows(self, program: StageProgram) -> TokenRows:
        """Return what reads a stage's part of the data on its worker."""
        return TokenRows(self._dataset, tuple(self._bounds), program.batch_inputs)


def _of(held: Mapping[tuple[int, int], Any]) -> Callable[[int, int], Any]:
    return lambda stage, index: TaskRef(held[(stage, index)].key)


def least_rows(dag: OperatorDag) -> int:
    """Return how many rows a micro-batch has at least.

    Two, although most captured operators are right for one row as well: a batch must be split alike
    whether or not that is known.
    """
    rows = {max(2, symbol.minimum) for symbol in dag.symbols if symbol.dim == 0}
    fixed = [spec.shape[0] for spec in dag.inputs if spec.shape and isinstance(spec.shape[0], int)]
    return max([*rows, *fixed], default=1)


def split_batch(
    dag: OperatorDag, batch: Any, step: int, num_microbatches: int, loss_weights: LossWeights
) -> tuple[list[dict[str, torch.Tensor]], tuple[Microbatch, ...]]:
    """Check a batch, split it into micro-batches, and weigh them.

    Returns
    -------
    parts
        Tensors of each micro-batch by value name.
    microbatches
        A weight of 0 says that nothing of a micro-batch counts.

    Raises
    ------
    BatchInvalid
        If the batch doesn't fit the captured signature.
    """
    where = f"step {step}"
    tensors, constants = flatten_batch(without_columns(batch, dag.dropped_columns))
    rows = num_rows(tensors, where, is_split=num_microbatches > 1)
    bounds = split_rows(rows, num_microbatches, least_rows(dag))
    parts = [take_rows(tensors, begin, end) for begin, end in bounds]
    sizes = [match_batch(dag, part, constants, where) for part in parts]
    named = [tensors_of(part) for part in parts]
    shares = loss_weights(named, [dict(s) for s in sizes], whole_batch(dag, tensors, constants))
    microbatches = tuple(
        Microbatch(step, index, share.weight, sizes[index], share.numbers)
        for index, share in enumerate(shares)
    )
    return named, microbatches


def whole_batch(
    dag: OperatorDag, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
    """Return a batch's tensors by value name, and its sizes; None if the DAG can't run it whole."""
    try:
        sizes = match_batch(dag, tensors, constants, "the batch")
    except BatchInvalid:
        return None
    return tensors_of(tensors), dict(sizes)


def measure(parts: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, str]:
    """Return a batch's size: tokens if its first tensor is an integer matrix, samples otherwise."""
    first = [next(iter(part.values())) for part in parts]
    if first[0].dim() == 2 and not first[0].is_floating_point():
        return sum(tensor.numel() for tensor in first), "tokens"
    return sum(tensor.shape[0] if tensor.dim() else 1 for tensor in first), "samples"
