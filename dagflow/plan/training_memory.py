"""What a stage needs of its worker's memory in training. Pure: of a cut and a run's settings."""

from __future__ import annotations

from dataclasses import dataclass

from dagflow.graph.dag import OperatorDag, dtype_bytes
from dagflow.plan.memory import StageNeeds
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

    def optimizer_bytes(self, num_bytes: int) -> int:
        """Return what the optimizer keeps for so many bytes of trained weights."""
        return round(self.moments * num_bytes)

    def trained(self, num_bytes: int) -> int:
        """Return what so many bytes of trained weights take, without their gradients."""
        state = num_bytes + self.optimizer_bytes(num_bytes)
        return 2 * state if self.copies else state

    def sent(self, num_bytes: int) -> int:
        """Return what waits for the journal, if a micro-batch sends so many bytes."""
        return min(most_waiting_bytes(), num_bytes * self.num_microbatches * self.journal_steps)

    def needs(self, dag: OperatorDag, program: StageProgram, activation_bytes: int) -> StageNeeds:
        """Return what a stage needs whose micro-batches each leave so many bytes for the backward.

        As many of them are in flight as 1F1B has: one in the last stage, one more in each before it.
        """
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
        optimizer_bytes = self.optimizer_bytes(owned)
        return StageNeeds(
            weight_bytes=owned + lent,
            gradient_bytes=gradients,
            optimizer_bytes=optimizer_bytes,
            copy_bytes=owned + optimizer_bytes if self.copies else 0,
            activation_bytes=activation_bytes,
            in_flight=program.num_stages - program.stage,
            update_bytes=owned if self.scaled else 0,
            spool_bytes=self.sent(sum(dag.tensor_bytes(v.dtype, v.shape) for v in values)),
        )

    def state_bytes_by_node(self, dag: OperatorDag) -> list[int]:
        """Return what each operator adds to its stage's state: the weights that it is the first to use.

        Less than `needs` says where weights are tied: another stage then has them as well.
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
                    total += self.trained(size) if parameter.trainable else size
            found.append(total)
        return found
