"""From the user's data to the micro-batches of each step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.training.generators import (
    Generators,
    epoch_setters,
    is_ordered_by_indices,
    pass_over_indices,
)
from dagflow.training.seen import SeenBatches
from dagflow_storage import TokenArray, shown_url, write_tokens
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.exchange import tensors_of


@dataclass(frozen=True)
class TokenDataset:
    """Windows at random places of a long row of tokens, read by the workers themselves.

    Step k, row r always sees the same window, whoever reads it and whenever. A batch is a mapping
    with ``input_ids`` and ``labels`` (B, T), int64; labels are the next tokens, shifted already
    unless `shifted` is False (Hugging Face models shift them themselves).

    Attributes
    ----------
    url : str
        Where `write` put the tokens: a folder that all workers see, or any fsspec URL.
    batch_size, sequence_length : int
    seed : int
    shifted : bool
    """

    url: str
    batch_size: int
    sequence_length: int
    seed: int = 0
    shifted: bool = True

    def __repr__(self) -> str:
        return (
            f"TokenDataset({shown_url(self.url)!r}, batch_size={self.batch_size}, "
            f"sequence_length={self.sequence_length}, seed={self.seed}, shifted={self.shifted})"
        )

    @staticmethod
    def write(
        url: str,
        tokens: np.ndarray[Any, Any] | Iterable[np.ndarray[Any, Any]],
        dtype: str = "uint16",
    ) -> int:
        """Write tokens as a compressed zarr array and return how many there are."""
        return write_tokens(url, tokens, dtype=dtype)

    def __len__(self) -> int:
        """Return the number of batches that hold as many tokens as the array."""
        length = len(_token_array(self.url))
        return max(1, length // (self.batch_size * self.sequence_length))

    def rows(self, step: int, begin: int, end: int) -> dict[str, torch.Tensor]:
        """Return rows `begin` to `end` of a step's batch."""
        array = _token_array(self.url)
        window = self.sequence_length + (1 if self.shifted else 0)
        if len(array) < window:
            raise BatchInvalid(
                f"{shown_url(self.url)} holds {len(array)} tokens; a window of {window} doesn't fit. "
                "Use a shorter sequence_length or more text."
            )
        places = len(array) - window + 1
        offsets = np.array([_draw(self.seed, step, row) % places for row in range(begin, end)])
        tokens = torch.from_numpy(array.read(offsets, window))
        if self.shifted:
            return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
        return {"input_ids": tokens, "labels": tokens.clone()}


_ARRAYS: dict[str, TokenArray] = {}


def _token_array(url: str) -> TokenArray:
    if url not in _ARRAYS:
        _ARRAYS[url] = TokenArray(url)
    return _ARRAYS[url]


def _draw(seed: int, step: int, row: int) -> int:
    digest = blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_rows(
    dataset: TokenDataset, step: int, begin: int, end: int, names: tuple[str, ...]
) -> TensorDict:
    """Read some rows of a step's batch; runs on a worker."""
    rows = tensors_of(dataset.rows(step, begin, end))
    return TensorDict({name: tensor for name, tensor in rows.items() if name in names})


def split_rows(num_rows: int, num_microbatches: int, minimum: int) -> list[tuple[int, int]]:
    """Split rows into micro-batches whose sizes differ by one at most.

    There are fewer micro-batches than asked for if a micro-batch would have less than `minimum`
    rows (the least that the model was captured for).

    >>> split_rows(10, 4, 2)
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    count = max(1, min(num_microbatches, num_rows // max(1, minimum)))
    small, larger = divmod(num_rows, count)
    bounds = [0]
    for index in range(count):
        bounds.append(bounds[-1] + small + (1 if index < larger else 0))
    return list(itertools.pairwise(bounds))


def num_rows(tensors: Mapping[str, torch.Tensor], where: str, *, is_split: bool = True) -> int:
    """Return the batch's number of rows: the first dimension, which all tensors share.

    Parameters
    ----------
    is_split : bool
        Whether there are several micro-batches. Tensors of a batch that stays whole may have rows of
        their own (patches of images beside one row for each image); the most are returned.

    Raises
    ------
    BatchInvalid
    """
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.dim()}
    if not sizes or (is_split and len(set(sizes.values())) != 1):
        raise BatchInvalid(
            "All tensors of a batch that is split into micro-batches share their first dimension, the "
            f"rows; found {sizes} in {where}. What to do: num_microbatches=1 takes batches whole (rows "
            "of patches beside a row for each image); or give all tensors the same rows."
        )
    rows = max(sizes.values())
    if min(sizes.values()) == 0:
        raise BatchInvalid(f"The batch of {where} has no rows.")
    return rows


class BatchStream:
    """The user's batches by step, in order, over as many epochs as needed.

    A mapping-like or iterable dataset is read again in every epoch. What it draws from the process's
    generators (torch's, Python's, NumPy's) depends on the seed and the epoch alone; generators that
    it holds, such as a DataLoader's, go on from epoch to epoch as in a plain loop, from where they
    were when the stream was made. What has a ``set_epoch`` is told the epoch. So a run that goes back,
    or is resumed, sees the batches that it would have seen, and nobody's generators are changed.

    Attributes
    ----------
    position : tuple of int
        Epoch and number of the batch that was taken last.
    step : int
        How many batches were taken.
    """

    def __init__(self, data: Any, epochs: int | None, seed: int, batch_size: int | None) -> None:
        self._data = _batches_of(data, batch_size)
        self._epochs = epochs
        self._seed = seed
        self._generators = Generators(self._data)
        self._set_epoch = epoch_setters(self._data)
        self._starts: list[_EpochStart] = []
        self._batches: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        self._number = 0  # of the next batch that is read from this epoch
        self.position = (0, -1)
        self.step = 0

    def steps_per_epoch(self) -> int | None:
        """Return the number of batches an epoch, if the data knows it."""
        try:
            return len(self._data)
        except TypeError:
            return None

    def peek(self) -> Any:
        """Return the next batch without taking it."""
        if not self._read_ahead():
            raise BatchInvalid("The data holds no batch.")
        return self._ahead[0]

    def take(self) -> Any | None:
        """Return the next batch, or None after the last."""
        if not self._read_ahead():
            return None
        self.position = (len(self._starts) - 1, self._number - 1)
        self.step += 1
        return self._ahead.pop()

    def seek(self, step: int, seen: SeenBatches | None = None) -> None:
        """Go to a step's batch, back or forwards; batches on the way must be those of before.

        Raises
        ------
        BatchInvalid
            If one isn't.
        """
        if step < self.step:
            self._go_back(step)
        self.skip(step - self.step, seen)

    def skip(self, num_batches: int, seen: SeenBatches | None = None) -> None:
        """Go past batches that an earlier run has used."""
        end = self.step + num_batches
        while self.step < end:
            if self._pass_over_epoch(end):
                continue
            batch = self.take()
            if batch is None:
                return
            if seen is not None:
                seen.check(self.step - 1, self.position, batch)

    def _read_ahead(self) -> bool:
        """Have the next batch at hand; False after the last."""
        while self._epoch_is_over():
            if self._starts and not self._number:
                self._warn_of_the_end()
                return False
            if len(self._starts) == self._epochs:
                return False
            self._begin_epoch()
        return True

    def _epoch_is_over(self) -> bool:
        """Tell whether the next batch, if there is one, is another epoch's."""
        if not self._ahead and self._batches is not None:
            batch = next(self._batches, None)
            if batch is None:
                self._batches = None
            else:
                self._ahead.append(batch)
                self._number += 1
        return not self._ahead

    def _begin_epoch(self) -> None:
        epoch = len(self._starts)
        self._starts.append(_EpochStart(self.step, self._generators.held_states))
        if not epoch and getattr(self._data, "persistent_workers", False):
            self._data._iterator = None  # or its workers go on with whatever they have drawn before
        self._generators.seed(_draw(self._seed, epoch, -1) >> 1)
        with self._generators.lent():
            for set_epoch in self._set_epoch:
                set_epoch(epoch)
        self._batches = self._drawn()
        self._number = 0

    def _drawn(self) -> Iterator[Any]:
        with self._generators.lent():
            iterator = iter(_indexed(self._data))
        while True:
            with self._generators.lent():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _go_back(self, step: int) -> None:
        """Go back to the beginning of the epoch that a step is in."""
        epoch = max(n for n, start in enumerate(self._starts) if start.step <= step)
        if getattr(self._data, "persistent_workers", False):
            epoch = 0  # nobody knows what they had drawn by then
        start = self._starts[epoch]
        del self._starts[epoch:]
        self._generators.held_states = start.held_states
        self._batches, self._ahead = None, []
        self.step = start.step

    def _pass_over_epoch(self, end: int) -> bool:
        """Go past a whole epoch by its indices alone, where that is all it takes; tell whether."""
        if not (self._starts and self._epoch_is_over() and is_ordered_by_indices(self._data)):
            return False
        if self.step + len(self._data) > end or len(self._starts) == self._epochs:
            return False
        self._begin_epoch()
        with self._generators.lent():
            self._number = pass_over_indices(self._data)
        self.step += self._number
        self._batches = None
        return True

    def _warn_of_the_end(self) -> None:
        epoch = len(self._starts) - 1
        if epoch and isinstance(self._data, Iterator):
            warnings.warn(
                f"The data is an iterator, which can be read once; it ended in epoch {epoch}. "
                "Pass a list, a DataLoader or a dataset to train for more epochs.",
                stacklevel=3,
            )


@dataclass(frozen=True)
class _EpochStart:
    """Where an epoch began: its first step, and the states of the generators that the data holds."""

    step: int
    held_states: list[Any]


def _indexed(data: Any) -> Any:
    """Iterate a map-style dataset, which need not end by IndexError, by its length."""
    if hasattr(data, "__iter__"):
        return data
    return (data[index] for index in range(len(data)))


def _batches_of(data: Any, batch_size: int | None) -> Any:
    if hasattr(data, "with_format") and hasattr(data, "iter"):  # a Hugging Face dataset yields rows
        if batch_size is None:
            raise SettingsInvalid(
                "A Hugging Face dataset yields single rows; say how many make a batch: "
                "config=dagflow.Config(batch_size=...)."
            )
        return _HuggingFaceBatches(data, batch_size)
    if isinstance(data, (Mapping, str, torch.Tensor)) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise SettingsInvalid(
            f"data must be an iterable or a dataset of batches; found a {type(data).__name__}. For a "
            "single batch pass [batch]."
        )
    return data


@dataclass(frozen=True)
class _HuggingFaceBatches:
    dataset: Any
    batch_size: int

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        formatted = self.dataset.with_format("torch")
        return iter(formatted.iter(batch_size=self.batch_size, drop_last_batch=True))
