"""From the user's data to the micro-batches of each step."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.graph.batch import flatten_batch
from dagflow_storage import TokenArray, write_tokens
from dagflow_tasks.interpreter import RANDOM_LOCK
from dagflow_tasks.results import TensorDict
from dagflow_tasks.tasks import tensors_of


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
                f"{self.url} holds {len(array)} tokens; a window of {window} doesn't fit. Use a shorter "
                "sequence_length or more text."
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


def num_rows(tensors: Mapping[str, torch.Tensor], where: str) -> int:
    """Return the batch's number of rows: the first dimension, which all tensors share.

    Raises
    ------
    BatchInvalid
    """
    sizes = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.dim()}
    if not sizes or len(set(sizes.values())) != 1:
        raise BatchInvalid(
            f"All tensors of a batch share their first dimension, the rows; found {sizes} in {where}."
        )
    rows = next(iter(sizes.values()))
    if rows == 0:
        raise BatchInvalid(f"The batch of {where} has no rows.")
    return rows


def take_rows(tensors: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
    """Return some rows of every tensor; 0-d tensors as they are."""
    return {name: t[begin:end].contiguous() if t.dim() else t for name, t in tensors.items()}


class BatchStream:
    """The user's batches by step, in order, over as many epochs as needed.

    A mapping-like or iterable dataset is read again in every epoch; the random numbers it draws
    from torch (shuffling) depend on the seed and the epoch alone, so a resumed run sees the batches
    that it would have seen.
    """

    def __init__(self, data: Any, epochs: int | None, seed: int, batch_size: int | None) -> None:
        self._data = _batches_of(data, batch_size)
        self._epochs = epochs
        self._seed = seed
        self._iterator = self._all()
        self._ahead: list[tuple[tuple[int, int], Any]] = []
        self.position = (0, -1)
        """Epoch and number of the batch that was taken last."""

    def steps_per_epoch(self) -> int | None:
        """Return the number of batches an epoch, if the data knows it."""
        try:
            return len(self._data)
        except TypeError:
            return None

    def peek(self) -> Any:
        """Return the next batch without taking it."""
        if not self._ahead:
            try:
                self._ahead.append(next(self._iterator))
            except StopIteration:
                raise BatchInvalid("The data holds no batch.") from None
        return self._ahead[0][1]

    def skip(self, num_batches: int) -> None:
        """Go past batches that an earlier run has used."""
        for _ in range(num_batches):
            if self.take() is None:
                return

    def take(self) -> Any | None:
        """Return the next batch, or None after the last."""
        found = self._ahead.pop() if self._ahead else next(self._iterator, None)
        if found is None:
            return None
        self.position, batch = found
        return batch

    def _all(self) -> Iterator[tuple[tuple[int, int], Any]]:
        epoch = 0
        while self._epochs is None or epoch < self._epochs:
            found = False
            for number, batch in enumerate(self._epoch(epoch)):
                found = True
                yield (epoch, number), batch
            if not found:
                if epoch and isinstance(self._data, Iterator):
                    warnings.warn(
                        f"The data is an iterator, which can be read once; it ended in epoch {epoch}. "
                        "Pass a list, a DataLoader or a dataset to train for more epochs.",
                        stacklevel=2,
                    )
                return
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Any]:
        with _own_random_numbers():
            torch.manual_seed(_draw(self._seed, epoch, -1) >> 1)
            iterator = iter(_indexed(self._data))
            state = torch.get_rng_state()
        while True:
            with _own_random_numbers():
                torch.set_rng_state(state)
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                state = torch.get_rng_state()
            yield batch


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave torch's generator to the data, and to no worker that is a thread of this process."""
    with RANDOM_LOCK, torch.random.fork_rng(devices=[]):
        yield


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


def fingerprint(batch: Any) -> str:
    """Return a checksum of a batch: a store remembers what its run was trained on first."""
    tensors, constants = flatten_batch(batch)
    checksum = zlib.crc32(repr(sorted(constants.items())).encode())
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        described = f"{name} {tensor.dtype} {list(tensor.shape)}"
        checksum = zlib.crc32(described.encode(), checksum)
        checksum = zlib.crc32(data.view(torch.uint8).numpy().tobytes(), checksum)
    return f"{checksum:08x}"
