"""A spread of the zoo: idioms and families that dagflow trains right or refuses, and how it is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .case import EITHER, IDIOMS, REFUSED, RIGHT, WARNED, Case, Subject
from .differences import differing, worst
from .groups import cases_of
from .judge import judge
from .markdown import BEGIN, END, write_markdown
from .pool import try_all
from .record import Record
from .shrink import shrunk
from .table import causes

ALLOWED = {
    RIGHT: {"right"},
    REFUSED: {"refused"},
    EITHER: {"right", "refused"},
    WARNED: {"right", "refused", "warned"},
}
SPREAD = [
    "BufferWrittenInPlace",
    "BufferIndexPut",
    "InputWrittenInPlace",
    "view_of_hidden_written_in_place",
    "EmbeddingWithPadding",
    "CheckpointWithoutReentrance",
    "CheckpointOfDropout",
    "function_straight_through",
    "straight_through_by_detach",
    "NoGradWithGradInside",
    "HookOnForwardChangesTheOutput",
    "TiedTransposed",
    "DoublePrecision",
    "Bfloat16Model",
    "BytesAsInputs",
    "Dropout",
    "gumbel_softmax",
    "stochastic_depth",
    "floor_of_half",
    "mean_by_hand",
    "causal_mask_by_triu",
    "RelativePositions",
    "branch_on_a_value",
    "MaskFromLengths",
    "NestedBatch",
    "BatchNormOfImages",
    "TransformerEncoder",
    "OrthogonalWeight",
    "NonContiguousParameter",
    "ChannelsLastConvolution",
    "Attention",
    "EmbeddingBag",
    "einsum_of_three",
    "scatter_add",
    "top_two_of_all",
    "sampled_on_a_grid",
    "attention_of_grouped_queries",
    "sparse_product",
    "CrossEntropyModule",
    "FocalLoss",
    "ModelReturnsAnObject",
    "TwoHeadsAndLosses",
]


def judged(case: Case) -> dict[str, Any]:
    record = Record(case.group, case.name, lambda columns: None)
    judge(case, record)
    return dict(record)


def family(group: str, name: str) -> Case:
    (found,) = [case for case in cases_of(group) if case.name == name]
    return found


def idioms() -> dict[str, Case]:
    return {case.name: case for case in cases_of(IDIOMS)}


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.filterwarnings("ignore")
def test_idiom_is_what_it_is_expected_to_be(name: str) -> None:
    case = idioms()[name]
    record = judged(case)
    assert record["training"] in ALLOWED[case.expected], record


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(idioms()) - set(SPREAD)))
def test_every_idiom_is_what_it_is_expected_to_be(name: str) -> None:
    case = idioms()[name]
    record = judged(case)
    assert record["training"] in ALLOWED[case.expected], record


@pytest.mark.filterwarnings("ignore")
def test_family_trains_and_is_served_right() -> None:
    record = judged(family("causal", "gemma3_text"))
    assert (record["training"], record["serving"]) == ("right", "right"), record
    assert (record["cut"], record["second_shape"]) == ("bits", "yes")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["mixtral", "gpt_oss", "llama4_text", "mamba", "qwen3_next", "mpt"]
)
def test_more_families_train_and_are_served_right(name: str) -> None:
    record = judged(family("causal", name))
    assert (record["training"], record["serving"]) == ("right", "right"), record


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["bert", "t5", "swin", "convnext", "segformer", "wav2vec2", "clip", "glm4v", "detr"]
)
def test_families_of_other_kinds_train_right(name: str) -> None:
    record = judged(family("others", name))
    assert (record["training"], record["cut"]) == ("right", "bits"), record


@pytest.mark.filterwarnings("ignore")
def test_halves_of_a_batch_add_up_to_it_or_splitting_is_refused() -> None:
    found = {name: judged(idioms()[name]) for name in ("CrossEntropySummed", "ContrastiveLoss")}
    assert [record["microbatches"] for record in found.values()] == ["right", "refused"]
    assert "add up to" in found["ContrastiveLoss"]["microbatches_cause"]


class _Wrong(torch.nn.Module):
    """Counts its calls where no graph can see it."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        found: torch.Tensor = self.layer(x).square().mean() * self.calls
        return found


def _case(make: Any) -> Case:
    return Case("test", "case", make, ((3,), (5,)))


def test_wrong_model_is_found_and_said_by_how_much() -> None:
    record = judged(_case(lambda: Subject(_Wrong(), lambda rows: (torch.randn(rows, 4),))))
    assert record["training"] in ("wrong", "refused")
    assert record["captured"] is False or record["difference"] > 0.1


def test_model_that_does_not_build_is_no_verdict_on_dagflow() -> None:
    def make() -> Subject:
        raise ValueError("no such size")

    assert judged(_case(make)) | {"built": False} == {
        "group": "test",
        "name": "case",
        "built": False,
        "training": "not run",
        "cause": "build: ValueError: no such size",
    }


def test_model_that_takes_too_long_is_stopped_and_the_next_one_tried() -> None:
    def work(case: Case, record: Record) -> None:
        record.note(built=True)
        while case.name == "slow":
            pass

    cases = [Case("test", name, lambda: None) for name in ("slow", "quick")]  # type: ignore[arg-type, return-value]
    slow, quick = try_all(cases, work, jobs=1, seconds=1)
    assert slow["stopped"].startswith("took too long")
    assert (slow["built"], quick["built"]) == (True, True)
    assert "stopped" not in quick


def test_difference_is_a_share_of_the_norm_and_nan_equals_nan() -> None:
    a = {"x": torch.tensor([1.0, float("nan")]), "y": torch.ones(2)}
    assert differing(a, {name: tensor.clone() for name, tensor in a.items()}) == []
    assert worst({"y": torch.ones(2)}, {"y": torch.full((2,), 1.25)}) == ("y", pytest.approx(0.2))
    assert worst({}, {"y": torch.ones(2)}) == ("y", 1.0)
    assert differing({"y": torch.ones(2)}, {}) == ["y"]


def test_tiny_configuration_keeps_a_layer_of_each_kind() -> None:
    from transformers import CONFIG_MAPPING

    config = shrunk(CONFIG_MAPPING["qwen3_next"])
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.num_experts) == (2, 32, 4)
    assert shrunk(CONFIG_MAPPING["gpt_oss"]).sliding_window == 8


def test_table_goes_between_the_markers_and_names_causes(tmp_path: Any) -> None:
    file = tmp_path / "models.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    records = [
        {"group": "causal", "name": "a", "eager": True, "training": "right", "uncut": "bits"},
        {"group": "causal", "name": "b", "training": "refused", "cause": "no such operator"},
    ]
    write_markdown(file, records)
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| Causal language models of transformers | 1 | 0 | 1 | 1 | 0 | 1 | 0 | 0 |" in text
    assert "Trained right: `a`.\n\n- `b`, refused: no such operator" in text
    assert causes(records) == "- training, refused: no such operator\n  1: causal/b"
