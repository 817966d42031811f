"""Batches that are read again must be those that the run was trained on before."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dagflow.errors import BatchInvalid
from dagflow.graph.batch import flatten_batch

_WHAT_TO_DO = (
    "So the data isn't in the same order, or not the same, when it is read again. dagflow seeds the "
    "global generators of torch, random and NumPy for every epoch, sets back the generators that a "
    "loader, its samplers and its dataset hold, and calls set_epoch where there is one: draw from one "
    "of these, or sort what comes in no order of its own, and train into another store=. If the data "
    "keeps count by itself of how often it was read, calling train again in a new process may do. "
    "Config(force=True) goes on with the batches as they come."
)


class SeenBatches:
    """Fingerprints of the batches that steps were made of, by step.

    Parameters
    ----------
    strict
        Whether another batch than before is an error.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self._strict = strict
        self._known: dict[int, str] = {}

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take what a ledger's rows say. Older dagflows wrote no fingerprints: these steps pass."""
        for row in rows:
            samples = row.get("samples")
            known = samples.get("fingerprint") if isinstance(samples, dict) else None
            if known and isinstance(known, str):
                self._known[row["step"]] = known

    def check(self, step: int, position: tuple[int, int], batch: Any) -> str:
        """Return the fingerprint of a step's batch.

        Raises
        ------
        BatchInvalid
            If it isn't the batch that this step had before.
        """
        found = fingerprint(batch)
        known = self._known.setdefault(step, found)
        if known != found and self._strict:
            epoch, number = position
            raise BatchInvalid(
                f"Step {step} (batch {number} of epoch {epoch}, both counted from 0) got another batch "
                f"than before: its fingerprint is {found}, and the run's ledger has {known}. {_WHAT_TO_DO}"
            )
        self._known[step] = found
        return found


def fingerprint(batch: Any) -> str:
    """Return a checksum of a batch's names, dtypes, shapes and values: eight hexadecimal digits."""
    tensors, constants = flatten_batch(batch)
    checksum = zlib.crc32(repr(sorted(constants.items())).encode())
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        described = f"{name} {tensor.dtype} {list(tensor.shape)}"
        checksum = zlib.crc32(described.encode(), checksum)
        checksum = zlib.crc32(data.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
