"""What forward leaves behind outside of attributes is found, put back, and refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture

BATCH = torch.randn(3, 4)
CALLS = [0]
STEP = 0
SETTLED = {}


def in_a_closure() -> Any:
    n = 0

    def body(self: Any, h: torch.Tensor) -> torch.Tensor:
        nonlocal n
        n += 1
        return h * 2 if n > 4 else h

    return body


def in_a_default(self: Any, h: torch.Tensor, calls: list[int] = [0]) -> torch.Tensor:  # noqa: B006
    calls[0] += 1
    return h * 2 if calls[0] > 4 else h


def in_a_global_list(self: Any, h: torch.Tensor) -> torch.Tensor:
    CALLS[0] += 1
    return h * 2 if CALLS[0] > 4 else h


def in_a_global(self: Any, h: torch.Tensor) -> torch.Tensor:
    global STEP
    STEP += 1
    return h * 2 if STEP > 4 else h


def on_a_function(self: Any, h: torch.Tensor) -> torch.Tensor:
    on_a_function.calls += 1
    return h * 2 if on_a_function.calls > 4 else h


on_a_function.calls = 0


def on_a_class(self: Any, h: torch.Tensor) -> torch.Tensor:
    Model.calls += 1
    return h * 2 if Model.calls > 4 else h


def counts_with_itertools(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * 2 if next(self.count) > 4 else h


def from_a_generator(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * next(self.scales)


class Model(nn.Module):
    calls = 0

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body
        self.count, self.scales = itertools.count(), (x for x in (1.0, 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, self.layer(x)).square().mean()


REFUSED = [
    (in_a_closure(), "'n' in the closure of in_a_closure"),
    (in_a_default, "a default of in_a_default"),
    (in_a_global_list, "the global 'CALLS'"),
    (in_a_global, "the global 'STEP'"),
    (on_a_function, "the attribute 'calls' of on_a_function"),
    (on_a_class, r"Model\.calls"),
    (counts_with_itertools, r"iterator \(the model itself: self\.count\)"),
    (from_a_generator, r"iterator \(the model itself: self\.scales\)"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_calls_leave_outside_of_attributes_is_refused_and_put_back(
    body: Any, message: str
) -> None:
    model = Model(body)
    with pytest.raises(CaptureFailed, match=message + ".*register_buffer"):
        capture(model, BATCH)
    kept = (CALLS, STEP, in_a_default.__defaults__, on_a_function.calls, Model.calls)
    assert kept == ([0], 0, ([0],), 0, 0)
    assert next(model.count) == 0
    assert next(model.scales) == 1.0


def settles(self: Any, h: torch.Tensor) -> torch.Tensor:
    SETTLED.setdefault("kind", "relu")
    return h.relu()


def test_what_settles_in_the_first_call_is_no_reason_to_refuse() -> None:
    capture(Model(settles), BATCH)
    assert SETTLED == {}


class Guarded:
    """Says no to whoever asks for its width, as configurations of uneven layers do."""

    def __init__(self) -> None:
        self.width, self.names = 4, iter(["a"])

    def __getattribute__(self, name: str) -> Any:
        if name == "width":
            raise RuntimeError("ask a layer")
        return super().__getattribute__(name)


class Slotted:
    __slots__ = ("names", "never")

    def __init__(self) -> None:
        self.names = iter(["a"])


@pytest.mark.parametrize("kind", [Guarded, Slotted])
def test_objects_are_looked_into_without_asking_their_classes(kind: type) -> None:
    class Model(nn.Module):
        def __init__(self, takes: bool) -> None:
            super().__init__()
            self.layer, self.config, self.takes = nn.Linear(4, 1), kind(), takes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.takes:
                next(self.config.names)
            return self.layer(x).square().mean()

    names = (model := Model(takes=False)).config.names
    capture(model, BATCH)
    assert model.config.names is names
    with pytest.raises(CaptureFailed, match="next item of an iterator"):
        capture(Model(takes=True), BATCH)
