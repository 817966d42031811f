"""Operators in the forms in which modelling code uses them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .case import EITHER
from .idioms import WIDTH, idiom


@idiom("sequences")
def einsum_of_three(h: torch.Tensor) -> torch.Tensor:
    return torch.einsum("btc,bsc,bsd->btd", h, h, h)


@idiom()
def index_put_accumulates(h: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, WIDTH)
    rows = torch.arange(h.shape[0]) % 4
    return h * out.index_put((rows,), h, accumulate=True).sum()


@idiom()
def scatter_add(h: torch.Tensor) -> torch.Tensor:
    index = torch.arange(WIDTH).expand_as(h) % 3
    return torch.zeros(h.shape[0], 3).scatter_add(1, index, h)


@idiom()
def scatter_reduce_maximum(h: torch.Tensor) -> torch.Tensor:
    index = torch.arange(WIDTH).expand_as(h) % 3
    return torch.zeros(h.shape[0], 3).scatter_reduce(1, index, h, "amax", include_self=False)


@idiom()
def index_add_in_place(h: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(h.shape[0], WIDTH)
    out.index_add_(1, torch.tensor([1, 1, 0, 3, 4, 5, 6, 7]), h)
    return out


@idiom()
def sorted_values(h: torch.Tensor) -> torch.Tensor:
    values, order = h.sort(dim=1, descending=True)
    return values * (1 + order)


@idiom()
def top_two_of_all(h: torch.Tensor) -> torch.Tensor:
    values, index = h.softmax(1).topk(2, dim=1)
    return torch.zeros_like(h).scatter(1, index, values / values.sum(1, keepdim=True))


@idiom("sequences")
def cumulative_products(h: torch.Tensor) -> torch.Tensor:
    return h.cumsum(1) + (h * 0.1 + 1).cumprod(1) + h.logcumsumexp(1)


@idiom()
def masked_by_where(h: torch.Tensor) -> torch.Tensor:
    return torch.where(h > 0, h.log1p(), h.exp() - 1).masked_fill(h.abs() < 0.1, 0.5)


@idiom()
def masked_scatter(h: torch.Tensor) -> torch.Tensor:
    return h.masked_scatter(h > 0.5, h.square().flip(1))


@idiom("images")
def interpolated_to_a_size(h: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(h, size=(5, 6), mode="bicubic", align_corners=False)


@idiom("images")
def interpolated_nearest(h: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(h, scale_factor=1.5, mode="nearest")


@idiom("images")
def sampled_on_a_grid(h: torch.Tensor) -> torch.Tensor:
    theta = torch.eye(2, 3).expand(h.shape[0], -1, -1) * 0.9
    grid = functional.affine_grid(theta, list(h.shape), align_corners=False)
    return functional.grid_sample(h, grid, padding_mode="reflection", align_corners=False)


@idiom("images")
def pixels_unshuffled_and_padded(h: torch.Tensor) -> torch.Tensor:
    return functional.pad(functional.pixel_unshuffle(h, 2), (1, 2, 0, 1), mode="replicate")


@idiom("sequences")
def windows_by_unfold(h: torch.Tensor) -> torch.Tensor:
    return h.unfold(1, 4, 2).amax(-1).sum(1)


@idiom("images")
def average_pool_with_padding(h: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(h, 3, stride=2, padding=1, count_include_pad=False)


@idiom("images")
def max_pool_and_unpool(h: torch.Tensor) -> torch.Tensor:
    pooled, index = functional.max_pool2d(h, 2, return_indices=True)
    return functional.max_unpool2d(pooled, index, 2)


@idiom("sequences")
def attention_with_a_mask(h: torch.Tensor) -> torch.Tensor:
    heads = h.unflatten(2, (2, 4)).transpose(1, 2)
    mask = torch.ones(h.shape[1], h.shape[1]).tril().bool()
    return functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).flatten(2)


@idiom("sequences")
def attention_of_grouped_queries(h: torch.Tensor) -> torch.Tensor:
    query = h.unflatten(2, (4, 2)).transpose(1, 2)
    key = h[..., :4].unflatten(2, (2, 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    ).flatten(2)


@idiom("sequences")
def attention_with_dropout(h: torch.Tensor) -> torch.Tensor:
    heads = h.unflatten(2, (2, 4)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3).flatten(2)


@idiom()
def norms_of_all_kinds(h: torch.Tensor) -> torch.Tensor:
    return (
        functional.normalize(h, dim=1)
        + h.norm(p=3)
        + torch.linalg.vector_norm(h, dim=1, keepdim=True)
    )


@idiom()
def variance_and_mean(h: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(h, dim=1, correction=0, keepdim=True)
    return (h - mean) * (variance + 1e-5).rsqrt() + h.std(1, keepdim=True)


@idiom()
def distances(h: torch.Tensor) -> torch.Tensor:
    return torch.cdist(h, h * 0.5) + functional.cosine_similarity(h[:, None], h[None], dim=-1)


@idiom()
def matrix_inverse(h: torch.Tensor) -> torch.Tensor:
    matrix = h[:, :, None] * h[:, None, :] * 0.1 + torch.eye(WIDTH)
    return torch.linalg.solve(matrix, h) + torch.linalg.inv(matrix).sum(-1)


@idiom()
def cholesky_factor(h: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(h[:, :, None] * h[:, None, :] + torch.eye(WIDTH)).flatten(1)


@idiom()
def singular_values(h: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(h.unflatten(1, (2, 4)))


@idiom()
def outer_products_by_broadcast(h: torch.Tensor) -> torch.Tensor:
    return (h[:, :, None] * h[:, None, :]).flatten(1).clamp(min=-0.5, max=0.5)


@idiom()
def in_place_activations(h: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu_(functional.relu_(h + 0.1) - 0.2, 0.1)


@idiom()
def addmm_with_factors(h: torch.Tensor) -> torch.Tensor:
    return torch.addmm(h, h, torch.ones(WIDTH, WIDTH), beta=0.5, alpha=0.1)


@idiom()
def mixture_by_loop_over_experts(h: torch.Tensor) -> torch.Tensor:
    choice = h.softmax(1).argmax(1)
    out = torch.zeros_like(h)
    for expert in range(3):
        out = out + torch.where((choice % 3 == expert)[:, None], h * (expert + 1), 0.0)
    return out


@idiom()
def mixture_by_loop_over_experts_that_were_hit(h: torch.Tensor) -> torch.Tensor:
    weights, choice = h[:, :4].softmax(1).topk(2)
    mask = functional.one_hot(choice, 4).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
        rank, rows = torch.where(mask[expert[0]])
        out.index_add_(0, rows, (h[rows] * (expert + 1)).tanh() * weights[rows, rank, None])
    return out


@idiom()
def mixture_by_masks_that_have_any_row(h: torch.Tensor) -> torch.Tensor:
    choice = h[:, :4].argmax(1)
    out = torch.zeros_like(h)
    for expert in range(4):
        mask = choice == expert
        if mask.any():
            out[mask] += (h[mask] * (expert + 1)).tanh()
    return out


@idiom()
def mixture_by_a_split_at_counts(h: torch.Tensor) -> torch.Tensor:
    choice = h[:, :4].argmax(1)
    order = choice.argsort(stable=True)
    parts = h[order].split(functional.one_hot(choice, 4).sum(0).tolist())
    found = torch.cat([(part * (expert + 1)).tanh() for expert, part in enumerate(parts)])
    return torch.zeros_like(h).index_add(0, order, found)


@idiom("vectors", EITHER)
def sparse_product(h: torch.Tensor) -> torch.Tensor:
    adjacency = torch.eye(WIDTH).to_sparse()
    return torch.sparse.mm(adjacency, h.t()).t()


@idiom("vectors", EITHER)
def sparse_hidden_values(h: torch.Tensor) -> torch.Tensor:
    return h + (h * (h > 0)).to_sparse().to_dense()


@idiom("vectors", EITHER)
def nested_tensor(h: torch.Tensor) -> torch.Tensor:
    nested = torch.nested.as_nested_tensor([h[0, :3], h[1, :5]])
    return h + torch.nested.to_padded_tensor(nested, 0.0).sum()


@idiom("vectors", EITHER)
class ThroughNumpy(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * torch.from_numpy(h.detach().numpy().copy()).sigmoid()


@idiom()
def bucketized(h: torch.Tensor) -> torch.Tensor:
    edges = torch.linspace(-1, 1, 5)
    return h * torch.bucketize(h.detach(), edges).float()


@idiom("sequences")
def transposed_and_not_contiguous(h: torch.Tensor) -> torch.Tensor:
    turned = h.transpose(1, 2)
    return (turned.softmax(-1) * turned).transpose(1, 2)[..., ::2]


@idiom("sequences")
def moved_dimensions(h: torch.Tensor) -> torch.Tensor:
    return h.movedim(0, -1).swapaxes(0, 1).unsqueeze(0).squeeze(0).permute(2, 1, 0)
