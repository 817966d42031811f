"""A model's tokenizer is that of its folder, in whatever files it is kept."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dagflow.errors import SettingsInvalid
from dagflow.models import tokenizing
from dagflow.models.tokenizing import encode_text, open_tokenizer, tokenizer_files
from dagflow.server.encoding import encode

_TEXTS = ["Stages run on volunteers' machines.", "A machine that leaves is replaced."] * 20


def _bpe() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<g>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    return bpe


def _vocabulary_and_merges(folder: Path) -> None:
    _bpe().model.save(str(folder))
    _configure(folder, model_type="gpt2")


def _sentencepiece(
    name: str, model_type: str = "llama", **tokenizer: str
) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        trained = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXTS),
            model_writer=trained,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / name).write_bytes(trained.getvalue())
        _configure(folder, model_type=model_type)
        if tokenizer:
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    return save


def _tekken(folder: Path) -> None:
    def entry(rank: int, data: bytes) -> dict[str, Any]:
        return {"rank": rank, "token_bytes": base64.b64encode(data).decode(), "token_str": None}

    vocabulary = [entry(i, bytes([i])) for i in range(256)] + [entry(256, b"th")]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pattern = r"[^\r\n\p{L}\p{N}]?[\p{L}]+|\p{N}|\s+"
    config = {
        "pattern": pattern,
        "num_vocab_tokens": 257,
        "default_vocab_size": 262,
        "default_num_special_tokens": 5,
        "version": "v3",
    }
    specials = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(special)]
    found = {"config": config, "vocab": vocabulary, "special_tokens": specials}
    (folder / "tekken.json").write_text(json.dumps(found))
    _configure(folder, model_type="mistral")


def _fast(folder: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=_bpe(), eos_token="</s>").save_pretrained(folder)


def _configure(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def _opened(folder: Path) -> Any:
    files = tokenizer_files(folder)
    return open_tokenizer("it", {name: file.read_bytes() for name, file in files.items()})


@pytest.mark.parametrize(
    "save",
    [
        _vocabulary_and_merges,
        _sentencepiece("spiece.model", "xlnet"),
        _sentencepiece("sentencepiece.bpe.model", tokenizer_class="XLMRobertaTokenizer"),
        _sentencepiece("tokenizer.model", "gemma"),
        _tekken,
        _fast,
    ],
    ids=["merges", "spiece", "sentencepiece", "tokenizer.model", "tekken", "fast"],
)
def test_a_tokenizer_in_any_files_is_that_of_the_folder(
    save: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path)
    (tmp_path / "README.md").write_text("of no use")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not {"README.md", "model.safetensors"} & tokenizer_files(tmp_path).keys()
    found, wanted = _opened(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(wanted)
    text = "A machine that runs."
    assert found(text)["input_ids"] == wanted(text)["input_ids"]
    assert len(set(found(text)["input_ids"])) > 4


def test_templates_come_along(tmp_path: Path) -> None:
    _fast(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    found = _opened(tmp_path).chat_template
    assert found == {"default": "plain", "tools": "with tools"}


def test_a_configuration_alone_is_no_tokenizer(tmp_path: Path) -> None:
    _configure(tmp_path, model_type="llama")
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    assert tokenizer_files(tmp_path) == {}


def test_a_tokenizer_of_which_transformers_makes_nothing_is_refused(tmp_path: Path) -> None:
    # XGLM's class reads no SentencePiece model, and is as empty as if there were none.
    _sentencepiece("sentencepiece.bpe.model", "xglm")(tmp_path)
    with pytest.raises(SettingsInvalid, match=r"it has no vocabulary.*sentencepiece.bpe.model"):
        _opened(tmp_path)


def test_packages_that_lack_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _configure(tmp_path, model_type="llama")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff no model")
    monkeypatch.setattr(tokenizing, "find_spec", lambda _: None)
    with pytest.raises(
        SettingsInvalid, match=r"can't be opened.*pip install protobuf sentencepiece tiktoken"
    ):
        _opened(tmp_path)


def _beginning_with(*tokens: str) -> Any:
    bpe = _bpe()
    template = [*tokens, "$A"]
    special = [(token, bpe.token_to_id(token)) for token in tokens]
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", extra_special_tokens=["<g>"]
    )


@pytest.mark.parametrize("beginning", [("<s>",), ("<g>", "<s>")])
def test_a_text_that_begins_as_the_tokenizer_would_has_one_beginning(
    beginning: tuple[str, ...],
) -> None:
    tokenizer = _beginning_with(*beginning)
    wanted = tokenizer("A machine")["input_ids"]
    assert len(wanted) > len(beginning)
    rendered = "".join(beginning) + "A machine"
    assert encode_text(tokenizer, rendered) == wanted
    assert encode_text(tokenizer, "A machine") == wanted
    assert encode(tokenizer, rendered, 1000) == wanted
    assert encode(tokenizer, rendered, 1000, add_special_tokens=False) == wanted


def test_another_special_token_is_no_beginning() -> None:
    tokenizer = _beginning_with("<s>")
    found = encode_text(tokenizer, "<g>A<s>")
    assert tokenizer.convert_ids_to_tokens(found) == ["<s>", "<g>", "A", "<s>"]
    assert encode_text(_beginning_with(), "<s>A") == _beginning_with()("<s>A")["input_ids"]
