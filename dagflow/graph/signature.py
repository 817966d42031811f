"""Does a batch fit the captured signature? Says precisely why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dagflow.errors import BatchInvalid
from dagflow.graph.dag import OperatorDag


def match_batch(
    dag: OperatorDag, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any], where: str
) -> tuple[tuple[str, int], ...]:
    """Check a micro-batch against the DAG's inputs and return its sizes by symbol.

    Parameters
    ----------
    dag : OperatorDag
    tensors, constants
        The flattened micro-batch.
    where : str
        What to call the batch in an error: "step 12".

    Raises
    ------
    BatchInvalid
        If names, dtypes or shapes differ from the captured ones, or a size is out of range.
    """
    wanted = {spec.name.removeprefix("in."): spec for spec in dag.inputs}
    if set(wanted) != set(tensors):
        raise BatchInvalid(
            f"The batch of {where} has the tensors {sorted(tensors)}; the model was captured with "
            f"{sorted(wanted)}. Every batch needs the same names."
        )
    if dict(constants) != dict(dag.batch_constants):
        raise BatchInvalid(
            f"The batch of {where} has the constants {dict(constants)}; the model was captured "
            f"with {dict(dag.batch_constants)}. Pass what changes as tensors."
        )
    sizes: dict[str, int] = {}
    for name, spec in wanted.items():
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != spec.dtype or tensor.dim() != len(spec.shape):
            raise BatchInvalid(
                f"{name!r} of {where} is {dtype}{list(tensor.shape)}; the model was captured with "
                f"{spec.dtype} and {len(spec.shape)} dimensions."
            )
        for dim, (size, known) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
            if isinstance(known, str):
                _match_symbol(dag, sizes, known, size, f"{name!r} of {where}", dim)
            elif size != known:
                raise BatchInvalid(
                    f"{name!r} of {where} has size {size} in dimension {dim}; the model was "
                    f"captured with {known}, and that size is fixed. Pad or drop such batches "
                    f"(DataLoader(drop_last=True)), or name the dimension in Config(dynamic=...)."
                )
    return tuple((symbol.name, sizes[symbol.name]) for symbol in dag.symbols)


def _match_symbol(
    dag: OperatorDag, sizes: dict[str, int], symbol_name: str, size: int, what: str, dim: int
) -> None:
    symbol = next(s for s in dag.symbols if s.name == symbol_name)
    if size < symbol.minimum or (symbol.maximum is not None and size > symbol.maximum):
        upper = "any size" if symbol.maximum is None else str(symbol.maximum)
        raise BatchInvalid(
            f"{what} has size {size} in dimension {dim}; the captured operators are right for "
            f"{symbol.minimum} to {upper}."
        )
    if sizes.setdefault(symbol_name, size) != size:
        raise BatchInvalid(
            f"{what} has size {size} in dimension {dim}, and another tensor {sizes[symbol_name]}; "
            "the model needs them equal."
        )
