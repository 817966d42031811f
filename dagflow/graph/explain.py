"""Why a model couldn't be traced, in words of the model's own code."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

from dagflow.graph.trace import OWN_FILES, Trace

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_BY_VALUES = ("data-dependent", "DataDependent", "Unbacked")
_ADVICE: Mapping[tuple[str, ...], str] = {
    ("unhashable type: non-nested SymInt",): (
        "an open size is no key: a table or cache by length (a dict, lru_cache) holds one batch's "
        "sizes. Compute the value each time, or fix the size: int(T) for the key, or "
        "dynamic={'tensor': []}."
    ),
    ("numpy.object_",): (
        "NumPy can't compute with open sizes; write it with torch (torch.arange for numpy.arange)."
    ),
    _BY_VALUES: (
        "the line decides by a tensor's value, which a graph can't; write it with torch.where "
        "or a mask, or take the decision outside of forward(). (A check that only raises may stay, "
        "as `if tensor.any(): raise ...` or `assert tensor.all()`, without .item().)"
    ),
    ("torch._dynamo", "Constraint"): (
        "the model fixes a size that varies; pass dynamic={'tensor': [dims that vary]}."
    ),
    ("parse", "Sparse", "nested", "aten::crow_indices"): (
        "programs hold dense tensors only; keep the matrix dense (to_dense()), or gather and "
        "scatter by its indices."
    ),
    ("_apply(): Couldn't swap",): (
        "cast and move modules before training (model.to(...)), not in forward; there cast the tensors."
    ),
    ("uninitialized parameter",): (
        "a lazy module gets its shapes from the first batch: call the model once on one before."
    ),
}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


# What follows is about torch.export's own remedies, and lines of the capture.
_TORCHS_ADVICE = re.compile(r" \(Size-like symbols:| Caused by: | If you're using torch\.compile")


def explain(error: Exception, trace: Trace) -> str:
    """Say where a trace failed, why, and what to do about it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_TORCH_FOLDER) and frame.filename not in OWN_FILES
    ]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown"
    reason = _ADDRESS.sub("", " ".join(str(error).split()))
    reason = _TORCHS_ADVICE.split(reason)[0][:400]
    if "_sym_log2" in reason:
        return (
            f"The model computes with math.log2 of an open size ({trace.mathematics.get('log2')}), "
            "which torch.export can't hold. What to do: compute it on a tensor, with "
            "torch.full((), T).log2(), or fix the size with dynamic={'tensor': []}."
        )
    return (
        f"The model can't be captured. Module: {trace.module!r}. Source: {where}. "
        f"Operator: {trace.operator or 'unknown'}. torch says: {type(error).__name__}: {reason} "
        f"What to do: {_advice(error)}"
    )


def decides_by_values(error: BaseException | None) -> bool:
    """Tell whether a trace failed because the code asks for a tensor's value."""
    text = f"{type(error).__name__} {error}"
    return any(sign in text for sign in _BY_VALUES)


def _advice(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    for signs, advice in _ADVICE.items():
        if any(sign in text for sign in signs):
            return advice
    return (
        "write that line with torch's operators, on tensors whose shapes follow from the batch's; "
        "what is the same in every step belongs into a buffer, and what depends on the data alone "
        "into the data loader, as a column of the batch. (torch.export.export(model, ..., "
        "strict=False) fails alike.)"
    )
