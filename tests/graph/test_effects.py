"""What forward does beside computing is found: undone in the model, refused or warned of by name."""

from __future__ import annotations

import copy
import functools
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy.core.random
import torch
from torch import nn

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.effects import watch_generators

BATCH = torch.randn(3, 4)


class Inner(nn.Module):
    """A linear layer, plain attributes, a buffer, and a body that does something with them."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(4))
        self.body = body
        self.calls, self.last, self.seen = 0, None, []
        self.options = {"scale": 1.0}
        self.generator = random.Random(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, self.layer(x)).square().mean()


class Outer(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = Inner(body)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def counts(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return h


def logs(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.last = h.mean().item()
    self.seen.append(h.detach())
    return h


def scales_by_calls(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls = self.calls + 1
    return h * self.calls


def anneals(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.options["scale"] *= 0.9
    return h * self.options["scale"]


def looks_back(self: Any, h: torch.Tensor) -> torch.Tensor:
    before, self.last = self.last, h.detach()
    return h if before is None else h + before


def replaces_a_parameter(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.layer.weight = nn.Parameter(torch.ones(4, 4))
    return h


def draws(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * random.uniform(1, 2)


def skips(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h if random.random() < 0.05 else h.relu()


def draws_with_numpy(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h + torch.from_numpy(np.random.randn(4)).float()


def draws_with_its_own(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * self.generator.random()


def draws_for_nothing(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h if random.random() >= 0.0 else h.relu()


def drops_no_layer(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h if 2 * np.random.uniform(0, 1) - 1 >= 1.0 or random.random() < 0.0 else h.relu()


def decides(draw: Callable[[], bool]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda self, h: h if draw() else h.relu()


RARE = {
    "np.normal": lambda: np.random.normal() > 9,
    "np.choice": lambda: np.random.choice([0] * 49 + [1]) > 1,
    "np.randint": lambda: np.random.randint(50) > 49,
    "np.uniform": lambda: np.random.uniform(size=3).min() < 1e-9,
    "gauss": lambda: random.gauss(0, 1) > 9,
    "choice": lambda: random.choice([0] * 49 + [1]) > 1,
    "uniform": lambda: random.uniform(0, 1) < 1e-9,
    "urandom": lambda: os.urandom(8) == b"0" * 8,
    "secrets": lambda: secrets.randbelow(50) > 49,
}


@pytest.mark.parametrize("name", RARE)
def test_numbers_that_decide_seldom_are_refused(name: str) -> None:
    message = "random numbers.*(test_effects|depends on them).*torch.rand"
    with pytest.raises(CaptureFailed, match=message):
        capture_unchanged(decides(RARE[name]))


def keeps_for_itself(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.seen.clear()
    self.seen.append(h)
    self.last = h * 2
    return self.last + sum(self.seen)


def settles(self: Any, h: torch.Tensor) -> torch.Tensor:
    if "kind" not in self.options:
        self.options["kind"] = "regression"
    return h


REFUSED = [
    (scales_by_calls, r"inner: self\.calls.*register_buffer"),
    (anneals, r"inner: self\.options"),
    (looks_back, r"inner: self\.last"),
    (replaces_a_parameter, r"replaces a parameter.*inner\.layer: self\.weight"),
    (draws, "random numbers.*draw with torch"),
    (skips, "random numbers.*draw with torch"),
    (draws_with_numpy, "random numbers.*draw with torch"),
    (draws_with_its_own, r"inner: self\.generator|random numbers"),
]
WARNED = [
    (counts, r"Forward sets inner: self\.calls"),
    (logs, r"Forward sets inner: self\.last; inner: self\.seen"),
    (draws_for_nothing, "random numbers at .*same graph"),
    (drops_no_layer, "random numbers at .*same graph"),
]


def state_of(model: nn.Module) -> list[Any]:
    inner = model.inner
    plain = (inner.calls, inner.last, list(inner.seen), dict(inner.options))
    tensors = [(id(t), t._version) for t in (*model.parameters(), *model.buffers())]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return [plain, inner.generator.getstate(), tensors, states, type(inner), id(inner.seen)]


def capture_unchanged(body: Any) -> OperatorDag:
    """Capture, and check that nothing of the model or of random states is otherwise after it."""
    model = Outer(body)
    before = state_of(model)
    try:
        return capture(model, BATCH)
    finally:
        assert state_of(model) == before
        copy.deepcopy(model)


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_state_that_is_no_buffer_and_other_random_numbers_are_refused_by_name(
    body: Any, message: str
) -> None:
    with pytest.raises(CaptureFailed, match=message):
        capture_unchanged(body)


@pytest.mark.parametrize(("body", "message"), WARNED)
def test_what_forward_only_writes_or_makes_no_use_of_is_warned_of(body: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        capture_unchanged(body)


@pytest.mark.parametrize("body", [keeps_for_itself, settles])
def test_attributes_that_carry_nothing_on_are_no_reason_to_warn(body: Any) -> None:
    capture_unchanged(body)


def test_reading_the_clock_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="reads the clock at .*test_effects"):
        capture(Outer(lambda self, h: h * (time.time() % 2)), BATCH)


def sets_a_hook(self: Any, h: torch.Tensor) -> torch.Tensor:
    h.register_hook(lambda gradient: gradient * 2)
    return h


def test_hooks_on_gradients_are_warned_of_by_module_and_parameter() -> None:
    model = Outer(sets_a_hook)
    hooks = [
        model.inner.layer.register_full_backward_hook(lambda *_: None),
        model.inner.layer.weight.register_hook(lambda gradient: gradient),
        model.inner.layer.bias.register_post_accumulate_grad_hook(lambda parameter: None),
    ]
    found = r"module 'inner' \(.*test_effects.*module 'inner.layer'.*'inner.layer.weight'.*bias'"
    with pytest.warns(UserWarning, match=found):
        dag = capture(model, BATCH)
    assert dag.nodes[0].op == "aten.linear.default"
    assert model.inner.layer._backward_hooks
    assert len(hooks) == 3


def gradient_inside(self: Any, h: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
    return h + gradient


def without_gradients_in_vmap(self: Any, h: torch.Tensor) -> torch.Tensor:
    def on_a_row(row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = row.norm()
        return row * scale

    return torch.vmap(on_a_row)(h)


NAMED = [
    (gradient_inside, r"'inner' computes a gradient inside of forward"),
    (lambda self, h: torch.func.grad(lambda x: (x**3).sum())(h), "computes a gradient inside"),
    (without_gradients_in_vmap, "'inner' switches gradients off inside of vmap"),
    (lambda self, h: h * torch.rand(4, generator=torch.Generator()), "generator of its own"),
    (lambda self, h: h * torch.manual_seed(3).initial_seed() * torch.rand(4), "seeds torch's"),
    (lambda self, h: torch.sparse.mm(torch.eye(3).to_sparse(), h), "dense tensors only"),
]


@pytest.mark.parametrize(("body", "message"), NAMED)
def test_what_a_graph_cannot_hold_is_refused_by_name(body: Any, message: str) -> None:
    with pytest.raises(CaptureFailed, match=message) as caught:
        capture_unchanged(body)
    assert __file__ in str(caught.value) or "vmap" in str(caught.value)
    assert "What to do: " in str(caught.value)


def test_threads_capture_at_once() -> None:
    found: dict[int, OperatorDag] = {}

    def work(number: int) -> None:
        torch.manual_seed(0)
        found[number] = capture(Outer(lambda self, h: h.tanh()), BATCH)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(dag == found[0] for dag in found.values())


class Logging:
    """A loss object that keeps what it saw."""

    def __init__(self) -> None:
        self.last, self.history, self.calls = None, [], 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (output - target).square().mean()
        self.last = loss.detach()
        self.history.append(loss.detach())
        self.calls += 1
        return loss

    def again(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self(output, target)


class Centred(Logging):
    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        before = 0.0 if self.last is None else self.last
        self.last = before * 0.9 + output.detach().mean(0)
        return (output - target - self.last).square().mean()


class Warming(Logging):
    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (output - target).square().mean() * (1.0 if self.calls < 4 else 0.1)


class Centre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", torch.zeros(4))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = (output - target - self.c).square().mean()
        self.c = self.c * 0.9 + 0.1 * output.detach().mean(0)
        return loss


PAIR = (torch.randn(3, 4), torch.randn(3, 4))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.again, functools.partial])
def test_what_a_loss_only_writes_is_warned_of_and_undone(wrap: Any) -> None:
    loss = Logging()
    with pytest.warns(UserWarning, match=r"the loss Logging: self\.last"):
        capture(nn.Linear(4, 4), PAIR, loss=wrap(loss))
    assert (loss.last, loss.history, loss.calls) == (None, [], 0)


@pytest.mark.parametrize(
    ("loss", "name"), [(Centred(), "last"), (Warming(), "calls"), (Centre(), "c")]
)
def test_what_a_loss_keeps_from_call_to_call_is_refused_by_name(loss: Any, name: str) -> None:
    before = dict(vars(loss))
    buffers = dict(loss._buffers) if isinstance(loss, nn.Module) else {}
    with pytest.raises(CaptureFailed, match=rf"the loss \w+: self\.{name}.*submodule of the model"):
        capture(nn.Linear(4, 4), PAIR, loss=loss)
    assert vars(loss) == before
    assert all(loss._buffers[name] is buffer for name, buffer in buffers.items())


def test_draws_of_torchs_own_mathematics_are_not_the_models() -> None:
    with watch_generators("largest") as draws:
        sympy.core.random.rng.random()
        assert draws.lines == []
        random.random()
    assert len(draws.lines) == 1
