"""Tensors that share memory without being one tensor are refused by name when training changes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture
from dagflow.training.first_batch import FirstBatch
from dagflow.training.initial_weights import buffer_reader
from dagflow.training.settings import Config

BATCH = torch.randn(3, 8)


class Model(nn.Module):
    """Linear layers, and what `build` adds; `body` computes with it."""

    def __init__(self, build: Callable[[Any], None], body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.l, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        build(self)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, torch.tanh(self.l(x))).square().mean()


def transposed(m: Any) -> None:
    m.k.weight = nn.Parameter(m.l.weight.data.T)


def a_slice(m: Any) -> None:
    whole = torch.randn(16, 8)
    m.a, m.b = nn.Parameter(whole), nn.Parameter(whole[:8])


def as_buffer(m: Any) -> None:
    m.register_buffer("w", m.l.weight.data)


def as_attribute(m: Any) -> None:
    m.w = m.l.weight.detach()


def in_a_closure(m: Any) -> None:
    w = m.l.weight
    m.f = lambda h: nn.functional.linear(h, w)


def in_a_list(m: Any) -> None:
    m.ws = [m.l.weight]


def by_numpy(m: Any) -> None:
    m.array = m.l.weight.detach().numpy()


def buffers(m: Any) -> None:
    whole = torch.zeros(16)
    m.register_buffer("whole", whole)
    m.register_buffer("part", whole[:8])


def writes_a_part(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.part.add_(h.detach().mean(0))
    return h + m.whole[:8]


REFUSED = [
    (transposed, lambda m, h: m.k(h), r"'l\.weight'.*'k\.weight'.*same Parameter object.*clone"),
    (a_slice, lambda m, h: h @ m.a.T[:, :8] + h @ m.b, r"'a'.*'b'"),
    (as_buffer, lambda m, h: h @ m.w, r"parameter 'l\.weight'.*buffer 'w'"),
    (
        as_attribute,
        lambda m, h: h @ m.w,
        r"parameter 'l\.weight'.*neither parameter nor buffer 'w'",
    ),
    (in_a_closure, lambda m, h: m.f(h), r"parameter 'l\.weight'.*not from a closure"),
    (in_a_list, lambda m, h: h @ m.ws[0], r"parameter 'l\.weight'"),
    (by_numpy, lambda m, h: h @ torch.from_numpy(m.array), r"parameter 'l\.weight'"),
    (buffers, writes_a_part, r"buffer 'part'.*buffer 'whole'|buffer 'whole'.*buffer 'part'"),
]


@pytest.mark.parametrize(("build", "body", "message"), REFUSED)
def test_memory_that_training_changes_under_two_names_is_refused(
    build: Any, body: Any, message: str
) -> None:
    with pytest.raises(CaptureFailed, match=message):
        capture(Model(build, body), BATCH)


def test_the_same_is_refused_without_memory() -> None:
    with torch.device("meta"), pytest.raises(CaptureFailed, match=r"'l\.weight'.*'k\.weight'"):
        capture(Model(transposed, lambda m, h: m.k(h)), BATCH)


def tied(m: Any) -> None:
    m.k.weight = m.l.weight


def columns(m: Any) -> None:
    whole = torch.randn(8, 16)
    m.a, m.b = nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 1::2])


def frozen(m: Any) -> None:
    m.requires_grad_(False)
    m.register_buffer("w", m.l.weight.data)
    m.g = nn.Parameter(torch.ones(8))


ALLOWED = [
    (tied, lambda m, h: m.k(h)),
    (columns, lambda m, h: h @ m.a + h @ m.b),
    (frozen, lambda m, h: h @ m.w * m.g),
    (buffers, lambda m, h: m.k(h) + m.whole[:8] + m.part),
]


@pytest.mark.parametrize(("build", "body"), ALLOWED)
def test_ties_neighbours_and_what_nothing_changes_are_captured(build: Any, body: Any) -> None:
    capture(Model(build, body), BATCH)


def teacher(m: Any) -> None:
    m.k.requires_grad_(False)


def follows(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for ours, theirs in zip(m.k.parameters(), m.l.parameters(), strict=True):
            ours.lerp_(theirs, 0.1)
    return h - m.k(h)


def follows_by_data(m: Any, h: torch.Tensor) -> torch.Tensor:
    y = m.k(h)
    m.k.weight.data.mul_(0.9).add_(m.l.weight.data, alpha=0.1)
    return h - y.detach()


def clamps(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.k.bias[:2].clamp_(-0.1, 0.1)
    return m.k(h)


@pytest.mark.parametrize("body", [follows, follows_by_data, clamps])
def test_a_frozen_parameter_that_forward_writes_is_refused(body: Any) -> None:
    with pytest.raises(CaptureFailed, match=r"'k\.\w+', which isn't trained.*register_buffer"):
        capture(Model(teacher, body), BATCH)


def test_a_trained_parameter_may_be_written() -> None:
    capture(Model(tied, clamps), BATCH)


def scale(m: Any) -> None:
    m.register_buffer("v", torch.ones(8))
    m.norm = nn.BatchNorm1d(8)


def uses_then_assigns(m: Any, h: torch.Tensor) -> torch.Tensor:
    y = m.k(h / m.v)
    m.v = 0.9 * m.v + 0.1 * h.detach().var(0)
    return y


def assigns_between(m: Any, h: torch.Tensor) -> torch.Tensor:
    y = h * m.v[None]
    m.v = m.v.clamp(0.1, 0.5)
    return y * m.v


def clamps_a_mean(m: Any, h: torch.Tensor) -> torch.Tensor:
    y = m.norm(h)
    m.norm.running_mean = m.norm.running_mean.clamp(-0.01, 0.01)
    return y + m.norm.running_mean


@pytest.mark.parametrize("body", [uses_then_assigns, assigns_between, clamps_a_mean])
def test_a_buffer_that_a_gradient_needs_may_be_assigned(body: Any) -> None:
    model = Model(scale, body)
    reader = buffer_reader(model, None)
    prepared = FirstBatch(model, None, (BATCH,), 1, reader, Config()).prepare(check=True)
    assert any(buffer.mutated for buffer in prepared.dag.buffers)
