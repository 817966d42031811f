"""Weights in 8 and 4 bits: operators, what is stored, and what the models answer."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import zoo
from torch.nn import functional

import dagflow
from dagflow.errors import SettingsInvalid
from dagflow.graph.decoder import POSITIONS, ROWS, TOKENS
from dagflow.models.model import Model, read_stage, read_weights
from dagflow.plan.partition import partition
from dagflow_tasks.decode.decoder_stage import ALL, DecoderStage, Part
from dagflow_tasks.kernels.quantised import (
    dequantise_int4,
    linear_int4,
    linear_int8,
    quantise_int4,
    quantise_int8,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 40)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (32, 5), (24, 7)])
def test_linear_int8_is_linear_of_the_dequantised_weight(
    dtype: torch.dtype, shape: tuple[int, int], inputs: int, outputs: int
) -> None:
    values, scale = quantise_int8(torch.randn(outputs, inputs), dtype)
    x, bias = torch.randn(*shape, inputs).to(dtype), torch.randn(outputs).to(dtype)
    expected = functional.linear(x.double(), values.double() * scale.double()[:, None])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2 * float(expected.abs().max())
    for given in (None, bias):
        whole = expected if given is None else expected + given.double()
        found = linear_int8(x, values, scale, given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), whole, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_linear_int4_is_linear_of_the_dequantised_weight(dtype: torch.dtype, rows: int) -> None:
    packed, scale = quantise_int4(torch.randn(48, 96), dtype)
    x, bias = torch.randn(1, rows, 96).to(dtype), torch.randn(48).to(dtype)
    expected = functional.linear(x, dequantise_int4(packed, scale), bias)
    torch.testing.assert_close(linear_int4(x, packed, scale, bias), expected)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(48, 64)
    weight[3] = 0.0
    values, scale = quantise_int8(weight, torch.float32)
    assert values.dtype == torch.int8
    assert values.abs().max() == 127
    error = (values * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert not values[3].any()


def test_int4_takes_half_a_byte_and_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(48, 96)
    packed, scale = quantise_int4(weight, torch.float32)
    assert (packed.shape, scale.shape) == ((48, 48), (48, 3))
    error = (dequantise_int4(packed, scale) - weight).abs().unflatten(1, (-1, 32))
    assert (error <= 0.5001 * scale[:, :, None]).all()


def test_int4_keeps_what_fits_exactly() -> None:
    weight = torch.randint(-7, 8, (16, 64)).float()
    weight[:, ::32] = 7.0
    packed, scale = quantise_int4(weight)
    assert torch.equal(dequantise_int4(packed, scale).float(), weight)


def _logits(model: Model, tokens: list[int]) -> torch.Tensor:
    stage = _stage(model)
    part = Part("s", 0, 0, len(tokens), 0, ALL)
    _, found = stage.run([part], {f"in.{TOKENS}": torch.tensor(tokens)})
    return found["logits"]


def _stage(model: Model) -> DecoderStage:
    program = partition(model.dag, 1)[0]
    return read_stage(model.ref, program, CPU)


def _worker_bytes(model: Model) -> int:
    program = partition(model.dag, 1)[0]
    return sum(tensor.nbytes for tensor in read_weights(model.ref, program, CPU).values())


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("weights/**/*") if file.is_file())


_TOLERANCES = {"int8": 0.04, "int4": 0.3}
_DAILY = {("llama", "int8"), ("llama", "int4"), ("gemma3", "int8"), ("mixtral", "int4")}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        pytest.param(*pair, marks=[] if pair in _DAILY else pytest.mark.slow)
        for pair in product(("llama", "gemma3", "opt", "bloom", "mixtral"), _TOLERANCES)
    ],
)
def test_logits_are_close_to_those_in_full_precision(
    name: str, weights: str, tmp_path: Path
) -> None:
    eager = zoo.build(name, num_layers=4).model.eval()
    tokens = list(range(3, 40))
    with torch.no_grad():
        expected = eager(input_ids=torch.tensor([tokens])).logits[0]
    model = dagflow.load(eager, store=tmp_path, weights=weights)
    ops = {node.op for node in model.dag.nodes}
    assert f"dagflow.linear_{weights}.default" in ops
    found = _logits(model, tokens)
    assert (found - expected).norm() < _TOLERANCES[weights] * expected.norm()


def test_store_and_worker_hold_fewer_bytes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**zoo.SIZES, "hidden_size": 128, "intermediate_size": 512})
    eager = LlamaForCausalLM(config)
    stored, held = {}, {}
    for weights in ("fp32", "bf16", "int8", "int4"):
        model = dagflow.load(eager, store=tmp_path / weights, weights=weights)
        stored[weights], held[weights] = _stored_bytes(tmp_path / weights), _worker_bytes(model)
    assert held["int4"] < 0.65 * held["int8"] < 0.4 * held["bf16"] < 0.21 * held["fp32"]
    assert stored["int4"] < stored["int8"] < stored["bf16"] < stored["fp32"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_second_import_writes_no_weights(weights: str, tmp_path: Path) -> None:
    eager = zoo.build("llama").model
    first = dagflow.load(eager, store=tmp_path, weights=weights)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("weights/**/*")}
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    second = dagflow.load(eager, store=tmp_path, weights=weights)
    assert second.ref.name == first.ref.name
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("weights/**/*")}
    assert files == {file for file in tmp_path.rglob("*") if file.is_file()}


def test_embeddings_norms_and_head_keep_their_precision(tmp_path: Path) -> None:
    model = dagflow.load(zoo.build("llama").model, store=tmp_path, weights="int8")
    kept = {p.name: p.dtype for p in model.dag.parameters if not p.name.endswith(".scale")}
    assert kept["model.embed_tokens.weight"] == kept["lm_head.weight"] == "bfloat16"
    assert kept["model.layers.0.input_layernorm.weight"] == "bfloat16"
    assert kept["model.layers.0.mlp.down_proj.weight"] == "int8"


def test_model_with_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="no linear layers"):
        dagflow.load(zoo.build("gpt2").model, store=tmp_path, weights="int8")
    with pytest.raises(SettingsInvalid, match="fp32, bf16, int8, int4"):
        dagflow.load(zoo.build("gpt2").model, store=tmp_path, weights="int2")


def test_without_head_needs_no_weights_of_the_head(tmp_path: Path) -> None:
    model = dagflow.load(zoo.build("llama").model, store=tmp_path, weights="int8").without_head()
    names = {parameter.name for parameter in model.dag.parameters}
    assert "lm_head.weight" not in names
    assert "model.norm.weight" in names
    assert {spec.name for spec in model.dag.inputs} == {
        f"in.{name}" for name in (TOKENS, POSITIONS, ROWS)
    }
