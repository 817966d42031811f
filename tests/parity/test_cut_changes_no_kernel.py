"""Values, gradients and weights are behind a cut what they are without one, so no bit changes.

In memory, too: kernels add up in the order of strides, and choose by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline
from torch import nn
from torch.nn import functional
from zoo import Example, capture_example

from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.replay import restore
from dagflow_tasks.train.state import state_tensors
from dagflow_tasks.train.worker_journal import JOURNAL

WIDTH, LENGTH = 24, 34


class Idiom(nn.Module):
    """Layers around an operation on sequences (B, T, D), whose results lie in some odd way."""

    def __init__(self, operation: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleDict(layers)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.operation(self.layers, self.first(x)))
        return output


def sliced(layers: Any, h: torch.Tensor) -> torch.Tensor:
    a = h[..., 3 : WIDTH + 3]
    sums = a.sum(1, keepdim=True) + a.mean((0, 1)) + a.mT.sum(-1, keepdim=True).mT
    return layers["norm"](a) + sums + a.square().mean()


def by_heads(layers: Any, h: torch.Tensor) -> torch.Tensor:
    q, k, v = h.unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 4, 1).unbind(0)
    weights = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    return (weights.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


def joined(layers: Any, h: torch.Tensor) -> torch.Tensor:
    first = layers["norm"](h[..., :WIDTH]) + layers["norm"].bias
    both = torch.cat([first, h[..., WIDTH:].tanh()], -1)  # whose gradients are slices
    return both.mT.unflatten(1, (3, WIDTH)).prod(1).mT


def transposed(layers: Any, h: torch.Tensor) -> torch.Tensor:
    across = h[..., :WIDTH].transpose(1, 2)
    return layers["mix"](functional.gelu(across)).transpose(1, 2)


def expanded(layers: Any, h: torch.Tensor) -> torch.Tensor:
    whole = h[..., :WIDTH].mean(1, keepdim=True).expand(-1, LENGTH, -1)
    return (
        layers["norm"](whole) + whole * whole.sum((0, 1)) + h[..., -WIDTH:] * whole.square().mean()
    )


def attended(layers: Any, h: torch.Tensor) -> torch.Tensor:
    heads = h.unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
    bias = layers["bias"](h).unsqueeze(1).expand(-1, 4, -1, -1)
    attend = functional.scaled_dot_product_attention
    together = attend(*heads.unbind(0), attn_mask=bias) + attend(*heads.unbind(0))
    # Made like something with a gradient, but without one itself: which kernel runs depends on it.
    late = torch.ones_like(bias).cumsum(-1) > 7
    mask = torch.zeros_like(bias).masked_fill(late, -3.0)
    return attend(together, *heads[1:], attn_mask=mask).transpose(1, 2).flatten(2)


def convolved(layers: Any, h: torch.Tensor) -> torch.Tensor:
    image = h.unflatten(1, (2, LENGTH // 2)).permute(0, 3, 1, 2)
    image = image.contiguous(memory_format=torch.channels_last)
    image = image + layers["deep"](functional.silu(layers["batch"](image)))
    narrow = layers["narrow"](functional.avg_pool2d(image, 2, 1))
    return narrow.flatten(2).mean(-1, keepdim=True).transpose(1, 2) + narrow.flatten(2).mT


def used_often(layers: Any, h: torch.Tensor) -> torch.Tensor:
    a, b = h[..., :WIDTH], h[..., WIDTH : 2 * WIDTH].mT
    for _ in range(3):
        a = layers["norm"](a + torch.tanh(a) * b.mT) + a[:, :1]
    return a + b.mT + h[..., -WIDTH:]


def dropped(layers: Any, h: torch.Tensor) -> torch.Tensor:
    h = functional.feature_alpha_dropout(h, 0.2) + functional.alpha_dropout(h, 0.2)
    return functional.dropout1d(h.mT, 0.3).mT[..., :WIDTH]


def switched_off(layers: Any, h: torch.Tensor) -> torch.Tensor:
    a = h[..., :WIDTH].tanh()
    itself = functional.dropout(a, 0.0)
    return layers["norm"](itself * itself.sin() + itself.cos()) * a + a.square() * itself


def eighths(layers: Any, h: torch.Tensor) -> torch.Tensor:
    low = (h.to(torch.float8_e4m3fn), h.to(torch.float8_e5m2), h.bfloat16(), h.half(), h.double())
    return sum(part.float().sigmoid() for part in low)[..., :WIDTH]  # type: ignore[union-attr]


class NotContiguous(nn.Module):
    """Parameters and buffers with strides of their own, one of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.Parameter(torch.randn(WIDTH, 5).t())
        self.wide = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, ::2])
        self.third = nn.Parameter(torch.randn(WIDTH, 5, WIDTH).permute(2, 0, 1))
        self.register_buffer("scale", torch.rand(WIDTH, LENGTH).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.linear(x, self.wide).tanh() * self.scale
        h = functional.linear(functional.linear(h, self.across).relu(), self.across.t())
        h = functional.linear(functional.layer_norm(h, (WIDTH,)), self.wide)
        output: torch.Tensor = torch.einsum("btd,dek->btk", h, self.third)
        return output


def _layers(operation: Callable[..., torch.Tensor]) -> dict[str, nn.Module]:
    if operation is convolved:
        convolutions = {
            "batch": nn.BatchNorm2d(3 * WIDTH),
            "deep": nn.Conv2d(3 * WIDTH, 3 * WIDTH, 3, padding=1, groups=WIDTH // 2),
            "narrow": nn.Conv2d(3 * WIDTH, WIDTH, 1),
        }
        return {n: m.to(memory_format=torch.channels_last) for n, m in convolutions.items()}
    return {
        "norm": nn.LayerNorm(WIDTH),
        "mix": nn.Linear(LENGTH, LENGTH),
        "bias": nn.Linear(3 * WIDTH, LENGTH),
    }


OPERATIONS = (
    sliced,
    by_heads,
    joined,
    transposed,
    expanded,
    attended,
    convolved,
    used_often,
    dropped,
    switched_off,
    eighths,
)


def example(name: str) -> Example:
    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, LENGTH, WIDTH), torch.randint(0, 5, (rows,))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output.mean(1)[:, :5], target)

    torch.manual_seed(3)
    if name == "NotContiguous":
        return Example(NotContiguous(), batch, loss)
    (operation,) = [function for function in OPERATIONS if function.__name__ == name]
    return Example(Idiom(operation, **_layers(operation)), batch, loss)


IDIOMS = [*(function.__name__ for function in OPERATIONS), "NotContiguous"]


def state_of(run: InlineRun, stage: int) -> dict[str, torch.Tensor]:
    state = CACHE.states[run.refs[stage].key]
    program = CACHE.executable(run.refs[stage]).program
    return {f"{r} {n}": t.detach().clone() for (r, n), t in state_tensors(program, state).items()}


def strides_of(run: InlineRun, stage: int) -> dict[str, tuple[int, ...]]:
    state = CACHE.states[run.refs[stage].key]
    return {name: tensor.stride() for name, tensor in (state.parameters | state.buffers).items()}


captured = cache(lambda name: capture_example(example(name)))


def run(name: str, num_stages: int | None, steps: int = 1, **options: Any) -> InlineRun:
    return run_inline(example(name), num_stages, steps, dag=captured(name), **options)


@pytest.mark.parametrize("name", IDIOMS)
def test_a_cut_anywhere_changes_no_bit(name: str) -> None:
    whole = run(name, 1)
    gradients, weights = whole.gradients(0, 2), whole.weights(1)
    for num_stages in (2, None):
        cut = run(name, num_stages)
        assert len(cut.cut) > 1
        assert cut.losses == whole.losses
        assert_same_bits(cut.gradients(0, 2), gradients)
        assert_same_bits(cut.weights(1), weights)


@pytest.mark.parametrize("name", IDIOMS)
def test_a_replay_changes_no_bit(name: str) -> None:
    lost = run(name, 3, 2, journal=1)
    wanted = [(state_of(lost, stage), strides_of(lost, stage)) for stage in range(3)]
    assert JOURNAL.flush(60)
    CACHE.clear()
    JOURNAL.forget(lost.refs[0].run_id)
    for stage, (tensors, strides) in enumerate(wanted):
        restore(lost.refs[stage], 2, lost.records, lost.neighbours(stage))
        assert_same_bits(state_of(lost, stage), tensors)
        assert strides_of(lost, stage) == strides


@pytest.mark.parametrize("name", ["NotContiguous", "convolved"])
def test_weights_lie_on_workers_as_in_the_model(name: str) -> None:
    model = example(name).model
    wanted = {n: t.stride() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert any(not parameter.is_contiguous() for parameter in model.parameters())
    cut = run(name, 2)
    assert strides_of(cut, 0) | strides_of(cut, 1) == wanted


def test_a_stage_of_odd_weights_trains_as_torch_does() -> None:
    of = example("NotContiguous")
    cut = run("NotContiguous", 2, num_microbatches=1)
    features, target = cut.batches[0][0].values()
    assert of.loss is not None
    of.loss(of.model(features), target).backward()
    found, wanted = cut.gradients(0, 1)["p.third"], of.model.get_parameter("third").grad
    assert wanted is not None
    assert_same_bits({"third": found}, {"third": wanted})
    assert found.stride() == wanted.stride() == of.model.get_parameter("third").stride()
