"""The operator DAG as a value: through JSON, for people, and with the right FLOPs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import ZOO, build, captured

from dagflow.errors import OperatorNotAllowed, ProgramInvalid, ProgramTooNew
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import partition


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm", "two_branches"])
def test_json_there_and_back_changes_nothing(name: str, tmp_path: Path) -> None:
    dag = captured(name)
    dag.save(tmp_path / "dag.json")
    read = OperatorDag.load(tmp_path / "dag.json")
    assert read == dag
    assert str(read) == str(dag)
    assert read.to_json() == dag.to_json()


def test_the_same_model_is_captured_to_the_same_dag() -> None:
    example = build("two_branches", seed=1)
    again = capture(example.model, example.batch(3), loss=example.loss)
    assert again == captured("two_branches")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "dagflow-stage-program"}, ProgramInvalid),
        ({"format_version": 99}, ProgramTooNew),
        ({"symbols": None}, ProgramInvalid),
        ({"parameters": [{}]}, ProgramInvalid),
        ({"inputs": []}, ProgramInvalid),
        ({"nodes": [{"name": "n", "op": "os.system", "args": []}]}, ProgramInvalid),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    body = {**json.loads(captured("two_branches").to_json()), **change}
    with pytest.raises(error):
        OperatorDag.from_json(json.dumps(body))


def test_a_file_with_an_operator_that_is_not_allowed_is_refused() -> None:
    body = json.loads(captured("two_branches").to_json())
    body["nodes"][3]["op"] = "os.system.default"
    with pytest.raises(OperatorNotAllowed, match=r"os\.system"):
        OperatorDag.from_json(json.dumps(body))


def test_a_dag_knows_its_tied_parameters_and_written_buffers() -> None:
    tied = {p.name: p.aliases for p in captured("gpt2").parameters if p.aliases}
    assert tied == {"transformer.wte.weight": ("lm_head.weight",)}
    (embedding,) = (p for p in captured("gpt2").parameters if p.aliases)
    assert embedding.uses == ("p.transformer.wte.weight", "p.transformer.wte.weight#1")
    resnet = captured("resnet")
    assert all(buffer.mutated and buffer.persistent for buffer in resnet.buffers)
    names = [name for name, _ in build("resnet").model.named_buffers()]
    assert sorted(buffer.name for buffer in resnet.buffers) == sorted(names)


def test_rotary_tables_are_computed_without_gradients() -> None:
    rotary = [node for node in captured("llama").nodes if "rotary_emb" in node.module]
    assert {node.op for node in rotary} >= {"aten.cos.default", "aten.sin.default"}
    assert not any(node.grad for node in rotary if node.op in ("aten.cos.default",))


def test_the_table_has_a_line_for_each_module_and_the_sums_at_the_top() -> None:
    dag = captured("two_branches")
    first, sizes, heading, *rows, loss = str(dag).splitlines()
    assert first.startswith(f"OperatorDag: {len(dag.nodes)} operators, 20 parameters (36.")
    assert first.endswith("kFLOP forward")
    assert re.fullmatch(r"sizes: s\d+ = 0.shape\[0\] \(3 in the example\)", sizes)
    assert heading.split() == ["module", "FLOPs", "bytes", "output", "operators"]
    modules = [row.split()[0] for row in rows]
    linears = ["stem", *(f"{side}.{i}" for side in ("left", "right") for i in range(4)), "head"]
    assert [module for module in modules if module in linears] == linears
    stem = next(row for row in rows if row.startswith("stem "))
    assert re.search(r"3.07 k +2.75 kB +float32\[s\d+, 32\] +linear$", stem)
    assert loss == f"loss: {dag.loss}"


def test_the_picture_has_every_operator_and_edge_and_a_colour_for_each_stage() -> None:
    dag = captured("two_branches")
    stages = partition(dag, 2).stage_of_nodes()
    picture = dag.to_graphviz(stages)
    assert picture.startswith("digraph operators {")
    assert picture.endswith("}")
    assert picture.count("{") == picture.count("}")
    drawn = set(re.findall(r'^    "(\w+)" \[label', picture, re.MULTILINE))
    assert drawn == {node.name for node in dag.nodes}
    values = drawn | {spec.name for spec in dag.inputs}
    wanted = {(s, node.name) for node in dag.nodes for s in node.references() if s in values}
    assert set(re.findall(r'^  "([\w.]+)" -> "(\w+)";', picture, re.MULTILINE)) == wanted
    colours = dict(re.findall(r'^    "(\w+)" .*fillcolor="([^"]+)"\];', picture, re.MULTILINE))
    by_stage = {stage: {colours[n] for n in stages if stages[n] == stage} for stage in (0, 1)}
    assert [len(found) for found in by_stage.values()] == [1, 1]
    assert by_stage[0] != by_stage[1]
    assert "white" in dag.to_graphviz()


def flops_by_operator(dag: OperatorDag) -> dict[str, int]:
    """Sum over operators of a kind."""
    found: dict[str, int] = {}
    for node in dag.nodes:
        kind = node.op.removeprefix("aten.").partition(".")[0]
        found[kind] = found.get(kind, 0) + dag.info[node.name].flops
    return found


def mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output * target).mean()


def test_flops_of_a_linear_layer() -> None:
    dag = capture(nn.Linear(16, 32), (torch.randn(3, 5, 16), torch.randn(1)), loss=mean)
    assert flops_by_operator(dag)["linear"] == 2 * 3 * 5 * 16 * 32


def test_flops_of_a_convolution() -> None:
    model = nn.Conv2d(4, 8, kernel_size=3, stride=2, padding=1, groups=2)
    dag = capture(model, (torch.randn(3, 4, 16, 16), torch.randn(1)), loss=mean)
    # Each of the 8 x 8 outputs of 8 channels sees 3 x 3 inputs of the 2 channels of its group.
    assert flops_by_operator(dag)["conv2d"] == 2 * 3 * 8 * 8 * 8 * 3 * 3 * 2


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x)


def test_flops_of_attention() -> None:
    heads = torch.randn(3, 4, 10, 8)
    dag = capture(Attention(), (heads, torch.randn(1)), loss=mean, dynamic={"0": [0, 2], "1": []})
    products = 2 * (2 * 3 * 4 * 10 * 10 * 8)
    assert flops_by_operator(dag)["scaled_dot_product_attention"] == products


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.lstm(x)[0]
        return output


def test_flops_of_an_lstm() -> None:
    dag = capture(Recurrent(), (torch.randn(3, 10, 16), torch.randn(1)), loss=mean)
    per_token = 2 * 4 * 32 * (16 + 32) + 2 * 4 * 32 * (32 + 32)
    assert flops_by_operator(dag)["lstm"] == 3 * 10 * per_token


def test_views_cost_nothing_and_lookups_no_flops() -> None:
    dag = captured("gpt2")
    for node in dag.nodes:
        if node.op in ("aten.view.default", "aten.transpose.int", "getitem"):
            assert (dag.info[node.name].flops, dag.info[node.name].bytes) == (0, 0)
    lookups = [dag.info[n.name] for n in dag.nodes if n.op == "aten.embedding.default"]
    assert [info.flops for info in lookups] == [0, 0]
    assert all(info.bytes > 0 for info in lookups)


def test_a_transformers_flops_are_mostly_its_matrix_products() -> None:
    dag = captured("gpt2")
    tokens, width, layers = 3 * 12, 32, 3
    products = layers * 2 * tokens * 12 * width * width + 2 * tokens * width * 96
    attention = layers * 2 * (2 * 3 * 4 * 12 * 12 * 8)
    assert products + attention <= dag.total_flops <= 1.2 * (products + attention)


def test_every_operator_of_the_models_has_a_source_line() -> None:
    for name in ("two_branches", "lstm"):
        dag = captured(name)
        sources = {dag.info[node.name].source for node in dag.nodes}
        assert all(re.fullmatch(r".+\.py:\d+", source) for source in sources)
    assert set(ZOO) >= {"two_branches", "lstm"}
