"""Conversations in the terminal, and what is made of them for the model."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import save_tiny
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dagflow.cli import main
from dagflow.errors import SettingsInvalid, TaskFailed
from dagflow.server.conversation import to_prompt
from dagflow.server.opening import open_model
from dagflow.server.terminal import chat
from dagflow.serving.engine import Engine

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who leaves?"},
]


def test_a_conversation_follows_the_template(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens, stops = to_prompt(tokenizer, MESSAGES)
    wanted = "<|system|>Be brief.\n<|user|>Who leaves?\n<|assistant|>"
    assert tokenizer.decode(tokens) == wanted
    assert stops == ()


def test_without_a_template_a_message_is_a_line(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path, template=None))
    tokens, stops = to_prompt(tokenizer, MESSAGES)
    assert tokenizer.decode(tokens) == "system: Be brief.\nuser: Who leaves?\nassistant:"
    assert stops == ("\nuser:",)


def test_the_terminal_answers_until_the_input_ends(model_folder: Path) -> None:
    options = ["chat", "--model", str(model_folder), "--store", "memory://chat", "--workers", "1"]
    options += ["--temperature", "0", "--max-tokens", "8"]
    answers = [
        CliRunner().invoke(main, options, input=said) for said in ("Who?\n", "Who?\n\nWhere?\n")
    ]
    for answer in answers:
        assert answer.exit_code == 0, answer.output
    once, twice = (answer.output for answer in answers)
    assert len(once.splitlines()[1]) > len("> ")
    assert twice.startswith(once.rstrip("> \n"))


def _chat(model_folder: Path, store: str, write: Callable[[str], object]) -> None:
    chat(
        str(model_folder),
        store=store,
        scheduler=None,
        stages="auto",
        weights=None,
        workers=1,
        system=None,
        temperature=0.0,
        max_tokens=8,
        write=write,
    )


def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhere?\n"))
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    _chat(model_folder, "memory://interrupted", write)
    assert shown[3] == " [ended]"
    assert len(shown) > 8
    assert shown[-3:-1] == [" [cut off at its longest length]", "\n"]


def test_an_answer_that_breaks_off_says_why_and_the_conversation_goes_on(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhere?\n"))
    shown: list[str] = []
    send, times = Engine.send, iter(range(1000))

    async def send_or_fail(self: Engine, *args: Any) -> Any:
        """A worker that fails at the third token."""
        if next(times) == 2:
            raise TaskFailed("1F0 can't")
        return await send(self, *args)

    monkeypatch.setattr(Engine, "send", send_or_fail)
    _chat(model_folder, "memory://broken", shown.append)
    said = "".join(shown)
    assert said.count("[broken off] TaskFailed: 1F0 can't\n") == 1
    assert said.count("[cut off at its longest length]\n") == 1


def test_a_stored_model_is_opened_by_its_name(model_folder: Path) -> None:
    name = open_model(str(model_folder), "memory://names", "bf16").ref.name
    assert open_model(name, "memory://names").ref.name == name
    with pytest.raises(SettingsInvalid, match="stored as bf16"):
        open_model(name, "memory://names", "fp32")
    with pytest.raises(SettingsInvalid, match=name):
        open_model("nothing", "memory://names")


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_the_help_texts_have_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert result.output.count(f"dagflow {command}") >= 3


def test_a_port_that_is_taken_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", "--model", "none", "--port", port])
    assert result.exit_code == 1
    assert "another --port" in result.output


def test_a_draft_of_another_vocabulary_is_refused_before_anything_starts(
    model_folder: Path, tmp_path: Path
) -> None:
    small = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    command = ["serve", "--model", str(model_folder), "--draft", str(tmp_path), "--port", "0"]
    result = CliRunner().invoke(main, [*command, "--store", "memory://drafts"])
    assert result.exit_code == 1
    assert "vocabulary of 50 tokens" in result.output
