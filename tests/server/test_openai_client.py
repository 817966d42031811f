"""What OpenAI's own client gets from a served model."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from served import Served

END = 0  # the tokenizer's end token
GOES_ON = {str(END): -100}
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Which machine leaves?"}]


def complete(served: Served, **options: Any) -> Any:
    given = {"prompt": "A machine", "max_tokens": 12, "temperature": 0, "logit_bias": GOES_ON}
    return served.openai.completions.create(model="tiny", **{**given, **options})


def chat(served: Served, **options: Any) -> Any:
    given = {"messages": MESSAGES, "max_completion_tokens": 12, "logit_bias": GOES_ON}
    return served.openai.chat.completions.create(model="tiny", **{**given, **options})


def test_the_model_is_listed(served: Served) -> None:
    (model,) = served.openai.models.list().data
    assert model.id == "tiny"
    assert served.openai.models.retrieve("tiny").id == "tiny"


def test_a_completion_has_text_usage_and_the_reason_of_its_end(served: Served) -> None:
    found = complete(served)
    (choice,) = found.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_an_end_token_stops(served: Served) -> None:
    found = complete(served, logit_bias={str(END): 100})
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == ""
    assert found.usage.completion_tokens == 1


def test_a_stop_string_stops_and_is_no_part_of_the_answer(served: Served) -> None:
    whole = complete(served).choices[0].text
    stop = whole[3:5]
    (choice,) = complete(served, stop=[stop]).choices
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(stop)]


def test_pieces_of_a_stream_are_the_whole_completion(served: Served) -> None:
    pieces = list(complete(served, stream=True, stream_options={"include_usage": True}))
    *said, last = pieces
    assert "".join(piece.choices[0].text for piece in said) == complete(served).choices[0].text
    assert [piece.choices[0].finish_reason for piece in said][-1] == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 12


def test_pieces_of_a_stream_are_the_whole_chat(served: Served) -> None:
    pieces = list(chat(served, stream=True, seed=5))
    whole = chat(served, seed=5)
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert all(piece.usage is None for piece in pieces)


def test_a_seed_gives_the_same_answer_twice_and_another_another(served: Served) -> None:
    first, again, other = (chat(served, seed=seed) for seed in (5, 5, 6))
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_choices_differ_and_the_prompt_is_counted_once(served: Served) -> None:
    one, two = chat(served, seed=5), chat(served, seed=5, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    texts = [choice.message.content for choice in two.choices]
    assert texts[0] == one.choices[0].message.content
    assert texts[0] != texts[1]
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 24


def test_several_prompts_are_answered_in_their_order(served: Served) -> None:
    prompts = ["A machine", "Stages run"]
    found = complete(served, prompt=prompts)
    alone = [complete(served, prompt=prompt) for prompt in prompts]
    assert [c.text for c in found.choices] == [one.choices[0].text for one in alone]
    assert found.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)


def test_logprobs_of_a_greedy_chat_are_those_of_the_likeliest_tokens(served: Served) -> None:
    found = chat(served, temperature=0, logit_bias={}, logprobs=True, top_logprobs=3)
    entries = found.choices[0].logprobs.content
    assert len(entries) == found.usage.completion_tokens
    for entry in entries:
        assert entry.logprob < 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)


def test_logprobs_of_a_stream_are_those_of_the_whole_completion(served: Served) -> None:
    whole = complete(served, logprobs=2).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.top_logprobs) == 12
    pieces = [piece.choices[0].logprobs for piece in complete(served, logprobs=2, stream=True)]
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.text_offset


def test_a_conversation_that_the_template_refuses_is_a_bad_request(served: Served) -> None:
    late = [*MESSAGES, {"role": "system", "content": "Be brief."}]
    with pytest.raises(openai.BadRequestError, match="the system speaks first"):
        chat(served, messages=late)


def test_a_wrong_key_is_refused(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        served.openai.with_options(api_key="third").models.list()
    assert caught.value.code == "invalid_api_key"


def test_an_unknown_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'huge'") as caught:
        served.openai.completions.create(model="huge", prompt="A")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
        ({"suffix": "."}, "suffix", "unsupported_parameter"),
        ({"extra_body": {"beams": 4}}, "beams", "unknown_parameter"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "invalid_value"),
        ({"prompt": [1, 100000]}, None, None),
        ({"prompt": ""}, None, None),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [1] * 5000}, "prompt", "context_length_exceeded"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    served: Served, options: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(served, **options)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("option", "times"), [("frequency_penalty", 6), ("presence_penalty", 1)])
def test_penalties_count_in_the_answer(served: Served, option: str, times: int) -> None:
    biases = {"40": 100, "41": 99}  # by which everything else loses

    def tokens(penalty: float) -> list[str]:
        options = {"logit_bias": biases, "logprobs": 0, option: penalty}
        return complete(served, prompt=[40] * 5, **options).choices[0].logprobs.tokens

    first, *others = tokens(0.0)
    assert set(others) == {first}
    found = tokens(1.8)
    assert (found[0], sum(token != first for token in found)) == (first, times)


def test_options_that_ask_for_nothing_are_taken(served: Served) -> None:
    found = complete(served, frequency_penalty=0, presence_penalty=0, user="me", seed=None)
    assert found.choices[0].text == complete(served).choices[0].text
