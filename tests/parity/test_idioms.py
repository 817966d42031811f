"""What models write in place, and the regions they open: eager, captured and cut give the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from zoo import Example

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import partition, partition_by_operator
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer

STEPS = 3


class Model(nn.Module):
    """Three linear layers, a buffer, and a body that puts them together."""

    def __init__(self, body: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("mean", torch.zeros(4))
        self.counter = torch.zeros(4)
        self.body = body

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.body(self, x, y).square().mean()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(3, 6, 4), torch.randn(3, 6, 4)) for _ in range(STEPS)]


def eager(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in copy.deepcopy(batches()):
        loss = model(*batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {n: t.detach() for n, t in model.state_dict().items()}


def trained(
    model: nn.Module, dag: OperatorDag, num_stages: int | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    CACHE.clear()
    cut = partition_by_operator(dag) if num_stages is None else partition(dag, num_stages)
    example = Example(copy.deepcopy(model), batches)
    optimizer = Optimizer("AdamW", lr=1e-2)
    run = InlineRun(example, dag, cut, num_microbatches=1, optimizer=optimizer)
    for step, batch in enumerate(batches()):
        run.step(step, [batch])
    return run.losses, run.weights(STEPS)


def assert_alike(body: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = Model(body)
    dag = OperatorDag.from_json(capture(model, batches()[0]).to_json())
    wanted_losses, wanted = eager(model)
    for num_stages in (1, 2, None):
        losses, weights = trained(model, dag, num_stages)
        assert losses == wanted_losses
        assert_same_bits(weights, {name: wanted[name] for name in weights})


def through_complex_values(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = torch.fft.rfft(m.first(x), dim=1) * torch.exp(1j * m.second(y)[:, :4])
    return m.third(torch.fft.irfft(h, n=6, dim=1))


def assigns_a_buffer(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean((0, 1))
    return m.third(m.second(h - m.mean).tanh())


def checkpoints(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = checkpoint(lambda h: m.second(h).tanh(), m.first(x), use_reentrant=True)
    return m.third(h)


def writes_a_view_of_the_batch(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.transpose(0, 1)[0].add_(1)
    h = m.second(m.first(x)).tanh() + y
    y[y > 1] = 0.5
    return m.third(h + y)


def writes_what_it_computed_into_the_batch(
    m: Model, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    h = m.first(x).tanh()
    y[:, 1:3] = h[:, 1:3]
    return m.third(m.second(h) + y)


def fills_zeros(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    filled = torch.zeros_like(h)
    filled[:, 0] = h[:, 0]
    filled.view(-1, 4)[1] = m.second(h).tanh()[0, 1]
    return m.third(filled)


def clamps_a_parameter(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.second.weight.clamp_(-0.1, 0.1)
    return m.third(m.second(m.first(x)).tanh())


def rescales_a_parameter(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.second.weight.data[0].mul_(0.5)
    with torch.no_grad():
        m.second.bias.copy_(m.second.bias / m.second.bias.norm())
    return m.third(m.second(m.first(x)).tanh())


def casts_for_itself(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.second(m.first(x))
        with torch.autocast("cpu", enabled=False):
            h = m.third(h.float())
    return h


def through_float8(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return m.third(m.second(m.first(x).to(torch.float8_e4m3fn).float()).tanh())


def in_inference_mode(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = m.first(x)
    with torch.inference_mode():
        scale = h.abs().mean()
    return m.third(m.second(h) * scale.clone())


def maps_over_rows(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = torch.vmap(torch.func.vmap(lambda row: m.second(row) * row.norm()))(m.first(x))
    return m.third(torch.vmap(lambda a, b: a @ b.T, in_dims=(1, None), out_dims=1)(h, y[0, :4]))


BODIES = [
    through_complex_values,
    assigns_a_buffer,
    checkpoints,
    writes_a_view_of_the_batch,
    clamps_a_parameter,
    maps_over_rows,
    casts_for_itself,
]
SLOWER = [
    writes_what_it_computed_into_the_batch,
    fills_zeros,
    rescales_a_parameter,
    through_float8,
    in_inference_mode,
]


@pytest.mark.parametrize(
    "body", [*BODIES, *(pytest.param(b, marks=pytest.mark.slow) for b in SLOWER)]
)
def test_captured_and_cut_anywhere_a_model_trains_as_it_does_eagerly(
    body: Callable[..., torch.Tensor],
) -> None:
    assert_alike(body)


def drops_out(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    h = functional.alpha_dropout(m.first(x), 0.3, True)
    h = functional.feature_alpha_dropout(m.second(h), 0.3, True)
    return functional.rrelu(functional.dropout1d(m.third(h), 0.3, True), training=True)


def test_every_kind_of_dropout_draws_the_same_wherever_it_is_cut() -> None:
    model = Model(drops_out)
    dag = capture(model, batches()[0])
    wanted_losses, wanted = trained(model, dag, 1)
    assert len(set(wanted_losses)) == STEPS
    for num_stages in (2, None):
        losses, weights = trained(model, dag, num_stages)
        assert losses == wanted_losses
        assert_same_bits(weights, wanted)


def another_shape(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.mean = torch.zeros(5)
    return m.first(x)


def by_the_batch(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.first.weight.mul_(x.mean())
    return m.first(x)


def renormalised(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = (x[..., 0] > 0).long()
    return functional.embedding(rows, m.first.weight, max_norm=1.0)


def a_plain_tensor(m: Model, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m.counter.add_(1)
    return m.first(x) * m.counter


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (another_shape, r"assigns its buffer 'mean'.*float32\[4\] becomes torch.float32\[5\]"),
        (by_the_batch, "writes into a parameter in place what depends on the batch"),
        (renormalised, r"depends on the batch.*max_norm=None"),
        (a_plain_tensor, r"neither parameter nor buffer.*aten.add_.Tensor.*register_buffer"),
    ],
)
def test_writes_that_no_stage_could_keep_are_refused_by_name(body: Any, message: str) -> None:
    model = Model(body)
    with pytest.raises(CaptureFailed, match=message):
        capture(model, batches()[0])
    assert model.counter.tolist() == [0, 0, 0, 0]
