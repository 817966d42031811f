"""Linear layers on oneDNN's kernels, on CPUs.

In training the weights lie as torch has them: they change with every step. oneDNN's products are then
faster than those of MKL, which torch uses, on an AMD EPYC (a stage's forward and backward by 3 %), and
slower on an Intel Xeon (the backward by 2 %, the products alone by 4 %).

In inference they are put into the order in which the kernels read them. A pass of few tokens does
little but read weights, and torch's ordinary product of matrices reads them at a third of the
memory's speed. oneDNN's products, of weights that were put into its order once, take less time for
any number of rows; `benchmarks/packed_weights.py` measures how much.

The operators are those that torch keeps for its compiler's frozen graphs: none of them is public. They
are used in this module alone, whose tests fail when torch changes them.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

LINEAR_PACKED = "dagflow.linear_packed.default"

# With fewer rows oneDNN takes kernels that are slower than those for four (1024 x 1024, float32, one
# thread with AVX-512: 301, 367 and 234 us for one, two and four rows).
LEAST_ROWS = 4
# Packed for one row the order is another, and slow for more; from four rows up it is the same.
_PACKED_FOR_ROWS = 16
# A call costs some 10 us more than torch's own: smaller weights are read within that time.
LEAST_ELEMENTS = 1 << 16


@cache
def trains_here() -> bool:
    """Tell whether `linear` is faster in training than torch's own product, on this machine.

    The processor's maker decides, not a measurement: a run has the same bits every time.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return not (has_mkl and "GenuineIntel" in _processor())


def _processor() -> str:
    """Return what the system says of the processor; its maker's identifier is somewhere in it."""
    listing = Path("/proc/cpuinfo")
    return listing.read_text() if listing.exists() else platform.processor()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer without a gradient.

    Parameters
    ----------
    x : Tensor (..., K)
    weight : Tensor (N, K)
        As torch has it, in any strides, or as `pack` returns it.
    bias : Tensor (N,), optional
    """
    rows = x.reshape(-1, x.shape[-1])
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
        rows, weight, bias, "none", [], ""
    )
    return output.reshape(*x.shape[:-1], weight.shape[0])


def packs(weight: torch.Tensor) -> bool:
    """Tell whether a linear layer is faster with its weight packed, on this machine."""
    if weight.device.type != "cpu" or weight.dim() != 2 or weight.numel() < LEAST_ELEMENTS:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight (N, K) in oneDNN's order: an opaque tensor of the same shape and size."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.contiguous(), _PACKED_FOR_ROWS
    )
    return packed


def linear_packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer with a packed weight; has no gradient.

    Parameters
    ----------
    x : Tensor (..., K)
    weight : Tensor (N, K)
        As `pack` returns it.
    bias : Tensor (N,), optional
    """
    _check_layer(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if 0 < count < LEAST_ROWS:
        rows = torch.cat([rows] * -(-LEAST_ROWS // count))
    output = linear(rows, weight, bias)
    return output[:count].reshape(*x.shape[:-1], weight.shape[0])


def _check_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse what isn't one layer: the kernels take weights and bias for as large as they must be."""
    fits = x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and weight.numel()
    if bias is not None:
        fits = fits and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
    if not fits or x.dtype != weight.dtype:
        raise ValueError(f"{list(x.shape)} doesn't go through a layer of {list(weight.shape)}")
