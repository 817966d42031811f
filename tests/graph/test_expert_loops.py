"""Loops over the experts that were hit are captured as loops over all, to the bit, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, one_hot, silu

from dagflow.check.micro_batch import check_capture
from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.plan.partition import partition_by_operator


class Routed(nn.Module):
    """A layer of five experts, of which each row of x (S, 8) takes two; some are never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.randn(5, 8, 8) / 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.named = nn.ModuleDict({f"expert_{i}": nn.Linear(8, 8) for i in range(5)})
        self.counts = nn.Buffer(torch.zeros(5))
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor([0.0, 0.5, -90.0, 0.2, -80.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        return self.mixed(x, weights, index).square().mean()

    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class WithAPlaceForNoExpert(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = one_hot(index, 6).permute(2, 1, 0)
            hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for expert in hit:
            expert = expert[0]
            with torch.no_grad():
                rank, rows = torch.where(mask[expert])
            part = linear(x[rows], self.weight.view(5, 8, 8)[expert]).view(-1, 8)
            part *= weights[rows, rank, None]
            out.index_add_(0, rows, part)
        return out


class WithModulesOfTheirOwn(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            layer = self.layer(expert)
            rank, rows = torch.where(mask[expert].squeeze(0))
            chosen = x[None, rows].reshape(-1, 8)
            out.index_add_(0, rows, silu(layer(chosen)) * weights[rows, rank, None])
        return out

    def layer(self, expert: torch.Tensor) -> nn.Module:
        return self.experts[expert]


class WithModulesByName(WithModulesOfTheirOwn):
    def layer(self, expert: torch.Tensor) -> nn.Module:
        return self.named[f"expert_{expert[0]}"]


class AsksWhetherThereAreRows(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for one in (mask.sum((-1, -2)) > 0).nonzero(as_tuple=False):
            expert = int(one.item())
            rank, rows = torch.where(mask[expert])
            if rows.numel() == 0:
                continue
            part = x[rows] if expert > 3 else linear(x[rows], self.weight[expert])
            out.index_add_(0, rows, part * weights[rows, rank, None])
        return out


class WritesByIndex(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in one_hot(index, 5).sum((0, 1)).nonzero().flatten().tolist():
            found = torch.where(index == expert)
            rows, rank = found[0], found[1]
            out[rows] += linear(x[rows], self.weight[expert]) * weights[rows, rank].unsqueeze(-1)
            out = out.index_add(0, rows, x[rows])
        return out


class SkipsExpertsWithOneRow(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 4).nonzero().squeeze(-1):
            rank, rows = torch.where(mask[expert])
            out.index_add_(0, rows, x[rows] * weights[rows, rank, None])
        return out


class SplitsBySizes(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        order = index.flatten().argsort(stable=True)
        sizes = one_hot(index, 5).sum((0, 1)).tolist()
        parts = x[order // 2].split(sizes, dim=0)
        found = torch.cat([linear(part, w) for part, w in zip(parts, self.weight, strict=True)])
        found = found * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, found)


class WritesByMask(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert, layer in enumerate(self.experts):
            mask = index[:, 0] == expert
            out[mask] = layer(x[mask]) * weights[mask, 0, None]
        return out


class AsksAMask(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, layer in enumerate(self.experts):
            mask = (index == number).any(dim=-1)
            if mask.any():
                part = layer(x[mask]) * weights[mask, :1]
                out[mask] += part
            rows, _ = torch.where(index == number)
            out.index_add_(0, rows, x[rows])
        return out


class PassesOverByASum(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in range(5):
            mask = index == number
            if mask.sum() < 4:
                continue
            rows, rank = torch.where(mask)
            out.index_add_(
                0, rows, linear(x[rows], self.weight[number]) * weights[rows, rank, None]
            )
        return out


class ScattersByMask(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        mask = index[:, 0] == 1
        return x.masked_scatter(mask[:, None], self.experts[1](x[mask])) * weights.sum(-1, True)


class SkipsExpertsWithoutRows(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 0, 1)
        for expert in range(5):
            rows, rank = torch.where(mask[expert])
            if rows.numel() > 0:
                part = self.experts[expert](x[rows])
                out.index_add_(0, rows, part * weights[rows, rank].unsqueeze(-1))
        out += 1
        return out


KINDS = [
    SkipsExpertsWithoutRows,
    WithAPlaceForNoExpert,
    WithModulesOfTheirOwn,
    pytest.param(WithModulesByName, marks=pytest.mark.slow),
    pytest.param(AsksWhetherThereAreRows, marks=pytest.mark.slow),
    WritesByIndex,
    pytest.param(SkipsExpertsWithOneRow, marks=pytest.mark.slow),
    SplitsBySizes,
    WritesByMask,
    pytest.param(ScattersByMask, marks=pytest.mark.slow),
    AsksAMask,
    pytest.param(PassesOverByASum, marks=pytest.mark.slow),
]


def captured(kind: Callable[[], nn.Module]) -> tuple[OperatorDag, nn.Module]:
    torch.manual_seed(0)
    model = kind()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*each has parameters of its own.*")
        return capture(model, torch.randn(7, 8)), model


@pytest.mark.parametrize("kind", KINDS)
def test_loops_over_experts_that_were_hit_have_eagers_bits(kind: Callable[[], nn.Module]) -> None:
    dag, model = captured(kind)
    _, report = check_capture(dag, model, torch.randn(11, 8))
    assert report.exact
    assert report.one_row
    assert not report.fixed
    sizes_of_data = [o for p in partition_by_operator(dag).programs for o in p.outputs]
    assert not any("about" in str(output.value.shape) for output in sizes_of_data)


@pytest.mark.parametrize(
    "kind",
    [WithModulesOfTheirOwn, pytest.param(SkipsExpertsWithoutRows, marks=pytest.mark.slow)],
)
def test_experts_with_parameters_of_their_own_are_warned_of(kind: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match=r"loops over those of its experts .*its gradient is zero"):
        capture(kind(), torch.randn(7, 8))


def test_sizes_that_data_decides_put_no_limits_to_a_batchs_sizes() -> None:
    class InPairs(WithAPlaceForNoExpert):
        def mixed(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            return super().mixed(x, *given).view(x.shape[0] // 2, 2, 8)

    torch.manual_seed(0)
    dag = capture(InPairs(), torch.randn(6, 8))
    assert match_batch(dag, {"input": torch.randn(10, 8)}, {}, "step 0")
    with pytest.raises(BatchInvalid, match=r"the result of aten.view.default"):
        match_batch(dag, {"input": torch.randn(7, 8)}, {}, "step 0")


class CountsInABuffer(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero().flatten():
            rank, rows = torch.where(mask[expert])
            part = self.counted(expert, x[rows])
            out.index_add_(0, rows, part * weights[rows, rank, None])
        return out

    def counted(self, expert: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        self.counts[expert] += 1
        return part


class CountsExperts(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out, count = torch.zeros_like(x), 0
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero().flatten():
            rank, rows = torch.where(mask[expert])
            count += 1
            out.index_add_(0, rows, x[rows] * weights[rows, rank, None])
        return out / count


class AddsEachExpertsBias(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero().flatten():
            rank, rows = torch.where(mask[expert])
            out.index_add_(0, rows, x[rows] * weights[rows, rank, None])
            out += self.weight[expert, 0]
        return out


class WritesAtRowsOfAnEarlierSelection(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        (first,) = torch.where(x[:, 0] > 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero().flatten():
            rows = torch.where(expert > 9, first, first)
            out.index_add_(0, rows, x[rows])
        return out


class KeepsTheLastRows(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in (mask.sum((-1, -2)) > 0).nonzero().flatten():
            rank, rows = torch.where(mask[expert])
            out.index_add_(0, rows, x[rows] * weights[rows, rank, None])
        return out + expert


class NumbersExpertsThatWereHit(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for number, expert in enumerate((mask.sum((-1, -2)) > 0).nonzero().flatten()):
            rank, rows = torch.where(mask[expert])
            out.index_add_(0, rows, number * x[rows] * weights[rows, rank, None])
        return out


class WritesElsewhereIfHit(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in range(5):
            mask = (index == number).any(dim=-1)
            if mask.any():
                out[mask] += x[mask]
                out *= 2
        return out


class ReadsWhatABranchHasGiven(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in range(5):
            part = x
            if (index == number).sum() > 4:
                part = x * 2
            rows, rank = torch.where(index == number)
            out.index_add_(0, rows, part[rows] * weights[rows, rank, None])
        return out


class CountsExpertsWithRows(Routed):
    def mixed(self, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        mask = one_hot(index, 5).permute(2, 1, 0)
        for expert in range(5):
            rank, rows = torch.where(mask[expert])
            if rows.shape[0] == 0:
                continue
            out += 1
            out.index_add_(0, rows, x[rows] * weights[rows, rank, None])
        return out


@pytest.mark.parametrize(
    "kind",
    [
        CountsExpertsWithRows,
        WritesElsewhereIfHit,
        ReadsWhatABranchHasGiven,
        NumbersExpertsThatWereHit,
        CountsInABuffer,
        CountsExperts,
        AddsEachExpertsBias,
        WritesAtRowsOfAnEarlierSelection,
        KeepsTheLastRows,
    ],
)
def test_loops_that_an_expert_without_rows_would_change_are_refused(
    kind: Callable[[], nn.Module],
) -> None:
    with pytest.raises(CaptureFailed, match=r"test_expert_loops.*What to do"):
        captured(kind)


class MeanOfSelectedRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (rows,) = torch.where(x[:, 0] > 0)
        return x[rows].mean()


def test_sums_over_rows_that_data_selects_stay_refused() -> None:
    with pytest.raises(CaptureFailed, match=r"rows that aten.mean.*aten.where.*use masks"):
        capture(MeanOfSelectedRows(), torch.randn(7, 8))


def test_an_expert_that_has_no_weights_must_not_be_hit() -> None:
    class ChoosesNoExpert(WithAPlaceForNoExpert):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = (x[:, :2] > 0).long() + 4
            return self.mixed(x, self.router(x)[:, :2], index).square().mean()

    dag, model = captured(ChoosesNoExpert)
    with pytest.raises(BatchInvalid, match=r"test_expert_loops.py:\d+: there is no expert 5"):
        check_capture(dag, model, torch.ones(7, 8))
