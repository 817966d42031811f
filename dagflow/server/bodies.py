"""What clients ask for: bodies of requests, checked before anything runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from dagflow.server.conversation import Message
from dagflow.server.errors import ApiError
from dagflow.server.structure import Limits, check_structure
from dagflow.serving.sampling import LEAST_REPETITION_PENALTY

MAX_CHOICES = 16
_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 1024

# Options of OpenAI's that the server doesn't have, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# They change no answer.
_IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"}

# A body of 10 MiB may hold millions of values, and an error of each would take gigabytes: lists are
# given up at the first, and objects at the first name that they mustn't have.
_Item = TypeVar("_Item")
_List = Annotated[list[_Item], Field(fail_fast=True)]
_Prompts = Annotated[_List[_Item], Field(max_length=MAX_CHOICES)]
_MOST_BIASES = 4096
_MOST_MODEL_CHARACTERS = 1000
# Of what a request holds, in a message.
_MOST_SHOWN = 100
_MOST_DIGITS = 18

_OF_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Tokens = Annotated[_List[int], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, given: Any) -> Any:
        names = given if isinstance(given, dict) else ()
        for name in names:
            if name not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown", "There is no option {name}", {"name": _short(name)}
                )
        return given


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(_Strict):
    """What both kinds of requests may hold.

    Attributes
    ----------
    long_option : str
        The one that makes a body long.
    """

    long_option: ClassVar[str]

    model: str = Field(max_length=_MOST_MODEL_CHARACTERS)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: _Stop | Annotated[_List[_Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=LEAST_REPETITION_PENALTY, le=10)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=_MOST_BIASES)] = {}

    @property
    def max_new_tokens(self) -> int | None:
        """How many the answer may have; None if the request doesn't say."""
        return self.max_tokens

    @property
    def default_new_tokens(self) -> int:
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell with each; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(
        self, vocabulary: int, defaults: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return the sampling options of each choice; they differ in their seeds.

        Parameters
        ----------
        defaults : mapping, optional
            The model's own, for those that the request doesn't give.
        """
        options = {name: getattr(self, name) for name in _OF_SAMPLING}
        for name, value in (defaults or {}).items():
            if name not in self.model_fields_set:
                options[name] = value
        options["logit_bias"] = {_token_id(t, vocabulary): b for t, b in self.logit_bias.items()}
        seed = random.getrandbits(63) if self.seed is None else self.seed
        return [{**options, "seed": seed + choice} for choice in range(self.n)]


class CompletionBody(Common):
    """Of POST /v1/completions."""

    long_option = "prompt"

    prompt: str | _Prompts[str] | _Tokens | _Prompts[_Tokens]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def default_new_tokens(self) -> int:
        return _COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[TextPart]
    name: str | None = None

    @property
    def plain(self) -> Message:
        """Return it as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatBody(Common):
    """Of POST /v1/chat/completions."""

    long_option = "messages"

    messages: Annotated[_List[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def default_new_tokens(self) -> int:
        return _CHAT_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


Body = TypeVar("Body", bound=Common)


def parse(kind: type[Body], text: bytes | bytearray, limits: Limits | None = None) -> Body:
    """Return a body.

    Raises
    ------
    ApiError
        400; names the option.
    """
    check_structure(text, limits or Limits(), kind.long_option)
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no valid JSON: {error}.", "invalid_json") from error
    given = {name: value for name, value in found.items() if value is not None}
    for name in _IGNORED & given.keys():
        del given[name]
    for name in _NEUTRAL.keys() & given.keys():
        if given.pop(name) not in _NEUTRAL[name]:
            raise ApiError(400, f"This server has no {name!r}.", "unsupported_parameter", name)
    for name in given:
        if name not in kind.model_fields:
            shown = _short(name)
            raise ApiError(400, f"There is no option {shown!r}.", "unknown_parameter", shown)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _option_error(error) from error


def _option_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])
    where = ".".join(_short(str(part)) for part in first["loc"])
    return ApiError(400, f"{where}: {first['msg']}.", "invalid_value", name)


def _token_id(text: str, vocabulary: int) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    if not (is_number and int(text) < vocabulary):
        message = f"logit_bias: {_short(text)!r} is no token; the vocabulary has {vocabulary}."
        raise ApiError(400, message, "invalid_value", "logit_bias")
    return int(text)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
