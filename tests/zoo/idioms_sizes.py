"""Idioms that calculate with sizes, branch on them, or on values."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from .case import EITHER, REFUSED
from .idioms import TOKENS, WIDTH, idiom, weighted_square, whole


@idiom("sequences")
def first_four_fifths(h: torch.Tensor) -> torch.Tensor:
    return h[:, : int(h.shape[1] * 0.8)].mean(1)


@idiom("sequences")
def first_quarter_rounded(h: torch.Tensor) -> torch.Tensor:
    return h[:, : round(h.shape[1] * 0.25) + 1].mean(1)


@idiom("sequences")
def ceiling_of_half(h: torch.Tensor) -> torch.Tensor:
    return h[:, : math.ceil(h.shape[1] / 2)].sum(1)


@idiom("sequences")
def floor_of_half(h: torch.Tensor) -> torch.Tensor:
    half = h.shape[1] // 2
    return h[:, :half].mean(1) - h[:, half:].mean(1)


@idiom("sequences")
def scaled_by_root_of_length(h: torch.Tensor) -> torch.Tensor:
    return h.sum(1) * h.shape[1] ** -0.5


@idiom("sequences")
def scaled_by_math_sqrt_of_length(h: torch.Tensor) -> torch.Tensor:
    return h.sum(1) / math.sqrt(h.shape[1])


@idiom("sequences")
def scaled_by_logarithm_of_length(h: torch.Tensor) -> torch.Tensor:
    return h.mean(1) * math.log(h.shape[1] + 1)


@idiom("sequences")
def mean_by_hand(h: torch.Tensor) -> torch.Tensor:
    return h.sum(1) / h.shape[1]


@idiom("sequences")
def mean_over_rows_by_hand(h: torch.Tensor) -> torch.Tensor:
    return h - h.sum(0) / len(h)


@idiom("sequences")
def count_of_elements(h: torch.Tensor) -> torch.Tensor:
    return h * (h.numel() / (h.shape[0] * 100))


@idiom("sequences")
def minimum_of_sizes(h: torch.Tensor) -> torch.Tensor:
    return h[:, : min(h.shape[1], 10)].sum(1)


@idiom("sequences")
def padded_to_a_multiple(h: torch.Tensor) -> torch.Tensor:
    missing = (4 - h.shape[1] % 4) % 4
    return functional.pad(h, (0, 0, 0, missing)).unflatten(1, (-1, 4)).mean(2).sum(1)


@idiom("sequences")
def padded_if_odd(h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] % 2:
        h = functional.pad(h, (0, 0, 0, 1))
    return h.view(h.shape[0], -1, 2, WIDTH).sum(2).mean(1)


@idiom("sequences")
def branch_on_length(h: torch.Tensor) -> torch.Tensor:
    return h.mean(1) if h.shape[1] > 14 else h.amax(1)


@idiom("sequences")
def loop_over_time(h: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(h.shape[0], WIDTH)
    for step in range(h.shape[1]):
        state = torch.tanh(state + h[:, step])
    return state


@idiom("sequences")
def loop_over_unbound_time(h: torch.Tensor) -> torch.Tensor:
    outputs = [x.cumsum(-1) for x in h.unbind(1)]
    return torch.stack(outputs, 1)


@idiom("sequences")
def positions_from_arange(h: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(h.shape[1], dtype=h.dtype, device=h.device)
    return h * torch.sin(positions)[None, :, None]


@idiom("sequences")
def linspace_over_time(h: torch.Tensor) -> torch.Tensor:
    return h * torch.linspace(0, 1, h.shape[1])[:, None]


@idiom("sequences")
def causal_mask_by_triu(h: torch.Tensor) -> torch.Tensor:
    scores = h @ h.transpose(1, 2)
    mask = torch.triu(torch.ones(h.shape[1], h.shape[1], dtype=torch.bool), 1)
    return scores.masked_fill(mask, float("-inf")).softmax(-1) @ h


@idiom("sequences")
class MaskCutFromABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).bool())

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        length = h.shape[1]
        scores = (h @ h.mT).masked_fill(~self.mask[:length, :length], -1e9)
        return scores.softmax(-1) @ h


@idiom("sequences")
class LearntPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 64, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.positions[:, : h.shape[1]]


@idiom("sequences")
class RelativePositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(9, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        at = torch.arange(h.shape[1])
        distance = (at[None] - at[:, None]).clamp(-4, 4) + 4
        return (h @ h.mT + self.bias(distance)[..., 0]).softmax(-1) @ h


@idiom("sequences")
def chunks_of_time(h: torch.Tensor) -> torch.Tensor:
    first, second = h.chunk(2, dim=1)
    return first.mean(1) - second.amax(1)


@idiom("sequences")
def split_of_channels(h: torch.Tensor) -> torch.Tensor:
    a, b, c = h.split([2, 2, 4], dim=-1)
    return torch.cat([a * b, c], -1)


@idiom("sequences")
def expanded_row(h: torch.Tensor) -> torch.Tensor:
    token = torch.ones(1, 1, WIDTH).expand(h.shape[0], -1, -1)
    return torch.cat([token, h], 1).cumsum(1)


@idiom("sequences")
def reversed_time(h: torch.Tensor) -> torch.Tensor:
    return h.flip(1).cumsum(1) + h.roll(1, dims=1)


@idiom("sequences")
def time_by_stride(h: torch.Tensor) -> torch.Tensor:
    return h[:, ::3].sum(1) + h[:, -1] - h[:, 1]


@idiom("sequences")
def windows_by_as_strided(h: torch.Tensor) -> torch.Tensor:
    return h.contiguous().as_strided((h.shape[0], 3, 4, WIDTH), (h.stride(0), 16, 8, 1)).sum(2)


@idiom("sequences")
def heads_by_view(h: torch.Tensor) -> torch.Tensor:
    rows, length, _ = h.shape
    heads = h.view(rows, length, 2, 4).transpose(1, 2)
    looked = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return looked.transpose(1, 2).reshape(rows, length, WIDTH)


@idiom("vectors", REFUSED)
def branch_on_a_value(h: torch.Tensor) -> torch.Tensor:
    return h if h.sum() > 0 else -h


@idiom("vectors")
def check_of_values_that_raises(h: torch.Tensor) -> torch.Tensor:
    if h is not None and not (h.abs() <= 1).all():
        raise ValueError("no result of tanh")
    return h.square()


@idiom("vectors", REFUSED)
def value_as_a_number(h: torch.Tensor) -> torch.Tensor:
    return h * float(h.detach().abs().max())


@idiom("vectors", EITHER)
def selected_by_boolean_mask(h: torch.Tensor) -> torch.Tensor:
    return h.sum(1) + h[h > 0].sum()


@idiom("vectors", EITHER)
def nonzero_rows(h: torch.Tensor) -> torch.Tensor:
    rows = (h[:, 0] > -2).nonzero()[:, 0]
    return h + h.index_select(0, rows).mean()


@idiom("vectors", EITHER)
def unique_values(h: torch.Tensor) -> torch.Tensor:
    return h * torch.unique((h * 2).long()).numel()


@whole(
    "tokens",
    loss=lambda: weighted_square,
    batch=lambda rows, length: (
        torch.randint(0, TOKENS, (rows, length)),
        torch.randint(1, length + 1, (rows,)),
        torch.randn(rows),
    ),
)
class MaskFromLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        hidden = self.embedding(ids) * mask[..., None]
        return self.head(hidden.sum(1) / lengths[:, None])


@whole(
    "vectors",
    EITHER,
    loss=lambda: weighted_square,
    batch=lambda rows: ({"x": torch.randn(rows, WIDTH), "scale": 0.5}, torch.randn(rows)),
)
class NumberInTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(inputs["x"]) * inputs["scale"]


@whole(
    "vectors",
    loss=lambda: weighted_square,
    batch=lambda rows: (
        {"left": {"x": torch.randn(rows, WIDTH)}, "right": [torch.randn(rows, WIDTH)]},
        torch.randn(rows),
    ),
)
class NestedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, inputs: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
        return self.layer(inputs["left"]["x"] - inputs["right"][0])


@whole(
    "vectors",
    loss=lambda: weighted_square,
    batch=lambda rows: (torch.randn(rows, WIDTH), torch.tensor(0.3), torch.randn(rows)),
)
class ScalarTensorInTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / temperature
