"""What a worker needs for the stages that it trains. Pure: of a cut and a run's settings.

Whoever asks whether a stage fits somewhere asks here: the cut, placing, and placing again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dagflow.graph.dag import OperatorDag, dtype_bytes
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.train.worker_journal import most_waiting_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """What of a run's settings decides how much memory its stages take.

    Attributes
    ----------
    moments : float
        Bytes that the optimizer keeps for each byte of a trained weight: 0 of SGD, 1 with momentum,
        2 of AdamW.
    copies : bool
        Whether snapshots are written while training goes on, each from a copy of the state.
    scaled : bool
        Whether gradients are clipped or scaled: a copy of them that an update takes then.
    num_microbatches : int
    journal_steps : int
        Steps that the journal gathers before it writes them; 0 without one.
    """

    moments: float = 2.0
    copies: bool = True
    scaled: bool = False
    num_microbatches: int = 8
    journal_steps: int = 1

    def trained(self, num_bytes: int) -> int:
        """Return what so many bytes of trained weights take, without their gradients."""
        state = num_bytes + round(self.moments * num_bytes)
        return 2 * state if self.copies else state

    def sent(self, num_bytes: int) -> int:
        """Return what waits for the journal, if a micro-batch sends so many bytes."""
        return min(most_waiting_bytes(), num_bytes * self.num_microbatches * self.journal_steps)


@dataclass(frozen=True)
class StageNeeds:
    """What a stage takes of its worker's memory.

    Attributes
    ----------
    weight_bytes : int
        Weights and buffers that it computes with, each once; those included that others own.
    state_bytes : int
        Weights, buffers, gradients (a sum for each use of a trained weight), what the optimizer
        keeps, and the copy for a snapshot.
    activation_bytes : int
        Left behind by one micro-batch's forward for its backward.
    update_bytes : int
        Taken by an update, when no micro-batch is under way any more.
    spool_bytes : int
        Sent, and not yet written to the journal.
    """

    weight_bytes: int
    state_bytes: int
    activation_bytes: int
    update_bytes: int
    spool_bytes: int

    def total(self, in_flight: int) -> int:
        """Return all of it with so many micro-batches under way."""
        passing = max(self.activation_bytes * in_flight, self.update_bytes)
        return self.state_bytes + self.spool_bytes + passing

    @classmethod
    def of(
        cls,
        dag: OperatorDag,
        program: StageProgram,
        activation_bytes: int,
        training: TrainingMemory,
    ) -> StageNeeds:
        owned, lent, gradients = 0, 0, 0
        seen: set[str] = set()
        for use in program.parameters:
            size = dag.tensor_bytes(use.dtype, use.shape)
            gradients += size if use.trainable else 0
            if use.parameter in seen:
                continue
            seen.add(use.parameter)
            if use.trainable and use.owner == program.stage:
                owned += size
            else:
                lent += size
        buffers = {use.buffer: dag.tensor_bytes(use.dtype, use.shape) for use in program.buffers}
        lent += sum(buffers.values())
        values = [output.value for output in program.outputs if output.readers]
        values += [i.value for i in program.inputs if i.source is not None and i.differentiable]
        return cls(
            weight_bytes=owned + lent,
            state_bytes=training.trained(owned) + lent + gradients,
            activation_bytes=activation_bytes,
            update_bytes=owned if training.scaled else 0,
            spool_bytes=training.sent(sum(dag.tensor_bytes(v.dtype, v.shape) for v in values)),
        )


def state_bytes_by_node(dag: OperatorDag, training: TrainingMemory) -> list[int]:
    """Return what each operator adds to its stage's state: the weights that it is the first to use.

    Less than `StageNeeds` where weights are tied: another stage then has them as well.
    """
    uses = {use: parameter for parameter in dag.parameters for use in parameter.uses}
    owned: set[str] = set()
    found = []
    for node in dag.nodes:
        total = 0
        for name in dict.fromkeys(node.references()):
            parameter = uses.pop(name, None)
            if parameter is None:
                continue
            size = parameter.num_elements * dtype_bytes(parameter.dtype)
            if parameter.trainable:
                total += size  # its gradients
            if parameter.name not in owned:
                owned.add(parameter.name)
                total += training.trained(size) if parameter.trainable else size
        found.append(total)
    return found


def by_worker(stage_bytes: Iterable[float], placement: Sequence[int]) -> dict[int, float]:
    """Return what each worker needs for all its stages together."""
    needed: dict[int, float] = {}
    for worker, num_bytes in zip(placement, stage_bytes, strict=True):
        needed[worker] = needed.get(worker, 0) + num_bytes
    return needed
