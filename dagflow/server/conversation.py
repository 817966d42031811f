"""From a conversation to a prompt: by the tokenizer's chat template, or in a plain format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagflow.errors import SettingsInvalid
from dagflow.server.encoding import encode

Message = Mapping[str, str]  # role and content


def to_prompt(
    tokenizer: Any, messages: Sequence[Message], limit: int | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """Return token ids that ask for the assistant's next message, and strings that end it.

    A tokenizer without a chat template (that of a model that wasn't trained to chat) gets one line
    a message, ``user: ...``, and the answer ends where the model writes the user's next line.
    Of a conversation with more tokens than `limit`, only more than that are returned.

    Raises
    ------
    SettingsInvalid
        If the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        text = "\n".join([*lines, "assistant:"])
        return encode(tokenizer, text, limit), ("\nuser:",)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise SettingsInvalid(
            f"The model's chat template refuses these messages: {error}"
        ) from error
    return encode(tokenizer, text, limit, add_special_tokens=False), ()
