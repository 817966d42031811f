"""Models are brought into a store once, from folders and modules, and opened by anybody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from chaos import warm
from families import language_model, logits_of
from safetensors.torch import load_file, save_file

import dagflow
from dagflow.errors import DagflowError, NotFound, SettingsInvalid
from dagflow.models.model import read_stage, read_weights
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow_storage import Store
from dagflow_tasks.decode.decoder_stage import ALL, TOKENS, Part
from dagflow_tasks.kernels.onednn import LINEAR_PACKED

CPU = torch.device("cpu")


def _saved(family: str, folder: Path, seed: int = 0) -> Any:
    """Save a model in several shards, as transformers does."""
    model = language_model(family, seed)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def _weights(model: dagflow.Model) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for program in cut_at_layers(model.dag, 2):
        found |= read_weights(model.ref, program, CPU)
    return found


def _objects(store: Path) -> set[str]:
    return {str(p.relative_to(store)) for p in (store / "weights").rglob("*") if p.is_file()}


def _assert_holds(model: dagflow.Model, wanted: Any) -> None:
    expected = wanted.state_dict()
    found = _weights(model)
    assert [n for n, t in found.items() if n in expected and not torch.equal(t, expected[n])] == []
    assert {n for n, _ in wanted.named_parameters()} <= found.keys()


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_saved_folder_and_the_module_are_the_same_model(family: str, tmp_path: Path) -> None:
    model = _saved(family, tmp_path / "saved")
    loaded = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    _assert_holds(loaded, model)
    before = _objects(tmp_path / "store")
    again = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    assert again.ref.name == loaded.ref.name
    dagflow.load(model, store=tmp_path / "store")
    assert _objects(tmp_path / "store") == before


def test_a_fine_tune_shares_what_it_has_not_changed(tmp_path: Path) -> None:
    model = language_model("llama")
    base = dagflow.load(model, store=tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1.0)
    tuned = dagflow.load(model, store=tmp_path)
    paths, others = ([g["path"] for g in m.description["groups"]] for m in (base, tuned))
    assert len(set(others) - set(paths)) == 1
    _assert_holds(tuned, model)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = language_model("gpt2")
    model.save_pretrained(tmp_path / "saved")
    loaded = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    names = [a["name"] for g in loaded.description["groups"] for a in g["arrays"]]
    assert len([n for n in names if "wte" in n or "lm_head" in n]) == 1


def test_half_precision_is_that_of_weights_and_model(tmp_path: Path) -> None:
    model = language_model("llama")
    loaded = dagflow.load(model, store=tmp_path, weights="bf16")
    found = _weights(loaded)["model.layers.0.mlp.up_proj.weight"]
    wanted = model.model.layers[0].mlp.up_proj.weight
    assert wanted.dtype == torch.float32
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_the_module_itself_stays_as_it_is(weights: str, tmp_path: Path) -> None:
    model = language_model("llama").train()
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in _all_tensors(model).items()}
    dagflow.load(model, store=tmp_path, weights=weights)
    assert model.training
    assert all(found is parameters[name] for name, found in model.named_parameters())
    after = _all_tensors(model)
    assert [name for name in before if not _same(before[name], after[name])] == []


@pytest.mark.parametrize(
    ("family", "weights"),
    [pytest.param("llama", "int8", marks=pytest.mark.slow), ("opt", "int4")],
)
def test_a_module_and_its_folder_are_converted_to_the_same_weights(
    family: str, weights: str, tmp_path: Path
) -> None:
    model = _saved(family, tmp_path / "saved")
    loaded = dagflow.load(model, store=tmp_path / "store", weights=weights)
    other = dagflow.load(tmp_path / "saved", store=tmp_path / "store", weights=weights)
    found, wanted = _weights(loaded), _weights(other)
    assert found.keys() == wanted.keys()
    assert [name for name in found if not _same(found[name], wanted[name])] == []


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_folder_computes_what_the_module_does(family: str, tmp_path: Path) -> None:
    model = _saved(family, tmp_path / "saved")
    loaded = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    [program] = cut_at_layers(loaded.dag, 1)
    stage = read_stage(loaded.ref, program, CPU)
    tokens = list(range(3, 40))
    part = Part("s", 0, 0, len(tokens), 0, ALL)
    _, found = stage.run([part], {TOKENS: torch.tensor(tokens)})
    torch.testing.assert_close(found["logits"], logits_of(model, tokens), atol=1e-4, rtol=1e-4)


def test_rotary_frequencies_keep_their_precision(tmp_path: Path) -> None:
    model = language_model("llama")
    name = "model.rotary_emb.inv_freq"
    found = _weights(dagflow.load(model, store=tmp_path, weights="bf16"))[name]
    assert _same(found, model.get_buffer(name))


def _all_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _say_what_is_there(store: str, name: str) -> None:
    model = dagflow.Model.open(Store(store), name)
    print(len(model.dag.nodes), model.max_tokens)


def test_another_process_opens_it(tmp_path: Path) -> None:
    loaded = dagflow.load(language_model("llama"), store=tmp_path)
    log = tmp_path / "said"
    warm.start(_say_what_is_there, log, str(tmp_path), loaded.ref.name).join()
    assert log.read_text().split() == [str(len(loaded.dag.nodes)), "64"]
    with pytest.raises(NotFound):
        dagflow.Model.open(Store(str(tmp_path)), "another")


def _without_shard(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return shard.name


def _without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _with_damaged_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return "config.json"


def _with_wrong_shape(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / index[name])
    tensors[name] = tensors[name][:5].clone()
    save_file(tensors, folder / index[name], {"format": "pt"})
    return name


@pytest.mark.parametrize(
    "damage", [_without_shard, _without_config, _with_damaged_config, _with_wrong_shape]
)
def test_what_a_folder_lacks_is_named_and_no_model_is_left(
    damage: Callable[[Path], str], tmp_path: Path
) -> None:
    _saved("llama", tmp_path / "saved")
    words = damage(tmp_path / "saved")
    with pytest.raises(SettingsInvalid) as caught:
        dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    assert words in str(caught.value)
    assert not list((tmp_path / "store").glob("models/*/model.json"))


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    loaded = dagflow.load(language_model("llama"), store=tmp_path)
    assert not loaded.has_tokenizer
    with pytest.raises(DagflowError, match="no tokenizer"):
        _ = loaded.tokenizer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_model_with_packed_weights_computes_what_the_module_does(
    weights: str, tied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = hf.LlamaForCausalLM(config).eval()
    loaded = dagflow.load(model, store=tmp_path, weights=weights)
    [program] = cut_at_layers(loaded.dag, 1)
    stage = read_stage(loaded.ref, program, CPU)
    if weights == "fp32" and torch.backends.mkldnn.is_available():
        assert LINEAR_PACKED in {node.op for node in stage.program.nodes}
    tokens = list(range(3, 40))
    found = []
    for begin, end in [(0, 30), *((i, i + 1) for i in range(30, 37))]:
        part = Part("s", 0, begin, end - begin, begin, ALL)
        found.append(stage.run([part], {TOKENS: torch.tensor(tokens[begin:end])})[1]["logits"])
    plain = sum(t.nbytes for t in read_weights(loaded.ref, program, CPU).values())
    assert stage.num_weight_bytes == plain
    wanted = logits_of(model, tokens)
    atol = 1e-4 if weights == "fp32" else 0.05 * float(wanted.std())
    torch.testing.assert_close(torch.cat(found), wanted, atol=atol, rtol=atol)
