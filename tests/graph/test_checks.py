"""Checks of values that only raise are kept as assertions; targets a mask selects reach the CTC loss.

PYTEST_DONT_REWRITE: what a line asks is read off its code, and pytest writes assertions anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from checked import Check, Checked, captured_with_an_assertion, run_graph
from torch import nn
from torch.nn import functional

from dagflow.check.micro_batch import check_capture
from dagflow.errors import CaptureFailed, ResultsDiffer
from dagflow.graph.capture import capture


def too_large(x: torch.Tensor) -> None:
    if x is not None and x.abs().max() >= 5:
        raise ValueError("too large")


def not_finite(x: torch.Tensor) -> None:
    if not (torch.isfinite(x).all() and x.sum() < 1e6):
        message = "not finite"
        raise ValueError(message)


def asserts(x: torch.Tensor) -> None:
    assert bool((x > -5).all()), "too small"


def in_a_later_branch(x: torch.Tensor) -> None:
    if x.dim() != 2:
        x = x.flatten(1)
    elif (x < -5).any():
        raise ValueError("too small")
    else:
        x = x + 1


def reads_a_number(x: torch.Tensor) -> None:
    assert -x.shape[0] - 2 < x.min().item(), "too small"


def clamps_what_is_not_finite(x: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(x).all():
        x = x.clamp(-10, 10)
    return x


def clamps_infinities(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float32 and torch.isinf(x).any():
        return x.clamp(-10, 10)
    return x


RAISING = [too_large, not_finite, asserts, in_a_later_branch, reads_a_number]


@pytest.mark.parametrize("check", [*RAISING, clamps_what_is_not_finite, clamps_infinities])
def test_a_branch_that_raises_or_clamps_infinities_is_asserted_not_to_be_taken(
    check: Check,
) -> None:
    dag, model, good = captured_with_an_assertion(check)
    bad = good.clone()
    bad[1] = -torch.inf
    with pytest.raises((ValueError, AssertionError)) if check in RAISING else nullcontext():
        model(bad)
    with pytest.raises(
        ResultsDiffer, match=rf"demands of the values doesn't hold \({__file__}:\d+"
    ):
        run_graph(dag, model, bad)


def returns_something_else(x: torch.Tensor) -> torch.Tensor | None:
    if x.sum() < 0:
        if x.dim() == 2:
            return x + 1
        raise ValueError("no matrix")
    return None


def only_if_both(x: torch.Tensor) -> None:
    if x.sum() < 0 and x.max() > 3:
        raise ValueError("both")


def not_among(x: torch.Tensor) -> None:
    if x.sum().round() not in (1, 2):
        raise ValueError("neither")


def between(x: torch.Tensor) -> None:
    if 0 < x.sum() < 1:
        raise ValueError("between")


def warns(x: torch.Tensor) -> None:
    if x.sum() < 0:
        x = x + 1


@pytest.mark.parametrize("check", [returns_something_else, only_if_both, not_among, between, warns])
def test_other_branches_on_values_are_refused(check: Check) -> None:
    with pytest.raises(CaptureFailed, match=r"check that only raises may stay"):
        capture(Checked(check), torch.rand(3, 4))


class Speech(nn.Module):
    """As transformers trains speech: labels are checked, and those that count selected."""

    def __init__(self, select: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.select = nn.Linear(4, 6), select

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.max() >= 6:
            raise ValueError("labels")
        scores = self.linear(x).log_softmax(-1).transpose(0, 1)
        mask = (labels != -100) & (labels != 0)
        lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        return functional.ctc_loss(
            scores, self.select(labels, mask), lengths, mask.sum(-1), reduction="sum"
        )


def speech(rows: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(1, 6, (rows, 5))
    labels[0, 3:] = -100
    labels[1, 0] = labels[1, 2] = -100  # not at the end
    return {"x": torch.randn(rows, 14, 4), "labels": labels}


@pytest.mark.parametrize("select", [torch.masked_select, lambda labels, mask: labels[mask]])
def test_targets_that_a_mask_selects_give_the_ctc_loss_to_the_bit(
    select: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    model, batch = Speech(select), speech(3)
    dag = capture(model, batch)
    assert "aten.masked_select.default" not in {node.op for node in dag.nodes}
    _, report = check_capture(dag, model, batch, following=speech(4))
    assert report.exact
    assert report.one_row
    assert not report.fixed
    assert not report.skipped


class Padded(nn.Module):
    """Codecs keep strides in buffers, and read them as numbers."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.linear, self.counts = nn.Linear(4, 4), counts
        self.stride = nn.Buffer(torch.tensor(3), persistent=False)
        self.seen = nn.Buffer(torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = self.seen if self.counts else self.stride
        ideal = torch.ceil(x.shape[-1] / number) * number if number > 0 else number + 4
        self.seen += 1
        return self.linear(functional.pad(x, (0, int(ideal) - 4))[:, :4]).square().mean()


def test_numbers_in_buffers_that_never_change_are_read() -> None:
    model, batch = Padded(False), torch.randn(3, 4)
    dag = capture(model, batch)
    _, report = check_capture(dag, model, batch)
    assert report.exact
    assert not report.skipped
    with pytest.raises(CaptureFailed, match=r"test_checks.*number > 0.*torch.where or a mask"):
        capture(Padded(True), batch)


def sides(x: torch.Tensor) -> torch.Tensor:
    shapes = torch.tensor([[4, 2], [2, 2]])
    height, width = shapes[0]
    return x[:, : int(height * width) - 4].repeat(1, shapes[1].tolist()[0] // 2)


def test_numbers_in_small_tensors_that_forward_makes_are_read() -> None:
    model, batch = Checked(sides), torch.rand(3, 4)
    _, report = check_capture(capture(model, batch), model, batch)
    assert report.exact
    assert not report.skipped
