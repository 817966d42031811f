"""What of a folder is the model, what is missing, and what is told of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import dagflow
from dagflow.errors import SettingsInvalid
from dagflow.models import loading
from dagflow.models.checking import check_capture
from dagflow.models.model import read_weights
from dagflow.models.source import of_folder
from dagflow.models.weight_files import WeightFiles
from dagflow.plan.partition import partition

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_UP = "model.layers.0.mlp.up_proj.weight"
_INDEX = "model.safetensors.index.json"


def _saved(folder: Path, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, **options)).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def _read(folder: Path) -> dict[str, torch.Tensor]:
    source = of_folder(folder, torch.float32)
    return {name: source.read(name) for name in source.model.state_dict()}


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change what a folder's files hold, and put it into one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / _INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _configure(folder: Path, **options: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))


def _loaded_by_transformers(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("stray", ["model.safetensors", "consolidated.safetensors"])
def test_the_index_decides_which_files_count(stray: str, tmp_path: Path) -> None:
    model = _saved(tmp_path / "saved")
    other = _saved(tmp_path / "other", seed=1)
    save_file(other.state_dict(), tmp_path / "saved" / stray, {"format": "pt"})
    assert torch.equal(_read(tmp_path / "saved")[_UP], model.state_dict()[_UP])
    assert torch.equal(
        of_folder(tmp_path / "saved", torch.float32).eager().state_dict()[_UP],
        model.state_dict()[_UP],
    )


def test_without_an_index_the_one_file_of_transformers_counts(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    _edit(tmp_path, lambda _: None)
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(other, tmp_path / "consolidated.safetensors", {"format": "pt"})
    assert torch.equal(_read(tmp_path)[_UP], model.state_dict()[_UP])
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "kept")
    assert torch.equal(_read(tmp_path)[_UP], model.state_dict()[_UP])
    assert torch.equal(
        of_folder(tmp_path, torch.float32).eager().state_dict()[_UP], model.state_dict()[_UP]
    )
    (tmp_path / "kept").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(
        SettingsInvalid, match=r"Both .*consolidated.safetensors and part.safetensors"
    ):
        WeightFiles(tmp_path)


def _without_a_tensor(folder: Path) -> str:
    _edit(folder, lambda tensors: tensors.__delitem__(_UP))
    return _UP


def _without_a_tensor_of_the_index(folder: Path) -> str:
    shard = folder / json.loads((folder / _INDEX).read_text())["weight_map"][_UP]
    tensors = load_file(shard)
    del tensors[_UP]
    save_file(tensors, shard, {"format": "pt"})
    return f"{shard.name} doesn't hold {_UP!r}"


def _truncated(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def _with_a_damaged_header(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 100)
    return shard.name


def _with_a_damaged_index(folder: Path) -> str:
    (folder / _INDEX).write_text('{"weight_map": [1]}')
    return _INDEX


def _without_weights(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return "pytorch_model.bin: load it with transformers"


def _of_another_layout_and_incomplete(folder: Path) -> str:
    """As saved from the model without its head, which transformers would make up."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        del renamed[_HEAD]
        tensors.clear()
        tensors.update(renamed)

    _edit(folder, change)
    return _HEAD


def _without_the_head(folder: Path) -> str:
    _edit(folder, lambda tensors: tensors.__delitem__(_HEAD))
    return _HEAD


def _without_either_of_a_tied_pair(folder: Path) -> str:
    _edit(folder, lambda tensors: (tensors.pop(_HEAD), tensors.pop(_EMBEDDINGS)))
    _configure(folder, tie_word_embeddings=True)
    return _EMBEDDINGS


def _without_a_tensor_in_index_and_shard(folder: Path) -> str:
    index = json.loads((folder / _INDEX).read_text())
    shard = folder / index["weight_map"].pop(_UP)
    tensors = load_file(shard)
    del tensors[_UP]
    save_file(tensors, shard, {"format": "pt"})
    (folder / _INDEX).write_text(json.dumps(index))
    return _UP


def _saved_again_beside_an_older_index(folder: Path) -> str:
    hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)).save_pretrained(folder)
    return f"if that is the model, remove {_INDEX}"


def _of_no_language_model(folder: Path) -> str:
    _configure(folder, model_type="vit")
    return "no causal language model"


@pytest.mark.parametrize(
    "damage",
    [
        _without_a_tensor,
        _without_a_tensor_of_the_index,
        _truncated,
        _with_a_damaged_header,
        _with_a_damaged_index,
        _without_weights,
        _of_another_layout_and_incomplete,
        _without_the_head,
        _saved_again_beside_an_older_index,
        _without_either_of_a_tied_pair,
        _without_a_tensor_in_index_and_shard,
        _of_no_language_model,
    ],
)
def test_nothing_that_is_missing_is_made_up(damage: Callable[[Path], str], tmp_path: Path) -> None:
    _saved(tmp_path / "saved")
    words = damage(tmp_path / "saved")
    with pytest.raises(SettingsInvalid) as caught:
        dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    assert words in str(caught.value)
    assert not list((tmp_path / "store").glob("models/*/model.json"))


def test_a_module_without_weights_is_refused(tmp_path: Path) -> None:
    with dagflow.empty_weights():
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES))
    with pytest.raises(SettingsInvalid, match=f"{_EMBEDDINGS}.*load the folder"):
        dagflow.load(model, store=tmp_path)


def test_tensors_that_the_model_has_no_place_for_are_told(tmp_path: Path) -> None:
    _saved(tmp_path)
    _edit(tmp_path, lambda tensors: tensors.update({"model.mtp.weight": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"no place for.*'model.mtp.weight'"):
        source = of_folder(tmp_path, torch.float32)
    assert len(source.notes) == 1


def test_tensors_that_every_llama_had_once_are_not_told(tmp_path: Path) -> None:
    _saved(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit(tmp_path, lambda tensors: tensors.update({old: torch.zeros(4)}))
    assert of_folder(tmp_path, torch.float32).notes == ()


def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = _saved(tmp_path, tie_word_embeddings=False)
    _configure(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=f"ties {_HEAD} to {_EMBEDDINGS}.*different values"):
        found = _read(tmp_path)
    assert torch.equal(found[_HEAD], model.state_dict()[_HEAD])
    assert torch.equal(found[_EMBEDDINGS], model.state_dict()[_EMBEDDINGS])
    theirs = _loaded_by_transformers(tmp_path).state_dict()
    assert torch.equal(found[_HEAD], theirs[_HEAD])


def test_an_equal_head_is_tied_as_the_configuration_says(tmp_path: Path) -> None:
    _saved(tmp_path, tie_word_embeddings=True)
    _edit(tmp_path, lambda tensors: tensors.update({_HEAD: tensors[_EMBEDDINGS].clone()}))
    source = of_folder(tmp_path, torch.float32)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert source.notes == ()
    _configure(tmp_path, tie_word_embeddings=False)
    source = of_folder(tmp_path, torch.float32)
    assert source.model.lm_head.weight is not source.model.model.embed_tokens.weight
    assert "are equal, and config.json doesn't tie them" in source.notes[0]


def test_a_tied_tensor_may_be_there_under_its_other_name(tmp_path: Path) -> None:
    model = _saved(tmp_path, tie_word_embeddings=True)
    _edit(tmp_path, lambda tensors: tensors.update({_HEAD: tensors.pop(_EMBEDDINGS)}))
    assert torch.equal(_read(tmp_path)[_EMBEDDINGS], model.state_dict()[_EMBEDDINGS])


def test_an_untied_head_is_stored_and_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_capture", check_capture)
    model = _saved(tmp_path / "saved", tie_word_embeddings=False)
    _configure(tmp_path / "saved", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="different values"):
        loaded = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    [program] = partition(loaded.dag, 1)
    found = read_weights(loaded.ref, program, torch.device("cpu"))
    assert torch.equal(found[_HEAD], model.state_dict()[_HEAD])
    assert "different values" in loaded.notes[0]


@pytest.mark.parametrize("weights", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_files_in_half_precision_are_compared_in_whatever_they_are_loaded(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_capture", check_capture)
    _saved(tmp_path / "float32").bfloat16().save_pretrained(tmp_path / "saved")
    for source in (tmp_path / "saved", _loaded_by_transformers(tmp_path / "saved").bfloat16()):
        loaded = dagflow.load(source, store=tmp_path / "store", weights=weights)
        assert loaded.description["check"]["largest_difference"] < 1e-5


def test_buffers_that_were_trained_come_from_the_files(tmp_path: Path) -> None:
    config = hf.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = hf.DeepseekV3ForCausalLM(config)
    name = next(n for n, _ in model.named_buffers() if n.endswith("e_score_correction_bias"))
    torch.nn.init.normal_(model.get_buffer(name))
    model.save_pretrained(tmp_path)
    assert torch.equal(of_folder(tmp_path, torch.float32).read(name), model.get_buffer(name))


def test_weights_in_another_layout_are_converted_by_transformers(tmp_path: Path) -> None:
    """As saved from the model without its head, with tied embeddings."""
    model = _saved(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    _edit(tmp_path, change)
    found = _read(tmp_path)
    assert [n for n, t in model.state_dict().items() if not torch.equal(found[n], t)] == []


def test_quantised_files_are_refused_by_name(tmp_path: Path) -> None:
    _saved(tmp_path)
    _edit(tmp_path, lambda t: t.update({_UP: t[_UP].to(torch.float8_e4m3fn)}))
    _configure(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    with pytest.raises(SettingsInvalid, match=str(tmp_path)):
        of_folder(tmp_path, torch.float32)
