"""What an earlier call of forward left may be counted and logged, and may decide nothing."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dagflow.check.micro_batch import check_capture
from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag

BATCH = torch.randn(3, 4)
SLOW = pytest.mark.slow
SEEN: dict[str, Any] = {}


class Meter:
    """Sums up, as logging code does."""

    def __init__(self) -> None:
        self.value, self.sum, self.count, self.average = 0.0, 0.0, 0, 0.0

    def update(self, value: Any, count: int = 1) -> None:
        self.value, self.sum, self.count = value, self.sum + value * count, self.count + count
        self.average = self.sum / self.count


class Metric(nn.Module):
    """Keeps its state in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.correct, self.total, self.computed = torch.zeros(()), 0, None

    def update(self, h: torch.Tensor) -> None:
        self.computed = None
        self.correct, self.total = self.correct + (h > 0).sum(), self.total + h.numel()


@dataclasses.dataclass(slots=True)
class Slotted:
    calls: int = 0


class Model(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body
        self.calls, self.total, self.average, self.flag = 0, 0.0, None, False
        self.seen: list[Any] = []
        self.by_name: dict[str, Any] = {}
        self.by_step: dict[int, Any] = {}
        self.logged: dict[str, list[Any]] = collections.defaultdict(list)
        self.recent: collections.deque[Any] = collections.deque(maxlen=2)
        self.paths: collections.Counter[str] = collections.Counter()
        self.meter, self.slotted, self.unregistered = Meter(), Slotted(), [Metric()]
        self.numbers = np.zeros(1)
        self.deep = types.SimpleNamespace(iterators={"count": itertools.count()})
        self.metric = Metric()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, self.layer(x)).square().mean()


def counts_in_one_line(self: Any, h: torch.Tensor) -> torch.Tensor: self.calls += 1; return h  # fmt: skip # noqa: E702


def prints_now_and_then(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    if self.calls % 100 == 0:
        print(f"step {self.calls:d}, {h.shape[0]} rows")
    return h


def sums_up(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.total += h.detach().mean()
    self.meter.update(h.detach().mean(), h.shape[0])
    return h


def averages(self: Any, h: torch.Tensor) -> torch.Tensor:
    now = h.detach().mean()
    self.average = now if self.average is None else 0.9 * self.average + 0.1 * now
    return h


def logs(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.seen.append({"step": self.calls, "norm": h.detach().norm()})
    self.logged["mean"].append(h.mean().item())
    self.by_name["hidden"] = h.detach()
    self.by_step[self.calls] = h.detach().mean()
    self.recent.append(h.detach().mean())
    self.paths["train" if self.training else "eval"] += 1
    self.calls += 1
    return h


def keeps_the_last_ten(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.seen = (self.seen + [h.detach().mean()])[-10:]  # noqa: RUF005
    return h


def measures(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.metric.update(h)
    self.slotted.calls += 1
    self.unregistered[0].total += h.numel()
    return h


def logs_globally(self: Any, h: torch.Tensor) -> torch.Tensor:
    SEEN["hidden"] = h.detach()
    SEEN.setdefault("all", []).append(h.detach())
    return h


HARMLESS = [
    (counts_in_one_line, r"self\.calls"),
    (prints_now_and_then, r"self\.calls"),
    (sums_up, r"self\.meter; .*self\.total"),
    pytest.param(averages, r"self\.average", marks=SLOW),
    (
        logs,
        r"self\.by_name; .*self\.by_step; .*self\.logged; .*self\.paths; .*self\.recent; .*self\.seen",
    ),
    pytest.param(keeps_the_last_ten, r"self\.seen", marks=SLOW),
    (measures, r"self\.slotted; .*metric: self\.correct; .*isn't registered,: self\.total"),
    (logs_globally, "the global 'SEEN'"),
]


def what_the_loss_needs(dag: OperatorDag) -> list[str]:
    needed, found = {dag.loss}, []
    for node in reversed(dag.nodes):
        if node.name in needed:
            needed.update(node.references())
            found.insert(0, node.op.split(".")[1])
    return found


@pytest.mark.parametrize(("body", "names"), HARMLESS)
def test_counters_and_logs_are_warned_of_by_name_and_undone(body: Any, names: str) -> None:
    model = Model(body)
    with pytest.warns(UserWarning, match=f"Forward sets .*{names}"):
        dag = capture(model, BATCH)
    assert what_the_loss_needs(dag) == ["linear", "square", "mean"]
    assert (model.calls, model.total, model.average, model.seen) == (0, 0.0, None, [])
    assert (model.by_name, model.logged, model.paths, SEEN) == ({}, {}, {}, {})
    assert (list(model.recent), model.meter.count, model.slotted.calls) == ([], 0, 0)


def decides_late(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return h * 2 if self.calls == 7 else h


def decides_at_milestones(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return h * 2 if self.calls in {70, 80} else h


def decides_by_a_slot(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.slotted.calls += 1
    return h.relu() if self.slotted.calls > 7 else h


def decides_by_a_module_in_a_list(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.unregistered[0].total += 1
    return h.relu() if self.unregistered[0].total > 7 else h


def decides_by_an_array(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.numbers[0] += 1
    return h.relu() if self.numbers[0] > 7 else h


def decides_by_a_length(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.seen.append(0)
    return h.relu() if len(self.seen) == 7 else h


def decides_by_an_average(self: Any, h: torch.Tensor) -> torch.Tensor:
    return averages(self, h) * self.average


def test_the_line_is_the_first_that_computes_with_it() -> None:
    def body(self: Any, h: torch.Tensor) -> torch.Tensor:
        found = h if self.average is None else h + self.average
        self.average = h.detach().mean(0)
        return torch.relu(found).reshape(found.shape)

    line = body.__code__.co_firstlineno + 1
    with pytest.raises(CaptureFailed, match=rf"self\.average and reads at .*leftovers.py:{line} "):
        capture(Model(body), BATCH)


def turns(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.flag = not self.flag
    return h.relu() if self.flag else h


def chooses(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return (torch.tanh, torch.relu)[self.calls % 2](h)


def writes_a_buffer(self: Any, h: torch.Tensor) -> torch.Tensor:
    averages(self, h)
    self.layer.bias.detach().copy_(self.average.expand(4))
    return h


def loops(self: Any, h: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    steps = 0
    while steps < self.calls:
        steps += 1
    return h


def iterates_deep_inside(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h.relu() if next(self.deep.iterators["count"]) > 7 else h


REFUSED = [
    (decides_late, r"self\.calls and reads at .*test_leftovers"),
    pytest.param(decides_at_milestones, r"self\.calls and reads at .*test_leftovers", marks=SLOW),
    (decides_by_a_slot, r"self\.slotted and reads at .*test_leftovers"),
    (decides_by_a_module_in_a_list, r"Metric, which isn't registered,: self\.total and reads"),
    (decides_by_an_array, r"self\.numbers, and what a later call computes"),
    pytest.param(decides_by_a_length, r"self\.seen and reads at .*test_leftovers", marks=SLOW),
    (decides_by_an_average, r"self\.average and reads at .*test_leftovers"),
    pytest.param(turns, r"self\.flag", marks=SLOW),
    pytest.param(chooses, r"self\.calls", marks=SLOW),
    pytest.param(writes_a_buffer, "parameter|self.average", marks=SLOW),
    pytest.param(loops, r"self\.calls and reads at .*test_leftovers", marks=SLOW),
    (iterates_deep_inside, r"iterator \(the model itself: self\.deep\)"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_decides_in_some_later_call_is_refused_by_name_and_line(
    body: Any, message: str
) -> None:
    model = Model(body)
    with pytest.raises(CaptureFailed, match=f"{message}.*What to do"):
        capture(model, BATCH)
    assert (model.calls, model.seen, model.slotted.calls) == (0, [], 0)
    assert next(model.deep.iterators["count"]) == 0


TABLES: dict[int, torch.Tensor] = {}


def makes_a_table(self: Any, h: torch.Tensor) -> torch.Tensor:
    if self.average is None:
        self.average = torch.linspace(1, 2, 4)
    return h * self.average


def keeps_tables_by_dtype(self: Any, h: torch.Tensor) -> torch.Tensor:
    if h.dtype not in self.by_name:
        self.by_name[h.dtype] = torch.linspace(1, 2, 4, dtype=h.dtype)
    return h * self.by_name[h.dtype]


def keeps_tables_globally(self: Any, h: torch.Tensor) -> torch.Tensor:
    if 4 not in TABLES:
        TABLES[4] = torch.linspace(1, 2, 4)
    return h * TABLES[4]


class Cached(nn.Module):
    @functools.cached_property
    def table(self) -> torch.Tensor:
        return torch.linspace(1, 2, 4)


def reads_a_cached_property(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * self.metric.table


@pytest.mark.parametrize(
    "body",
    [
        makes_a_table,
        reads_a_cached_property,
        pytest.param(keeps_tables_by_dtype, marks=SLOW),
        pytest.param(keeps_tables_globally, marks=SLOW),
    ],
)
def test_tables_that_the_first_call_makes_are_the_graphs_and_not_the_models(body: Any) -> None:
    model = Model(body)
    model.metric = Cached()
    dag = capture(model, BATCH)
    assert check_capture(dag, model, BATCH)[1].exact
    assert [constant.tensor().tolist() for constant in dag.constants] == [
        torch.linspace(1, 2, 4).tolist()
    ]
    assert (model.average, model.by_name, TABLES, vars(model.metric).get("table")) == (
        None,
        {},
        {},
        None,
    )


def begins_otherwise(self: Any, h: torch.Tensor) -> torch.Tensor:
    was, self.flag = self.flag, True
    return h if was else h.relu()


def fits_itself_to_the_first_batch(self: Any, h: torch.Tensor) -> torch.Tensor:
    if not self.flag:
        with torch.no_grad():
            self.layer.bias.sub_(h.mean(0))
        self.flag = True
    return h


def makes_a_layer(self: Any, h: torch.Tensor) -> torch.Tensor:
    if not hasattr(self, "late"):
        self.late = nn.Linear(4, 4)
    return self.late(h)


@pytest.mark.parametrize(
    "body",
    [begins_otherwise, fits_itself_to_the_first_batch, pytest.param(makes_a_layer, marks=SLOW)],
)
def test_a_first_call_that_computes_something_else_is_refused(body: Any) -> None:
    model = Model(body)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CaptureFailed, match=r"self\.(flag|late).*What to do"):
        capture(model, BATCH)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


class Recorder:
    """A hook that keeps what it sees, and may come to interfere."""

    def __init__(self, interferes: bool) -> None:
        self.calls, self.seen, self.interferes = 0, [], interferes

    def __call__(self, module: nn.Module, given: Any, found: torch.Tensor) -> Any:
        self.calls += 1
        self.seen.append(found.detach())
        return found * 2 if self.interferes and self.calls > 7 else None

    def hook(self, module: nn.Module, given: Any, found: torch.Tensor) -> Any:
        return self(module, given, found)


def recorded(kept: dict[str, Any], module: nn.Module, given: Any, found: torch.Tensor) -> None:
    kept["last"] = found.detach()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.hook,
        pytest.param(lambda x: x, marks=SLOW),
        pytest.param(lambda x: lambda *given: x(*given), marks=SLOW),
    ],
)
def test_hooks_may_record_and_not_interfere_later(wrap: Any) -> None:
    for interferes in (False, True):
        model, recorder = nn.Sequential(nn.Linear(4, 4)), Recorder(interferes)
        model[0].register_forward_hook(wrap(recorder))
        if interferes:
            with pytest.raises(CaptureFailed, match=r"Recorder|'x' in the closure"):
                capture(model, (BATCH, BATCH), loss=lambda output, target: output.mean())
        else:
            with pytest.warns(UserWarning, match="Forward sets .*(Recorder|'x' in the closure)"):
                capture(model, (BATCH, BATCH), loss=lambda output, target: output.mean())
        assert (recorder.calls, recorder.seen) == (0, [])


def test_a_hook_may_fill_what_it_is_a_partial_of() -> None:
    kept: dict[str, Any] = {}
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(functools.partial(recorded, kept))
    with pytest.warns(UserWarning, match="an argument of a partial"):
        capture(model, (BATCH, BATCH), loss=lambda output, target: output.mean())
    assert kept == {}


BETWEEN = [
    lambda: 0.49 < random.random() < 0.5,
    pytest.param(lambda: 0.49 < np.random.rand() < 0.5, marks=SLOW),
    pytest.param(lambda: 49 < random.uniform(0, 100) < 50, marks=SLOW),
]


@pytest.mark.parametrize("draw", BETWEEN)
def test_a_draw_that_must_lie_between_two_bounds_is_refused(draw: Any) -> None:
    with pytest.raises(CaptureFailed, match=r"random numbers.*torch\.rand"):
        capture(Model(lambda self, h: h.relu() if draw() else h), BATCH)


def test_loops_that_go_on_while_draws_are_small_or_large_end() -> None:
    def waits(self: Any, h: torch.Tensor) -> torch.Tensor:
        while random.random() < 0.5:
            pass
        while random.random() > 0.5:
            pass
        return h

    with pytest.warns(UserWarning, match="random numbers at .*same graph"):
        capture(Model(waits), BATCH)
