"""Tokens become the same text piece by piece as together, in the place where they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dagflow.models.text import Detokenizer, StopStrings, TokenTexts

_TEXTS = [
    "Stages run on volunteers' machines.",
    "A machine that leaves is replaced.",
    "naïve 火 火山",
]
_BROKEN = "\ufffd"


@cache
def _byte_level() -> Any:
    """As GPT-2's: a token may be any bytes, and parts of two characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@cache
def _byte_fallback() -> Any:
    """As Llama 2's: words begin with a space of their own, and rare characters are bytes."""
    bytes_of = {f"<0x{i:02X}>": i + 1 for i in range(256)}
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁end"]
    vocabulary = {"<s>": 0, **bytes_of, **{word: 257 + i for i, word in enumerate(words)}}
    merges = [("▁", "t"), ("▁t", "h")]
    vocabulary |= {"▁t": 500, "▁th": 501}
    del merges[1:]
    bpe = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


@cache
def _slow() -> Any:
    """A token is a byte; written in Python."""
    return ByT5Tokenizer()


_ALL = [_byte_level, _byte_fallback, _slow]


def _pieces(tokenizer: Any, tokens: list[int], before: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, before)
    return [*map(detokenizer.add, tokens), detokenizer.rest()]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(_ALL),
    st.text(st.sampled_from("the endabc 火山ïñ🙂👩‍🚀\n"), max_size=40),
    st.integers(0, 30),
)
def test_pieces_together_are_the_text_after_the_prompt(make: Any, text: str, at: int) -> None:
    tokenizer = make()
    tokens = _ids(tokenizer, text)
    before, after = tokens[:at], tokens[at:]
    told = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    if whole.startswith(told) and not told.endswith(_BROKEN):
        assert told + "".join(_pieces(tokenizer, after, tuple(before))) == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 299), max_size=60))
def test_any_tokens_of_a_byte_level_vocabulary_are_told_as_they_are_decoded(
    tokens: list[int],
) -> None:
    tokenizer = _byte_level()
    assert "".join(_pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_the_first_word_of_an_answer_has_its_space() -> None:
    tokenizer = _byte_fallback()
    prompt, answer = _ids(tokenizer, "go to"), _ids(tokenizer, "the end")
    assert "".join(_pieces(tokenizer, answer, tuple(prompt))) == " the end"
    assert "".join(_pieces(tokenizer, answer)) == "the end"


def test_a_word_behind_special_tokens_has_its_space() -> None:
    tokenizer = _byte_fallback()
    answer = [0] * 40 + _ids(tokenizer, "end")
    assert "".join(_pieces(tokenizer, answer, tuple(_ids(tokenizer, "the")))) == " end"


@pytest.mark.parametrize("make", _ALL)
def test_a_character_comes_when_it_is_complete(make: Any) -> None:
    tokenizer = make()
    tokens = [*_ids(tokenizer, "a"), *_ids(tokenizer, "a🙂")[-4:]]
    assert [piece for piece in _pieces(tokenizer, tokens) if piece] == ["a", "🙂"]


class _Counting:
    """A tokenizer that counts how many tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.num_decoded += len(tokens)
        text: str = self._tokenizer.decode(tokens, **options)
        return text


def _broken(make: Any, byte: int) -> int:
    tokenizer = make()
    if make is _byte_level:
        text = {v: k for k, v in _bytes_as_characters().items()}[byte]
        return int(tokenizer.convert_tokens_to_ids(text))
    return byte + 1 if make is _byte_fallback else byte + 3


def _said_of_broken(make: Any, count: int) -> str:
    return "" if make is _slow else _BROKEN * count  # ByT5's leaves broken bytes out


def _bytes_as_characters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


@pytest.mark.parametrize("byte", [0xFF, 0xE7])  # in no character, and the first of three
@pytest.mark.parametrize("make", _ALL)
def test_broken_bytes_are_told_after_a_characters_length_at_a_constant_cost(
    make: Any, byte: int
) -> None:
    counting = _Counting(make())
    tokens = [_broken(make, byte)] * 400
    detokenizer = Detokenizer(counting)
    found = ""
    for count, token in enumerate(tokens, 1):
        found += detokenizer.add(token)
        assert make is _slow or count - 3 <= len(found) <= count
    assert found + detokenizer.rest() == _said_of_broken(make, 400)
    assert counting.num_decoded < 40 * len(tokens)


@pytest.mark.parametrize("make", _ALL)
def test_text_behind_broken_bytes_is_told_whole(make: Any) -> None:
    tokenizer = make()
    tokens = [_broken(make, 0xFF)] * 9 + _ids(tokenizer, "end")
    assert "".join(_pieces(tokenizer, tokens)).replace(" ", "") == _said_of_broken(make, 9) + "end"


def test_a_character_behind_a_complete_one_does_not_break_it() -> None:
    tokenizer = _byte_fallback()
    tokens = [*_ids(tokenizer, "火山")[1:], _broken(_byte_fallback, 0xFF), *_ids(tokenizer, "end")]
    assert "".join(_pieces(tokenizer, tokens)) == f"火山{_BROKEN} end"


@pytest.mark.parametrize("make", _ALL)
def test_a_prompt_is_never_cut_within_a_character(make: Any) -> None:
    tokenizer = make()
    tokens = _ids(tokenizer, "火山🙂火" * 3)
    for at in range(len(_ids(tokenizer, "火山🙂火")), len(tokens)):
        told = tokenizer.decode(tokens[:at])
        if not told.endswith(_BROKEN) and tokenizer.decode(tokens).startswith(told):
            pieces = _pieces(tokenizer, tokens[at:], tuple(tokens[:at]))
            assert told + "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize("make", _ALL)
def test_stop_strings_work_across_pieces(make: Any) -> None:
    tokenizer = make()
    stops = StopStrings(["火e"])
    told = ""
    for piece in _pieces(tokenizer, _ids(tokenizer, "the火end"), tuple(_ids(tokenizer, "a"))):
        text, ended = stops.add(piece)
        told += text
        if ended:
            break
    assert (told.strip(), ended) == ("the", True)


def test_single_tokens_have_their_spaces() -> None:
    tokenizer = _byte_fallback()
    texts = TokenTexts(tokenizer)
    assert texts[tokenizer.convert_tokens_to_ids("▁end")] == " end"
    assert texts[tokenizer.convert_tokens_to_ids("e")] == "e"
    assert texts[0] == "<s>"
