"""Runs the user's model eagerly, and leaves it as it was: what a captured graph is compared with."""

from __future__ import annotations

import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from dagflow.check.draws import Draw, RecordDraws
from dagflow.check.locate import watch_modules
from dagflow.check.uncut import Outcome
from dagflow.graph.batch import rebuilder
from dagflow.graph.effects import Snapshot
from dagflow.graph.loss import LossFunction, LossModule
from dagflow.graph.outside import Outside
from dagflow_tasks.program.interpreter import RANDOM_LOCK

_SEED = 20

Script = Sequence[tuple[Sequence[torch.Tensor], Collection[str] | None]]
"""Batches (the flattened batch's tensors, in order) to run one after the other, each with the
parameters whose gradients are wanted; None runs no backward."""


class Eager:
    """The user's model and loss, which run as they are and are put back as they were.

    Not copies: what closures, hooks and lists hold of a model would still be the model's own.

    Parameters
    ----------
    model, loss
    example
        A batch as the model is called with, for its structure.
    changed : mapping
        Values of parameters, by name, to run with instead of the model's.
    draws : bool
        Whether the model draws random numbers, so that they are to be recorded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: LossFunction | None,
        example: Any,
        changed: Mapping[str, torch.Tensor],
        draws: bool,
    ) -> None:
        self._model, self._changed, self._draws = model, changed, draws
        self._module = LossModule(model, loss, rebuilder(example))
        self._state = _State(self._module)
        self.draws_in_python = False
        self.changed_attributes: list[str] = []

    def outcomes(
        self,
        script: Script,
        *,
        nudge: int | None = None,
        python_seed: int = 0,
        grad: bool = True,
    ) -> list[tuple[Outcome, list[Draw]]]:
        """Run the model, from the state that it was given in, on batches.

        Sets `draws_in_python` (whether it has drawn from Python's or NumPy's generators) and
        `changed_attributes` (which of its plain attributes the last forward has changed).

        Parameters
        ----------
        nudge : int, optional
            Change every parameter at random by a unit in its last place, differently for each.
        python_seed : int
            For Python's and NumPy's generators.
        grad : bool
            False saves the memory that a backward would need.
        """
        self.draws_in_python = False
        with self._state.put_back():
            self._state.set(self._changed, nudge)
            return [
                self._run(tensors, keep, python_seed=python_seed, grad=grad)
                for tensors, keep in script
            ]

    def watched(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], list[Draw]]:
        """Run the model on a batch, and return what its modules have returned, by path."""
        results, end = watch_modules(self._model)
        try:
            ((_, draws),) = self.outcomes([(tensors, None)])
        finally:
            end()
        return results, draws

    def _run(
        self,
        tensors: Sequence[torch.Tensor],
        keep: Collection[str] | None,
        *,
        python_seed: int,
        grad: bool,
    ) -> tuple[Outcome, list[Draw]]:
        before = _plain_attributes(self._model)
        with _left_alone(python_seed) as has_drawn, torch.set_grad_enabled(grad):
            recorder = RecordDraws()
            with recorder if self._draws else nullcontext():
                loss = self._module(*(tensor.detach().clone() for tensor in tensors))
            found: Outcome = {("loss", ""): loss.detach().clone()}
            if keep is not None and loss.requires_grad:
                found |= self._gradients(loss, keep)
            self.draws_in_python |= has_drawn()
        found |= {("buffer", n): b.detach().clone() for n, b in self._model.named_buffers()}
        found |= {("parameter", n): p for n, p in self._state.parameters()}
        self.changed_attributes = _changed(before, _plain_attributes(self._model))
        return found, recorder.draws

    def _gradients(self, loss: torch.Tensor, keep: Collection[str]) -> Outcome:
        parameters = dict(self._model.named_parameters())
        # Other gradients may be as large as the model; nobody looks at them.
        others = [p for n, p in parameters.items() if n not in keep and p.requires_grad]
        with _gradients_left_alone([*parameters.values(), *_leaves(loss)]):
            hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in others]  # type: ignore[no-untyped-call]
            try:
                torch.autograd.backward(loss)
            finally:
                for hook in hooks:
                    hook.remove()
            # Of a sparse embedding it is sparse, and few operators take that.
            return {
                ("gradient", name): parameter.grad.to_dense()
                for name, parameter in parameters.items()
                if parameter.grad is not None
            }


class _State:
    """All that running a model may change: its parameters, buffers, attributes, what it closes over.

    Whether forward has written a tensor is told by its numbers: what is written through ``.data``
    leaves no other trace.
    """

    def __init__(self, module: LossModule) -> None:
        model = module.model
        self._parameters = dict(model.named_parameters())
        self._snapshot, self._outside = Snapshot(module), Outside(module)
        tensors = [*self._parameters.values(), *model.buffers()]
        self._kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._values: Mapping[str, torch.Tensor] = {}
        self._written: set[str] = set()
        self._is_nudged = False

    def set(self, values: Mapping[str, torch.Tensor], nudge: int | None) -> None:
        """Give parameters other values."""
        for name, parameter in self._parameters.items():
            data = parameter.data  # whose version no backward asks for
            if name in values:
                data.copy_(values[name])
            if nudge is not None and data.is_floating_point():
                data.copy_(nudged(data, nudge))
        self._values, self._is_nudged = values, nudge is not None

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the parameters' values: copies of those that forward has written."""
        for (name, parameter), (_, kept) in zip(self._parameters.items(), self._kept, strict=False):
            given = self._values.get(name, kept)
            if not self._is_nudged and not torch.equal(parameter, given):
                self._written.add(name)
            yield name, parameter.detach().clone() if name in self._written else given

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put everything back at the end."""
        try:
            yield
        finally:
            self._snapshot.restore()
            self._outside.restore()
            for tensor, kept in self._kept:
                if not torch.equal(tensor, kept):
                    tensor.data.copy_(kept)


@contextmanager
def _gradients_left_alone(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Take tensors' gradients and the user's hooks on accumulated ones away for a backward."""
    kept = [(tensor, tensor.grad, dict(_accumulating(tensor))) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
        _accumulating(tensor).clear()
    try:
        yield
    finally:
        for tensor, gradient, hooks in reversed(kept):
            tensor.grad = gradient
            _accumulating(tensor).update(hooks)


def _accumulating(tensor: torch.Tensor) -> dict[int, Any]:
    found: dict[int, Any] | None = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return {} if found is None else found


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors to which a backward would give a gradient."""
    found: dict[int, torch.Tensor] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def nudged(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a tensor with every number changed by a unit in its last place, or not, at random."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    signs = torch.randint(-1, 2, tensor.shape, generator=generator, device=tensor.device)
    return tensor * (1 + torch.finfo(tensor.dtype).eps * signs.to(tensor.dtype))


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


@contextmanager
def _left_alone(python_seed: int) -> Iterator[Any]:
    """Run user code with seeds of our own, and leave every generator as it was."""
    here, numpy_state = random.getstate(), np.random.get_state()
    random.seed(python_seed)
    np.random.seed(python_seed)
    begin = random.getstate(), _position(np.random.get_state())

    def has_drawn() -> bool:
        return begin != (random.getstate(), _position(np.random.get_state()))

    try:
        with (
            RANDOM_LOCK,
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(_SEED)
            yield has_drawn
    finally:
        random.setstate(here)
        np.random.set_state(numpy_state)


def _position(state: Any) -> Any:
    return state[2], bytes(state[1].tobytes())


def _plain_attributes(model: torch.nn.Module) -> dict[str, Any]:
    """Return what modules remember besides parameters and buffers: numbers, and which tensor."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)):
                found[f"{path}.{name}" if path else name] = value
            elif isinstance(value, torch.Tensor):
                found[f"{path}.{name}" if path else name] = id(value), value._version
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, value in after.items() if before.get(name) != value)
