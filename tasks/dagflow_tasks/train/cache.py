"""What a worker remembers between tasks. Everything here can be lost: tasks rebuild it.

The process has one cache, shared by all its workers and threads. Entries belong to a stage of a
run, so two stages on one worker don't meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dagflow_tasks.device import current_device
from dagflow_tasks.errors import StateLost
from dagflow_tasks.program.interpreter import Executable
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.train.references import StageRef
from dagflow_tasks.train.state import StageState, load_state

StageKey = tuple[str, str, int]

COPY = "copy for a snapshot"


@dataclass
class SavedGraph:
    """What ``F`` leaves for the backward, or ``I`` for ``W``.

    Attributes
    ----------
    inputs, uses, outputs : dict
        The tensors at the ends of autograd's graph, by name. After ``I``, `uses` have got the
        gradients that weren't deferred.
    weights : WeightGradients
        Makes the gradients of large weights.
    halved : bool
        Whether ``I`` is done.
    finite : bool
        Whether all floating-point values of the forward are finite.
    loss : float or None
        The micro-batch's loss, in the stage that computes it.
    """

    inputs: dict[str, torch.Tensor]
    uses: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    weights: WeightGradients
    halved: bool = False
    finite: bool = True
    loss: float | None = None


@dataclass
class WorkerCache:
    """Programs, weights and saved autograd graphs by stage.

    Attributes
    ----------
    recomputed : int
        Forwards that ran again because a graph was gone.
    tell : callable or None
        Takes what whoever drives the run should hear: a mapping that JSON can hold, with its ``action``.
    """

    programs: dict[StageKey, Executable] = field(default_factory=dict)
    states: dict[StageKey, StageState] = field(default_factory=dict)
    graphs: dict[tuple[StageKey, int, int], SavedGraph] = field(default_factory=dict)
    kept: dict[tuple[StageKey, str], tuple[tuple[int, int], Any]] = field(default_factory=dict)
    recomputed: int = 0
    lock: Any = field(default_factory=threading.RLock)
    working: dict[StageKey, Any] = field(default_factory=dict)
    tell: Callable[[Mapping[str, Any]], object] | None = None
    turns: dict[StageKey, tuple[int, int]] = field(default_factory=dict)

    def stage_lock(self, ref: StageRef) -> Any:
        """Return the lock that whoever works on a stage holds, so that nobody sees half a task.

        Not to be asked for with `lock` held, which is for moments: who holds this one may be
        reading from the store.
        """
        with self.lock:
            return self.working.setdefault(ref.key, threading.RLock())

    def clear(self) -> None:
        """Forget everything."""
        self._forget(lambda key: True, self.programs, self.states, self.turns)

    def forget(self, run_id: str, *, but_plan: str | None = None) -> None:
        """Forget a run, or all but one of its plans. Other runs may be under way beside it."""

        def outdated(key: StageKey) -> bool:
            return key[0] == run_id and key[1] != but_plan

        self._forget(outdated, self.programs, self.states, self.turns)

    def forget_stage(self, ref: StageRef) -> None:
        """Forget a stage that is another worker's now, but for a copy that is still to be written."""
        self._forget(lambda key: key == ref.key, self.programs, self.states, spare=COPY)

    def begin_again(self, ref: StageRef) -> None:
        """Forget what is half done in a stage: it will be taken up at a step's beginning."""
        self._forget(lambda key: key == ref.key)

    def _forget(
        self,
        unwanted: Callable[[StageKey], bool],
        *tables: dict[StageKey, Any],
        spare: str | None = None,
    ) -> None:
        """Drop stages' graphs and what was kept of them, and their entries in some tables."""
        with self.lock:
            for table in tables:
                for key in [key for key in table if unwanted(key)]:
                    del table[key]
            for graph in [key for key in self.graphs if unwanted(key[0])]:
                del self.graphs[graph]
            for kept in [key for key in self.kept if unwanted(key[0]) and key[1] != spare]:
                del self.kept[kept]

    def executable(self, ref: StageRef) -> Executable:
        """Return the stage's program ready to run, reading it from the store if need be."""
        found = self.programs.get(ref.key)
        if found is None:
            with self.stage_lock(ref):  # other stages' tasks don't wait for this one's store
                found = self.programs.get(ref.key) or self._read_executable(ref)
                self.programs[ref.key] = found
        return found

    def _read_executable(self, ref: StageRef) -> Executable:
        text = ref.store.read_bytes(f"programs/{ref.plan}/stage-{ref.stage:03d}.json")
        program = StageProgram.from_json(text.decode("utf-8"))
        return Executable(program, current_device(), ref.settings.precision)

    def state(self, ref: StageRef, step: int) -> StageState:
        """Return the stage's state after `step` steps, from the store if it isn't here.

        Raises
        ------
        StateLost
            If it is neither here nor in the store; or if the stage has moved on here: whoever asks
            for an earlier step is a task that nobody waits for any more, run again by dask.
        """
        with self.stage_lock(ref):
            found = self.states.get(ref.key)
            if found is not None and found.step > step:
                raise StateLost(
                    f"Stage {ref.stage} has done step {found.step} on this worker; its weights after "
                    f"step {step} are gone."
                )
            if found is None or found.step != step:
                executable = self.executable(ref)
                found = load_state(ref, executable.program, step, executable.device)
                self.states[ref.key] = found
            return found

    def save_graph(self, ref: StageRef, step: int, microbatch: int, graph: SavedGraph) -> None:
        """Keep a graph for its backward, dropping what a cancelled step may have left."""
        with self.lock:
            for key in [k for k in self.graphs if k[0] == ref.key and k[1] < step]:
                del self.graphs[key]
            self.graphs[(ref.key, step, microbatch)] = graph

    def take_graph(self, ref: StageRef, step: int, microbatch: int) -> SavedGraph | None:
        """Return a saved graph and forget it: a graph serves one backward."""
        with self.lock:
            return self.graphs.pop((ref.key, step, microbatch), None)

    def keep(self, ref: StageRef, what: str, place: tuple[int, int], kept: Any) -> None:
        """Remember a stage's newest gradient sums or buffers beside the result that holds them.

        dask may move a result to another worker and back (its memory manager, spilling), and these
        don't travel.
        """
        with self.lock:
            self.kept[(ref.key, what)] = (place, kept)

    def recall(self, ref: StageRef, what: str, place: tuple[int, int]) -> Any:
        """Return what was kept.

        Raises
        ------
        StateLost
            If it isn't here.
        """
        known, kept = self.newest(ref, what)
        if known != place:
            raise state_lost(ref, what, place)
        return kept

    def take(self, ref: StageRef, what: str, place: tuple[int, int]) -> Any:
        """Return what was kept and forget it; None if it isn't here."""
        with self.lock:
            known, kept = self.newest(ref, what)
            if known != place:
                return None
            self.drop(ref, what)
            return kept

    def newest(self, ref: StageRef, what: str) -> tuple[tuple[int, int], Any]:
        """Return what was kept last and its place; (-1, -1) and None if nothing was."""
        with self.lock:
            return self.kept.get((ref.key, what), ((-1, -1), None))

    def drop(self, ref: StageRef, what: str) -> None:
        """Forget what was kept: the step is done."""
        with self.lock:
            self.kept.pop((ref.key, what), None)


def state_lost(ref: StageRef, what: str, place: tuple[int, int]) -> StateLost:
    """Return the error for something that was on a worker and nowhere else."""
    return StateLost(
        f"The {what} of stage {ref.stage} after micro-batch {place[1]} of step {place[0]} were on a "
        "worker that is gone."
    )


CACHE = WorkerCache()
