"""Code that comes with a model is never run, nor is anybody asked whether it should be.

On the commit before this test, `dagflow train --model` asked on the terminal and ran the code if the answer
was yes, and unpickled pytorch_model.bin; a store's model could name files of its tokenizer that lead
anywhere on the machine.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from local_attacks import Bomb
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import dagflow
from dagflow.demo.language import _network, _write_tokens
from dagflow.errors import SettingsInvalid
from dagflow.models.tokenizing import open_tokenizer, tokenizer_files
from dagflow.server.conversation import to_prompt

ROOT = Path(dagflow.__file__).parents[1]
SIZES = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
CODE = """
import os
os.mkdir({ran!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "foreign"

class Model(LlamaForCausalLM):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass

def generate(model, *args, **kwargs):
    return None
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What the foreign code makes when it is run."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with a tokenizer, and code of its own beside it; nobody is there to be asked."""

    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    place = tmp_path / "model"
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(place)
    words = Tokenizer(WordLevel({"so": 0, "far": 1, "?": 2}, unk_token="?"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(place)
    (place / "foreign.py").write_text(CODE.format(ran=str(ran)))
    (place / "custom_generate").mkdir()
    (place / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(ran)))
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    configure(place, auto_map=auto_map)
    configure(place, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "foreign.Words"]})
    return place


def configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def loaded(folder: Path) -> None:
    dagflow.load(folder, store=folder.parent / "models", check=False)


def trained(folder: Path) -> None:
    _network(str(folder), 1, 16, 8, 0)


def tokenized(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("so far")
    _write_tokens(str(folder.parent / "tokens"), [text], str(folder))


USES = [loaded, trained, tokenized]


def test_the_code_would_run_if_it_were_trusted(folder: Path, ran: Path) -> None:
    hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize("use", USES)
def test_a_known_architecture_is_loaded_without_the_folders_code(
    folder: Path, ran: Path, use: Callable[[Path], None]
) -> None:
    use(folder)
    assert not ran.exists()


@pytest.mark.parametrize("use", USES[:2])
def test_an_architecture_that_only_the_code_knows_is_refused(
    folder: Path, ran: Path, use: Callable[[Path], None]
) -> None:
    configure(folder, model_type="foreign")
    with pytest.raises(SettingsInvalid, match=r"foreign\.Config.*no code that comes with a model"):
        use(folder)
    assert not ran.exists()


def test_a_tokenizer_that_only_the_code_knows_is_refused(folder: Path, ran: Path) -> None:
    configure(folder, "tokenizer_config.json", tokenizer_class="Words")
    contents = {name: file.read_bytes() for name, file in tokenizer_files(folder).items()}
    for use in (lambda: open_tokenizer("model", contents), lambda: tokenized(folder)):
        with pytest.raises(SettingsInvalid, match="no code that comes with a model"):
            use()
    assert not ran.exists()


@pytest.mark.parametrize("use", USES[:2])
def test_pickled_weights_are_refused(folder: Path, ran: Path, use: Callable[[Path], None]) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(SettingsInvalid):
        use(folder)
    assert not ran.exists()


@pytest.mark.parametrize("where", [(), ("text_config",)])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_that_asks_for_kernels_from_elsewhere_is_refused(
    folder: Path, name: str, where: tuple[str, ...]
) -> None:
    setting: dict[str, Any] = {name: "somebody/attention"}
    for part in where:
        setting = {part: setting}
    configure(folder, **setting)
    for use in (loaded, trained):
        with pytest.raises(SettingsInvalid, match="somebody/attention"):
            use(folder)


@pytest.mark.parametrize("name", ["/etc/x", "../x.json", "a/../../x.json", "x.py", "", "a\\..\\x"])
def test_a_tokenizers_file_is_written_nowhere_but_in_its_folder(tmp_path: Path, name: str) -> None:
    outside = str(tmp_path / "planted") if name == "/etc/x" else name
    with pytest.raises(SettingsInvalid, match="no name of a tokenizer's file"):
        open_tokenizer("model", {outside: b"{}"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
        "{{ raise_exception.__globals__.os }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% if messages.append(1) %}{% endif %}",
    ],
)
def test_a_chat_template_reaches_nothing_but_the_messages(folder: Path, template: str) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.chat_template = template
    with pytest.raises(SettingsInvalid, match="chat template"):
        to_prompt(tokenizer, [{"role": "user", "content": "so"}])
    assert not os.path.exists("ran")


def test_every_call_of_transformers_says_that_no_code_is_to_be_run() -> None:
    """Classes that only read JSON take no such argument."""
    harmless = {"GenerationConfig"}
    silent = []
    for file in [*ROOT.glob("dagflow/**/*.py"), *ROOT.glob("examples/*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr not in ("from_pretrained", "from_config"):
                continue
            said = {keyword.arg: keyword.value for keyword in call.keywords}
            trust = said.get("trust_remote_code", call)
            if ast.unparse(call.func.value) not in harmless and ast.unparse(trust) != "False":
                silent.append(f"{file.name}:{call.lineno}: {ast.unparse(call)}")
    assert silent == []
