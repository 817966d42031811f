"""What torch's and transformers' own checks demand of values is asserted on workers, by its line."""

from __future__ import annotations

import re

import pytest
import torch
from checked import Check, Checked, captured_with_an_assertion, run_graph
from torch import nn
from transformers.utils.import_utils import torch_compilable_check

from dagflow.errors import CaptureFailed, ResultsDiffer
from dagflow.graph.capture import capture


def all_of_a_tensor(x: torch.Tensor) -> None:
    torch._check_tensor_all(x > -5, lambda: "too small")


def a_number(x: torch.Tensor) -> None:
    torch._check(x.min().item() > -5)


def a_number_read_before(x: torch.Tensor) -> None:
    smallest, _ = x.flatten()[:2].long().tolist()
    torch._check(
        smallest + x.shape[0] > -5 + 3,
        lambda: "too small",
    )


def by_torchs_assert(x: torch.Tensor) -> None:
    torch._assert((x > -5).all(), "too small")


def transformers_of_a_tensor(x: torch.Tensor) -> None:
    n_image_tokens = (x > -5).sum()
    torch_compilable_check(
        n_image_tokens * 2 == x.numel() * 2, f"do not match, tokens: {n_image_tokens}"
    )


def transformers_of_a_selection(x: torch.Tensor) -> None:
    torch_compilable_check(x[x > -5].numel() == x.numel(), "do not match")


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (all_of_a_tensor, "torch._check_tensor_all(x > -5)"),
        (a_number, "torch._check(x.min().item() > -5)"),
        (a_number_read_before, "torch._check(smallest + x.shape[0] > -5 + 3)"),
        (by_torchs_assert, "torch._assert((x > -5).all())"),
        (
            transformers_of_a_tensor,
            "torch_compilable_check(n_image_tokens * 2 == x.numel() * 2)",
        ),
        (
            transformers_of_a_selection,
            "torch_compilable_check(x[x > -5].numel() == x.numel())",
        ),
    ],
)
def test_what_a_check_of_torchs_demands_of_values_is_asserted_by_its_line(
    check: Check, says: str
) -> None:
    dag, model, good = captured_with_an_assertion(check)
    bad = good.clone()
    bad[0] = -7
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        model(bad)
    with pytest.raises(ResultsDiffer, match=rf"{__file__}:\d+: {re.escape(says)}\)"):
        run_graph(dag, model, bad)


def of_sizes(x: torch.Tensor) -> None:
    torch._check(x.shape[0] * 2 > 2)
    torch_compilable_check(x.shape[1] == 4, "four numbers")


def test_a_check_of_sizes_needs_no_assertion() -> None:
    dag = capture(Checked(of_sizes), torch.rand(3, 4))
    assert "aten._assert_async.msg" not in {node.op for node in dag.nodes}


def of_a_number_that_no_operator_gives(x: torch.Tensor) -> None:
    torch._check(torch.unique(x).numel() > 3)


def test_a_check_that_no_worker_could_make_is_refused_by_its_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Checked(of_a_number_that_no_operator_gives))
    says = re.escape("torch._check(torch.unique(x).numel() > 3)")
    with pytest.raises(CaptureFailed, match=rf"Module '1' .*{__file__}:\d+: {says}.*What to do"):
        capture(model, torch.rand(3, 4))
