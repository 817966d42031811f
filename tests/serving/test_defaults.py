"""A model's generation_config.json ends and chooses answers, and a name stands for all that does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from distributed import Client
from test_tokenizers import _bpe
from transformers import PreTrainedTokenizerFast

import dagflow
from dagflow.errors import SettingsInvalid
from dagflow.models.defaults import read_generation, sampling_defaults, served_defaults
from dagflow.server.bodies import ChatBody, CompletionBody, parse
from dagflow.server.serve import describe
from dagflow.serving.sampling import Sampling
from dagflow_storage import Store

_SAMPLED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "eos_token_id": [7, 9],
    "max_new_tokens": 5,
}


def _save(folder: Path, generation: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=11,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bpe(), eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _load(folder: Path, store: Path) -> dagflow.Model:
    return dagflow.load(folder, store=store)


def test_answers_end_as_the_file_and_the_tokenizer_say(tmp_path: Path) -> None:
    loaded = _load(_save(tmp_path / "it", _SAMPLED), tmp_path / "store")
    own = loaded.tokenizer.eos_token_id
    assert set(loaded.end_tokens) == {7, 9, own}
    (tmp_path / "it" / "generation_config.json").unlink()
    assert set(_load(tmp_path / "it", tmp_path / "store").end_tokens) == {11, own}


def test_requests_are_chosen_as_the_file_says_unless_they_say_otherwise(
    client: Client, tmp_path: Path
) -> None:
    loaded = _load(_save(tmp_path / "it", _SAMPLED), tmp_path / "store")
    with dagflow.Deployment(loaded, client) as deployment:
        request = deployment.request("A machine")
        assert request.sampling == Sampling(1.1, temperature=0.6, top_k=50, top_p=0.9)
        assert (request.max_new_tokens, set(request.ends)) == (5, set(loaded.end_tokens))
        greedy = deployment.request("A machine", temperature=0, max_new_tokens=3)
        assert (greedy.sampling.is_greedy, greedy.max_new_tokens) == (True, 3)
        found = dagflow.generate(deployment, "A machine", num_beams=2)
        assert len(found.tokens[0]) <= 5


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"top_p": 0.8}),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.1},
            {"temperature": 1.0, "top_k": 0, "min_p": 0.1},
        ),
    ],
)
def test_sampling_is_that_of_transformers(said: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sampling_defaults(said) == wanted


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_what_a_request_gives_goes_before_the_models_own(kind: Any) -> None:
    text = (
        {"prompt": "x"}
        if kind is CompletionBody
        else {"messages": [{"role": "user", "content": "x"}]}
    )
    defaults = served_defaults(_SAMPLED)
    [plain] = parse(kind, json.dumps({"model": "m", **text}).encode()).sampling(300, defaults)
    assert (plain["temperature"], plain["top_p"], plain["repetition_penalty"]) == (0.6, 0.9, 1.1)
    body = {"model": "m", **text, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    [said] = parse(kind, json.dumps(body).encode()).sampling(300, defaults)
    assert (said["temperature"], said["top_p"], said["repetition_penalty"]) == (1.0, 1.0, 1.0)
    [other] = parse(kind, json.dumps({"model": "m", **text}).encode()).sampling(300)
    assert (other["temperature"], other["top_k"]) == (1.0, 0)


def test_what_is_not_applied_is_told_and_so_are_defaults(tmp_path: Path) -> None:
    saved = _save(tmp_path / "it", {**_SAMPLED, "num_beams": 4, "no_repeat_ngram_size": 3})
    loaded = _load(saved, tmp_path / "store")
    [note] = loaded.notes
    assert "no_repeat_ngram_size=3, num_beams=4" in note
    told = describe(loaded, served_defaults(loaded.generation))
    assert told[0] == note
    assert "temperature 0.6, top_p 0.9, repetition_penalty 1.1" in told[1]
    assert "compared with transformers on its own weights" in told[2]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(SettingsInvalid, match=r"generation_config.json can't be read"):
        read_generation(None, tmp_path)


def _edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def _edit_positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))


def _remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _edit_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace("</s>", "<g>"))


def _edit_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({**_SAMPLED, "top_p": 0.5}))


def test_a_name_stands_for_all_that_decides_answers(tmp_path: Path) -> None:
    saved, store = _save(tmp_path / "it", _SAMPLED), tmp_path / "store"
    first = _load(saved, store)
    assert _load(saved, store).ref.name == first.ref.name
    models = [first]
    edits = [_edit_config, _edit_positions, _remove_template, _edit_tokenizer, _edit_generation]
    for edit in edits:
        edit(saved)
        models.append(_load(saved, store))
    assert len({model.ref.name for model in models}) == 6
    paths = {tuple(group["path"] for group in m.description["groups"]) for m in models}
    assert len(paths) == 1
    opened = dagflow.Model.open(Store(str(store)), first.ref.name)
    assert opened.config["rms_norm_eps"] == first.config["rms_norm_eps"]
    assert opened.tokenizer.chat_template == "{{ messages[0].content }}"
    assert dagflow.Model.open(Store(str(store)), models[3].ref.name).tokenizer.chat_template is None
    assert opened.sampling_defaults["top_p"] == 0.9


def test_a_model_that_was_stored_by_an_older_dagflow_opens(tmp_path: Path) -> None:
    loaded = _load(_save(tmp_path / "it", _SAMPLED), tmp_path / "store")
    place = tmp_path / "store" / "models" / loaded.ref.name
    old = json.loads((place / "model.json").read_text())
    for name in ("generation", "tokenizer_files", "notes", "check"):
        del old[name]
    (place / "model.json").write_text(json.dumps(old))
    opened = dagflow.Model.open(Store(str(tmp_path / "store")), loaded.ref.name)
    assert opened.sampling_defaults == {}
    assert opened.encode("A machine") == loaded.encode("A machine")
    assert describe(opened, {}) == []
