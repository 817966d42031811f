"""What stages take in serving, and how many tokens all sessions' caches hold together. No IO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dagflow.graph.dag import OperatorDag, dtype_bytes
from dagflow.plan.memory import StageNeeds, WorkerMemory, cache_part, needs_by_worker
from dagflow_tasks.kernels.attention import ATTEND, look_back_bytes, reach_of
from dagflow_tasks.kernels.recurrence import RECURRENT, SCAN, WINDOW
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS
from dagflow_tasks.kernels.states import REACH_TOKENS, most_bytes
from dagflow_tasks.program.nodes import Node, argument_references
from dagflow_tasks.program.stage_program import StageProgram


def serving_needs(dag: OperatorDag, program: StageProgram) -> StageNeeds:
    """Return what a stage takes of its worker's memory, by its program."""
    tensors = {use.parameter: (use.dtype, use.shape) for use in program.parameters}
    tensors |= {use.buffer: (use.dtype, use.shape) for use in program.buffers}
    tensors |= {use.name: (use.dtype, use.shape) for use in program.constants}
    token_bytes = sum(_bytes(o.value.dtype, o.value.shape) for o in program.outputs)
    windows, session_bytes, pass_bytes = [], 0, 0
    for node in program.nodes:
        if node.op in RECURRENT:
            session_bytes += _state_bytes(dag, node)
        if node.op == ATTEND:
            names = [name for a in node.args[1:3] for name in argument_references(a)]
            layer_bytes = sum(_bytes(*dag.info[name].outputs[0]) for name in names)
            token_bytes += layer_bytes
            pass_bytes = max(pass_bytes, look_back_bytes(node.args))
            reach = reach_of(node.args)
            if reach is not None:
                windows.append((reach.most_tokens, layer_bytes))
    weight_bytes = sum(_bytes(*tensor) for tensor in tensors.values())
    return StageNeeds(weight_bytes, token_bytes, tuple(windows), session_bytes, pass_bytes)


def _state_bytes(dag: OperatorDag, node: Node) -> int:
    """Return what an operator with a state takes of a session at most."""
    # Of a scan's arguments the rates are the same for all tokens.
    given = [*node.args[:4], *node.args[6:]] if node.op == SCAN else node.args
    names = [name for argument in given for name in argument_references(argument)]
    known = {spec.name: (spec.dtype, spec.shape) for spec in dag.inputs}
    inputs = [known[name] if name in known else dag.info[name].outputs[0] for name in names]
    row_bytes = sum(_bytes(*tensor) for tensor in inputs)
    if node.op == SCAN:  # in float32: each head's keys times its values
        key, value = inputs[1][1], inputs[2][1]
        return most_bytes(key[3] * math.prod(value[2:]) * torch.float32.itemsize, row_bytes)
    return most_bytes(row_bytes * (node.args[1] - 1) if node.op == WINDOW else row_bytes, row_bytes)


def _bytes(dtype: str, shape: Iterable[object]) -> int:
    """Bytes of a tensor, of one token if it has any."""
    return math.prod(size for size in shape if isinstance(size, int)) * dtype_bytes(dtype)


@dataclass(frozen=True)
class Room:
    """How many tokens all sessions together may have, and what a long session takes of that.

    Attributes
    ----------
    capacity : int
        In tokens that every layer keeps.
    needs : tuple of StageNeeds
        Of each worker, over its stages.
    session_tokens : int
        What a session takes besides its tokens, in tokens.
    """

    capacity: int
    needs: tuple[StageNeeds, ...] = ()
    session_tokens: int = 0

    def taken(self, num_tokens: int) -> int:
        """Return what a session of so many tokens takes of the capacity.

        That is less than its tokens if layers have windows, and more if some have states.

        >>> Room(1000, (StageNeeds(0, 4, ((96, 3),)),)).taken(496)
        196
        >>> Room(1000, session_tokens=10).taken(5)
        15
        """
        if not num_tokens:
            return 0
        spared = min((need.spared(num_tokens) for need in self.needs), default=0)
        return num_tokens - spared + self.session_tokens

    @property
    def reach(self) -> int | None:
        """How many of a session's latest tokens can be gone back; None for all."""
        return REACH_TOKENS if self.session_tokens else None

    @property
    def longest(self) -> int:
        """How many tokens a session may have that is alone, as far as memory decides."""
        # The first length that is too much lies between these; what is taken never falls.
        low, high = 0, _NO_END
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.taken(middle) <= self.capacity else (low, middle)
        return low // BLOCK_TOKENS * BLOCK_TOKENS


# More tokens than any session has.
_NO_END = 1 << 40


def cache_budget(
    memory: WorkerMemory, weight_bytes: int, needs: StageNeeds, cache_bytes: int | None
) -> int:
    """Return what caches of stages may take on a worker that holds so many bytes of weights.

    One session may have all of it, and a pass of it looks back at all: that takes its part, too.
    """
    most = int((memory.free_bytes - weight_bytes) * cache_part(needs, cache_bytes))
    return most if cache_bytes is None else min(most, cache_bytes)


def room_of(
    addresses: Sequence[str],
    needs: Sequence[StageNeeds],
    weight_bytes: Mapping[str, int],
    workers: Mapping[str, WorkerMemory],
    cache_bytes: int | None,
) -> Room:
    """Return the room for sessions; parameters are those of `tokens_that_fit`.

    A session takes the share of the room that its states take of the budget on the worker where this
    is largest, so neither many short sessions nor a long one can be too much for any.
    """
    capacity = tokens_that_fit(addresses, needs, weight_bytes, workers, cache_bytes)
    own = needs_by_worker(needs, addresses)
    budgets = {a: cache_budget(workers[a], weight_bytes[a], own[a], cache_bytes) for a in own}
    shares = [-(-capacity * need.session_bytes // max(1, budgets[a])) for a, need in own.items()]
    return Room(capacity, tuple(own.values()), max(shares))


def tokens_that_fit(
    addresses: Sequence[str],
    needs: Sequence[StageNeeds],
    weight_bytes: Mapping[str, int],
    workers: Mapping[str, WorkerMemory],
    cache_bytes: int | None,
) -> int:
    """Return how many tokens all sessions together may have: what the fullest worker can hold.

    Parameters
    ----------
    addresses
        The worker of each stage.
    needs
        Of each stage.
    weight_bytes
        What each worker has open, stages included that it isn't asked to compute.
    workers
        Memory by address.
    cache_bytes
        Budget of a worker; None for `CACHE_SHARE` of what weights leave.
    """
    room = min(
        max(0, cache_budget(workers[address], weight_bytes[address], need, cache_bytes))
        // max(1, need.token_bytes)
        for address, need in needs_by_worker(needs, addresses).items()
    )
    return room // BLOCK_TOKENS * BLOCK_TOKENS
