"""What stages give each other besides activations and gradients: parts of them, tied parameters, buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dagflow_tasks.layout import copied
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.gradient_sums import finished_sums
from dagflow_tasks.train.references import StageRef, StateRef
from dagflow_tasks.train.results import BackwardResult, ForwardResult, StageResult, Tensors
from dagflow_tasks.train.worker_journal import JOURNAL, EntryKey, Sent

BUFFERS = "buffers"


def send(
    ref: StageRef,
    kind: str,
    place: tuple[int, int],
    tensors: Tensors,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Have the journal keep what a task sends to other stages."""
    step, index = place
    JOURNAL.put(ref, step, EntryKey(kind, ref.stage, index), Sent(dict(tensors), facts or {}))


def buffers_after(ref: StageRef, result: StageResult) -> Tensors:
    """Return a result's mutated buffers: its own, or the cache's if dask has moved the result."""
    return (
        result.buffers if result.buffers is not None else CACHE.recall(ref, BUFFERS, result.place)
    )


def select_values(result: ForwardResult, names: Sequence[str]) -> ForwardResult:
    """Keep the activations that one reader needs, so that no more travels."""
    return ForwardResult({name: result.values[name] for name in names})


def select_gradients(result: BackwardResult, names: Sequence[str]) -> BackwardResult:
    """Keep the gradients that one stage needs, so that no more travels."""
    present = {name: g for name, g in result.gradients.items() if name in names}
    return BackwardResult(present)


def lend_parameters(
    ref: StageRef, state: StateRef, names: Sequence[str], borrower: int = -1
) -> Tensors:
    """Return copies of parameters that another stage uses, too (tied weights)."""
    # Copies: `update` moves the cached weights on in place, and a result must not move with them.
    parameters = CACHE.state(ref, state.step).parameters
    lent = TensorDict({name: copied(parameters[name]) for name in names})
    send(ref, "lend", (state.step, borrower), lent)
    return lent


def return_gradients(
    ref: StageRef, gradients: BackwardResult, uses: Sequence[str], owner: int = -1
) -> Tensors:
    """Return the gradients of borrowed parameters to their owner, by use."""
    sums = finished_sums(ref, gradients)
    returned = TensorDict({use: sums[use] for use in uses if use in sums})
    send(ref, "return", (gradients.place[0], owner), returned)
    return returned


def tensors_of(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name a batch's tensors as programs do."""
    return {f"in.{name}": tensor for name, tensor in values.items()}
