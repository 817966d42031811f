"""Layers of experts that loop over those that were hit are captured as products of groups."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from dagflow.check.micro_batch import check_capture
from dagflow.graph.capture import capture


@use_experts_implementation
class Experts(nn.Module):
    """As transformers' families have them."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 3, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.down_proj = nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        found = torch.zeros_like(hidden_states)
        mask = nn.functional.one_hot(index, self.num_experts).permute(2, 1, 0)
        for (expert,) in mask.sum((-1, -2)).nonzero():
            rank, token = torch.where(mask[expert])
            linear = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = linear.chunk(2, -1)
            part = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            found.index_add_(0, token, part * weights[token, rank, None])
        return found


class Routed(nn.Module):
    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = Experts(SimpleNamespace(_experts_implementation=implementation))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        return self.experts(x, index, weights).float().square().mean()


def test_a_loop_over_experts_is_captured_as_products_of_groups() -> None:
    model, x = Routed("eager"), torch.randn(6, 16)
    dag = capture(model, x)
    dag, report = check_capture(dag, model, x)
    assert report.num_gradients == 4
    assert not report.skipped
    assert not report.fixed
    others = capture(Routed("grouped_mm"), x)
    assert [node.op for node in dag.nodes] == [node.op for node in others.nodes]


def test_in_half_precision_a_loop_over_experts_is_captured_as_a_loop_over_all() -> None:
    model, x = Routed("eager").bfloat16(), torch.randn(6, 16).bfloat16()
    dag, report = check_capture(capture(model, x), model, x)
    assert report.exact
    assert sum(node.op == "aten.index_add_.default" for node in dag.nodes) == 3
