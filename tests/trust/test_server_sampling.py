"""Options of sampling that strangers choose: each gives a token or a refusal, whatever the logits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow.errors import SettingsInvalid
from dagflow.serving.sampling import Sampling

LOGITS = torch.linspace(-30, 30, 50)
TOKENS = [3, 49, 49, 7]
LARGE = 10**5000  # Python doesn't even write it down


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({"temperature": 1e-40}, 49),
        ({"temperature": 5e-324}, 49),
        ({"temperature": 1e-31, "top_k": 3, "top_p": 0.5, "min_p": 0.5}, 49),
        ({"temperature": 1.0, "top_p": 5e-324}, 49),
        ({"temperature": 1e6, "top_p": 1e-300}, 49),
        ({"temperature": 1e-40, "repetition_penalty": 1e-6}, 49),
        ({"repetition_penalty": 1e6}, 48),  # the likeliest one occurred
        ({"temperature": 1.0, "logit_bias": {49: -math.inf, 48: -1e6}}, 47),
        ({"temperature": 1e-40, "logit_bias": {7: 1e6}}, 7),
    ],
    ids=str,
)
def test_the_smallest_and_largest_options_choose_a_token(
    options: dict[str, Any], token: int
) -> None:
    assert Sampling(**options).choose(LOGITS, TOKENS) == token


def test_a_token_is_left_when_all_are_ruled_out() -> None:
    nothing = dict.fromkeys(range(len(LOGITS)), -math.inf)
    for temperature in (0.0, 1e-40, 1.0):
        assert 0 <= Sampling(temperature=temperature, logit_bias=nothing).choose(LOGITS, []) < 50


@pytest.mark.parametrize(
    "options",
    [
        *(
            {name: value}
            for name in ("temperature", "top_p", "min_p")
            for value in (-1, 1e7, LARGE)
        ),
        *(
            {name: value}
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "frequency_penalty",
                "presence_penalty",
            )
            for value in (math.nan, math.inf, -math.inf, True, "1", None, [1], LARGE, -LARGE, 1j)
        ),
        *({"repetition_penalty": value} for value in (0, -1, 1e-300, 1e-7, 1e300)),
        *({"frequency_penalty": value} for value in (1e300, -1e7)),
        *(
            {name: value}
            for name in ("top_k", "seed")
            for value in (1.5, True, math.nan, "1", None)
        ),
        *({"seed": value} for value in (2**64, -(2**64), LARGE)),
        {"top_k": -1},
        *(
            {"logit_bias": value}
            for value in (
                {-1: 1},
                {-LARGE: 1},
                {"5": 1},
                {True: 1},
                {1.5: 1},
                {None: 1},
                {1: math.nan},
                {1: math.inf},
                {1: 1e300},
                {1: LARGE},
                {1: True},
                {1: "1"},
                [1],
                None,
            )
        ),
    ],
)
def test_what_no_logits_survive_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsInvalid, match=next(iter(options))):
        Sampling(**options)


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    found = Sampling(
        temperature=np.float32(0.5), top_p=Fraction(1, 2), top_k=np.int64(3), seed=np.int64(4)
    )
    assert found == Sampling(temperature=0.5, top_p=0.5, top_k=3, seed=4)
    assert [type(v) for v in (found.temperature, found.top_p, found.seed)] == [float, float, int]


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(),
            "top_p": st.floats(),
            "min_p": st.floats(),
            "top_k": st.integers(),
            "repetition_penalty": st.floats(),
            "frequency_penalty": st.floats(),
            "presence_penalty": st.floats(),
            "seed": st.integers(),
            "logit_bias": st.dictionaries(st.integers(0, 49), st.floats(), max_size=4),
        },
    ),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=50, max_size=50),
)
def test_any_numbers_give_a_token_or_a_refusal(
    options: dict[str, Any], logits: list[float]
) -> None:
    try:
        sampling = Sampling(**options)
    except SettingsInvalid:
        return
    assert 0 <= sampling.choose(torch.tensor(logits), TOKENS, 2) < 50
