"""Linear layers whose weights are held in 8 or 4 bits, and what puts weights into that form.

Only weights are quantised, symmetrically around zero, each by a scale from the largest value that
shares it (absmax): a whole output channel's in 8 bits, 32 neighbours' in 4. Activations and sums
stay in the activations' dtype.

References
----------
T. Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1 (absmax); T. Dettmers and
L. Zettlemoyer, The case for 4-bit precision, arXiv 2212.09720, section 3 (small blocks with a scale
of their own). Values are evenly spaced, and there is no treatment of outliers.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LINEAR_INT8 = "dagflow.linear_int8.default"
LINEAR_INT4 = "dagflow.linear_int4.default"

GROUP = 32
"""Neighbouring inputs that share a scale in 4 bits."""

# Up to this many rows torch's int8 kernel, which reads the weights as they are, is faster than
# dequantising them for a product of matrices (2048 x 2048, one thread with AVX-512, bfloat16: 0.2 ms
# against 1.2 ms for one row, 9.1 ms against 3.9 ms for 64).
_KERNEL_ROWS = 16


def quantise_int8(
    weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (N, K) in 8 bits, and the scales (N,) of its output channels, in a dtype."""
    scale = _scale(weight.float().abs().amax(1), 127, dtype)
    return _rounded(weight / scale[:, None], 127), scale


def quantise_int4(
    weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (N, K) packed two values to a byte, and the scales (N, K/32) of its groups.

    K is a multiple of 32. Byte k of the packed form (N, K/2) holds column k in its lower four bits
    and column K/2 + k in its upper ones, two's complement: each half unpacks to neighbouring columns.
    """
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    scale = _scale(groups.abs().amax(2), 7, dtype)
    low, high = _rounded(groups / scale[:, :, None], 7).flatten(1).chunk(2, dim=1)
    return (low & 15) | (high << 4), scale


def _scale(largest: torch.Tensor, levels: int, dtype: torch.dtype) -> torch.Tensor:
    scale = (largest / levels).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _rounded(values: torch.Tensor, levels: int) -> torch.Tensor:
    return values.round().clamp(-levels, levels).to(torch.int8)


def dequantise_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight (N, K), in the dtype of its scales."""
    half = packed.shape[1]
    weight = torch.empty(packed.shape[0], 2 * half, dtype=scale.dtype, device=scale.device)
    weight[:, :half] = (packed << 4) >> 4  # the shift to the right copies the sign
    weight[:, half:] = packed >> 4
    weight.view(*scale.shape, GROUP).mul_(scale[:, :, None])
    return weight


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer of weights in 8 bits.

    Parameters
    ----------
    x : Tensor (..., K)
    weight : int8 Tensor (N, K)
    scale : Tensor (N,), of x's dtype
    bias : Tensor (N,), optional
    """
    rows = x.reshape(-1, x.shape[-1])
    output: torch.Tensor
    if _has_kernel(rows):
        output = torch.ops.aten._weight_int8pack_mm.default(rows.contiguous(), weight, scale)
    else:
        output = functional.linear(rows, weight.to(x.dtype)) * scale
    if bias is not None:
        output = output + bias
    return output.reshape(*x.shape[:-1], weight.shape[0])


def _has_kernel(rows: torch.Tensor) -> bool:
    """In float32 torch's kernel takes several times as long as dequantising does."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.bfloat16
        and rows.shape[0] <= _KERNEL_ROWS
        and rows.shape[1] % GROUP == 0
    )


def linear_int4(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer of weights in 4 bits, as `quantise_int4` packs them.

    torch's own kernel for 4 bits wants them in an order that differs from processor to processor,
    and has no way back from it for passes of many rows, so they are dequantised in every pass.

    Parameters
    ----------
    x : Tensor (..., K)
    weight : int8 Tensor (N, K/2)
    scale : Tensor (N, K/32), of x's dtype
    bias : Tensor (N,), optional
    """
    return functional.linear(x, dequantise_int4(weight, scale), bias)
