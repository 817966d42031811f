"""Runs copies of the user's model eagerly: what a captured graph is compared with."""

from __future__ import annotations

import copy
import random
import types
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from dagflow.graph.batch import rebuilder
from dagflow.graph.loss import LossFunction, LossModule
from dagflow.plan.draws import Draw, RecordDraws
from dagflow.plan.locate import watch_modules
from dagflow.plan.uncut import Outcome
from dagflow_tasks.interpreter import RANDOM_LOCK

_SEED = 20


class Eager:
    """The user's model and loss, which are left alone: a copy of them, that `begin` takes, runs.

    Parameters
    ----------
    model, loss
    example
        A batch as the model is called with, for its structure.
    changed : mapping
        Values of parameters, by name, that copies get instead of the model's.
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
        self._given, self._example = (model, loss), example
        self._changed = changed
        self._draws = draws

    def begin(self, *, nudge: int | None = None, python_seed: int = 0) -> None:
        """Take a new copy.

        Parameters
        ----------
        nudge : int, optional
            Change every parameter at random by a unit in its last place, differently for each.
        python_seed : int
            For Python's and NumPy's generators.
        """
        model, loss = copy_model(*self._given)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._changed:
                    parameter.copy_(self._changed[name])
                if nudge is not None and parameter.is_floating_point():
                    parameter.copy_(nudged(parameter, nudge))
        self._model = model
        self._versions = {name: p._version for name, p in model.named_parameters()}
        self._module = LossModule(model, loss, rebuilder(self._example))
        self._seed = python_seed
        self.draws_in_python = False
        self.changed_attributes: list[str] = []

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        keep: Collection[str] | None = None,
        *,
        grad: bool = True,
    ) -> tuple[Outcome, list[Draw]]:
        """Run the copy on a batch.

        Sets `draws_in_python` (whether it has drawn from Python's or NumPy's generators) and
        `changed_attributes` (which of its plain attributes the forward has changed).

        Parameters
        ----------
        tensors
            The flattened batch's tensors, in order.
        keep
            Parameters whose gradients are wanted; None runs no backward.
        grad : bool
            False saves the memory that a backward would need.

        Returns
        -------
        outcome, draws
        """
        before = _plain_attributes(self._model)
        with _left_alone(self._seed) as has_drawn, torch.set_grad_enabled(grad):
            found = self._run(tensors, keep)
            self.draws_in_python |= has_drawn()
        self.changed_attributes = _changed(before, _plain_attributes(self._model))
        return found

    def watched(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], list[Draw]]:
        """Run a new copy on a batch, and return what its modules have returned, by path."""
        self.begin()
        results, end = watch_modules(self._model)
        _, draws = self.run(tensors)
        end()
        return results, draws

    def _run(
        self, tensors: Sequence[torch.Tensor], keep: Collection[str] | None
    ) -> tuple[Outcome, list[Draw]]:
        parameters = dict(self._model.named_parameters())
        # Other gradients may be as large as the model; nobody looks at them.
        others = [p for n, p in parameters.items() if n not in (keep or ()) and p.requires_grad]
        recorder = RecordDraws()
        with recorder if self._draws else nullcontext():
            loss = self._module(*(tensor.detach().clone() for tensor in tensors))
        found: Outcome = {("loss", ""): loss.detach().clone()}
        if keep is not None and loss.requires_grad:
            hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in others]  # type: ignore[no-untyped-call]
            loss.backward()
            for hook in hooks:
                hook.remove()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    # Of a sparse embedding it is sparse, and few operators take that.
                    found["gradient", name] = parameter.grad.to_dense()
                    parameter.grad = None
        found |= {("buffer", n): b.detach().clone() for n, b in self._model.named_buffers()}
        for name, parameter in parameters.items():
            written = parameter._version != self._versions[name]
            now = parameter.detach()
            found["parameter", name] = now.clone() if written else now
        return found, recorder.draws


def copy_model(
    model: torch.nn.Module, loss: LossFunction | None
) -> tuple[torch.nn.Module, LossFunction | None]:
    """Copy a model and its loss, which may hold the model, or results of earlier forwards."""
    memo: dict[int, Any] = {}
    parts = [part for part in (model, loss) if isinstance(part, torch.nn.Module)]
    for module in [module for part in parts for module in part.modules()]:
        for tensor in _tensors(list(vars(module).values())):
            if tensor.grad_fn is not None:  # deepcopy refuses those
                memo[id(tensor)] = tensor.detach().clone()
    copied = copy.deepcopy(model, memo)
    for parameter, ours in zip(model.parameters(), copied.parameters(), strict=True):
        for hook in (parameter._backward_hooks or {}).values():
            ours.register_hook(hook)  # type: ignore[no-untyped-call]
    if isinstance(loss, types.FunctionType):
        return copied, _copied_function(loss, memo)
    return copied, copy.deepcopy(loss, memo)


def _copied_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return a function that uses copies of the modules and tensors that it uses by name."""

    def is_ours(value: Any) -> bool:
        return isinstance(value, (torch.nn.Module, torch.Tensor))

    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    changed = {n: copy.deepcopy(v, memo) for n, v in named.items() if is_ours(v)}
    cells = []
    for cell in function.__closure__ or ():
        try:
            ours = is_ours(cell.cell_contents)
        except ValueError:  # nothing in it yet
            ours = False
        cells.append(types.CellType(copy.deepcopy(cell.cell_contents, memo)) if ours else cell)
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **changed} if changed else function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )


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


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []
