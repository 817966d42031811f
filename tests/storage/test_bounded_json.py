"""JSON that others wrote is measured before memory is taken for what it says."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage.place.bounded_json import JsonLimits, JsonRefused, parse_json

SMALL = JsonLimits(num_bytes=1000, depth=4, num_values=20)
LIMITS = {"nested": JsonLimits(depth=4), "values": SMALL, "bytes": SMALL}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_python_writes_is_read_as_python_reads_it(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert json.dumps(parse_json(text, finite=False)) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 5 + b"1" + b"}" * 5, "nested"),
        (b'["[", [[[[]]]]]', "nested"),
        (b'["\\"", [[[[1]]]]]', "nested"),
        (b'["\\\\", [[[[1]]]]]', "nested"),
        (b"[" + b"0," * 21 + b"0]", "values"),
        (b"[" + b"[]," * 21 + b"[]]", "values"),
        (b'"' + b"x" * 1000 + b'"', "bytes"),
        (b"1" * 700, "digits"),
        (b"[-" + b"1" * 41 + b"]", "digits"),
        (b"0." + b"1" * 700, "digits"),
        (b'{"a": 1, "b": 2, "a": 1}', "twice"),
        (b'[{"\\u0061": 1, "a": 1}]', "twice"),
        (b"NaN", "NaN"),
        (b"[1, -Infinity]", "Infinity"),
        (b"1e999", "no float"),
        (b"-123456.5E+0309", "no float"),
        (b'"\\ud800"', "surrogates"),
        (b'{"\\uDFFF": 1}', "surrogates"),
        (b'"\xff"', "utf-8"),
        ("[1]".encode("utf-16"), "utf-8"),
        (b"", "no JSON"),
        (b"[1", "no JSON"),
        (b"[1] 2", "no JSON"),
        (b"\x00", "no JSON"),
    ],
)
def test_what_is_too_much_is_refused_and_said(text: bytes, why: str) -> None:
    with pytest.raises(JsonRefused, match=why):
        parse_json(text, LIMITS.get(why, JsonLimits()))


def test_integers_as_long_as_python_refuses_are_refused_likewise() -> None:
    with pytest.raises(JsonRefused, match="digits"):
        parse_json(b'{"logit_bias": ' + b"9" * 5000 + b"}")


def test_brackets_and_commas_in_strings_count_for_nothing() -> None:
    text = json.dumps(["[{" * 50 + ',"\\' * 20, "1" * 60, "1e999"])
    assert parse_json(text, SMALL) == json.loads(text)


def test_nesting_and_values_at_the_limit_pass() -> None:
    assert parse_json(b"[[[[1]]]]", SMALL) == [[[[1]]]]
    assert parse_json(b"[" + b"0," * 19 + b"0]", SMALL) == [0] * 20


def test_what_was_written_with_nan_is_read_where_it_is_allowed() -> None:
    found = parse_json(b"[NaN, Infinity, 1e999]", finite=False)
    assert str(found) == "[nan, inf, inf]"


@pytest.mark.parametrize("text", [b"[]," * 10**6, b'"",' * 10**6, b'{"":[]},' * 10**5])
def test_many_values_are_refused_before_memory_is_taken_for_them(text: bytes) -> None:
    text = b"[" + text + b"0]"
    tracemalloc.start()
