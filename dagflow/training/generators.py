"""The generators that a run's data draws random numbers from, and their states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import DataLoader, IterableDataset

from dagflow_tasks.program.interpreter import RANDOM_LOCK

# Whoever looks through a data set doesn't look at every row of it.
_MOST_ITEMS, _MOST_OBJECTS = 64, 10_000
_LEAVES = (torch.Tensor, torch.nn.Module, np.ndarray, ModuleType, type, str, bytes, int, float)
_KINDS = (
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.BitGenerator,
    np.random.RandomState,
)


class Generators:
    """The generators that data draws from: the process's, and those that the data itself holds.

    They have the data's states while it is read, and the user's at all other times. So reading leaves
    no trace: whoever reads the same data again, from its beginning, reads the same.

    Other threads that draw from Python's or NumPy's global generator while a batch is read are not
    kept out, as dagflow's own workers are.
    """

    def __init__(self, data: Any) -> None:
        self._held = generators_in(data)
        self.held_states = [_state(generator) for generator in self._held]
        """States of the generators that the data holds. They go on from one epoch to the next."""
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Set what the process's generators will give to the data that is read next."""
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._python = random.Random(seed).getstate()
        self._numpy: np.random.BitGenerator = np.random.MT19937(seed)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give all generators to the data while the block runs, and to no worker of this process."""
        with RANDOM_LOCK, _left_as_they_are():
            theirs = [_state(generator) for generator in self._held]
            torch.set_rng_state(self._torch)
            random.setstate(self._python)
            set_bit_generator(self._numpy)
            _set_states(self._held, self.held_states)
            try:
                yield
            finally:
                self._torch = torch.get_rng_state()
                self._python = random.getstate()
                self._numpy = get_bit_generator()
                self.held_states = [_state(generator) for generator in self._held]
                _set_states(self._held, theirs)


@contextmanager
def _left_as_they_are() -> Iterator[None]:
    """Leave the process's generators as they were before the block."""
    torchs, pythons = torch.get_rng_state(), random.getstate()
    # Another object instead of another state: copying NumPy's takes ten times as long as the others.
    numpys, state = get_bit_generator(), np.random.get_state(legacy=False)
    try:
        yield
    finally:
        torch.set_rng_state(torchs)
        random.setstate(pythons)
        set_bit_generator(numpys)
        if state["has_gauss"]:  # the second of a pair of normal numbers, forgotten on the way
            np.random.set_state(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.get_state()


def _set_states(generators: Sequence[Any], states: Sequence[Any]) -> None:
    for generator, state in zip(generators, states, strict=True):
        _set_state(generator, state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)


def generators_in(data: Any) -> list[Any]:
    """Return the generators that data holds: a loader's, its samplers', a dataset's own.

    >>> from torch.utils.data import RandomSampler
    >>> len(generators_in(RandomSampler([1, 2], generator=torch.Generator())))
    1
    """
    # Those of the process have a seed for every epoch.
    numpys = (np.random.mtrand._rand, get_bit_generator())
    shared = (torch.default_generator, random._inst, *numpys)
    return [
        found
        for found in parts_of(data)
        if isinstance(found, _KINDS)
        and not isinstance(found, random.SystemRandom)
        and not any(found is generator for generator in shared)
    ]


def epoch_setters(data: Any) -> list[Callable[[int], Any]]:
    """Return the ``set_epoch`` of every part of the data that has one: samplers, datasets."""
    return [part.set_epoch for part in parts_of(data) if hasattr(type(part), "set_epoch")]


def doubts(data: Any) -> list[str]:
    """Return why the order of some data can't be the same when it is read again, as far as that shows."""
    found = []
    if isinstance(data, Iterator):
        found.append(
            "it is an iterator, which can be read once; to resume, pass one that yields the same "
            "batches from the first on"
        )
    for part in parts_of(data):
        if isinstance(part, random.SystemRandom):
            found.append("it holds a random.SystemRandom, which has no state to go back to")
        elif isinstance(part, DataLoader) and part.num_workers > 1 and not part.in_order:
            found.append("its DataLoader yields batches as they are ready (in_order=False)")
    return found


def is_ordered_by_indices(data: Any) -> bool:
    """Tell whether drawing the indices of a loader's samples moves on all that reading them does.

    So of torch's own loader, with its own samplers, unless what fetches the samples holds generators.
    """
    if type(data) is not DataLoader or isinstance(data.dataset, IterableDataset):
        return False
    samplers = (data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
    fetches = (data.dataset, data.collate_fn, data.worker_init_fn)
    return (
        all(s is None or type(s).__module__.startswith("torch.utils.data.") for s in samplers)
        and not data.persistent_workers  # processes of the loader's go on drawing, too
        and not generators_in(fetches)
    )


def pass_over_indices(loader: Any) -> int:
    """Draw an epoch's random numbers as a loader does that reads it; return its number of batches."""
    # The seed of its worker processes, which it draws without them, too.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return sum(1 for _ in sampler)


def parts_of(data: Any) -> Iterator[Any]:
    """Yield the objects that some data is made of, but no tensors, models and long sequences.

    Attributes, items of short lists, tuples, sets and dictionaries, what a function is bound to, and
    generators that are global variables of methods. Runs no code of the user's.
    """
    waiting: list[Any] = [data]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_OBJECTS:
        part = waiting.pop()
        if part is None or isinstance(part, _LEAVES) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if not isinstance(part, _KINDS):
            waiting += reversed(_inside(part))


def _inside(part: Any) -> list[Any]:
    if isinstance(part, FunctionType):
        closed_over = [c.cell_contents for c in part.__closure__ or () if _is_filled(c)]
        return [*closed_over, *_global_generators(part)]
    if isinstance(part, (MethodType, BuiltinMethodType)):
        return [part.__self__, *_inside(getattr(part, "__func__", None))]
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    attributes = dict(getattr(part, "__dict__", {}))
    if isinstance(part, DataLoader):
        attributes.pop("_iterator", None)  # of an epoch that is being read
    of_classes = [value for kind in type(part).__mro__ for value in vars(kind).values()]
    methods = [value for value in of_classes if isinstance(value, FunctionType)]
    return [
        *_items(part),
        *attributes.values(),
        *(value for value in of_classes if isinstance(value, _KINDS)),
        *(generator for method in methods for generator in _global_generators(method)),
    ]


def _items(part: Any) -> list[Any]:
    # Not by the user's own __iter__, where there is one: that may draw.
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(part, kind):
            return [*kind.__iter__(part)] if kind.__len__(part) <= _MOST_ITEMS else []
    if isinstance(part, dict):
        return [*dict.values(part)] if dict.__len__(part) <= _MOST_ITEMS else []
    return []


def _global_generators(function: FunctionType) -> list[Any]:
    """Return the generators among the global variables that a function's own code names."""
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [value for value in named if isinstance(value, _KINDS)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
