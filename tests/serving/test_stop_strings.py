"""Text comes piece by piece, and ends before a stop string."""

from __future__ import annotations

from pathlib import Path

from distributed import Client
from families import greedy, language_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import dagflow
from dagflow.models.text import StopStrings


def _save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}x": i for i in range(96)}, unk_token="w0x"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0x").save_pretrained(folder)


def test_an_answer_ends_before_a_stop_string(client: Client, tmp_path: Path) -> None:
    model = language_model("llama")
    model.save_pretrained(tmp_path / "saved")
    _save_tokenizer(tmp_path / "saved")
    loaded = dagflow.load(tmp_path / "saved", store=tmp_path / "store")
    tokens = greedy(model, [5, 17, 3], 8)
    text = loaded.tokenizer.decode([5, 17, 3, *tokens]).removeprefix("w5x w17x w3x")
    stop = f"w{tokens[3]}x"
    with dagflow.Deployment(loaded, client) as deployment:
        options = {"max_new_tokens": 8, "ignore_end": True}
        whole = dagflow.generate(deployment, "w5x w17x w3x", **options)
        assert whole.texts == [text]
        ended = dagflow.generate(deployment, "w5x w17x w3x", stop=stop, **options)
        assert (ended.texts, ended.finish_reasons) == ([text[: text.find(stop)]], ["stop"])


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["END", "DEX"])
    assert stops.add("a E") == ("a ", False)
    assert stops.add("N") == ("", False)
    assert stops.add("d D") == ("ENd ", False)
    assert stops.add("EX and more") == ("", True)
    assert StopStrings([]).add("END") == ("END", False)
