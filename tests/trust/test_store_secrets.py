"""Names and secrets of stores are in no log, representation, error or file of a run.

On the commit before this test the ledger of a run held its data's URL as it was given, errors of client
libraries and what they came from said whatever those say, and so did S3's at the level DEBUG.
"""

from __future__ import annotations

import io
import logging
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local import local_client
from s3_server import MotoServer

import dagflow
from dagflow.demo.gpt import GPT
from dagflow.errors import DagflowError
from dagflow.training.data import _ARRAYS
from dagflow_storage import RetryPolicy, Store, TokenArray, shown_url, walk
from dagflow_storage.faults import Fault, FaultKind
from dagflow_storage.place.redaction import hidden

KEY, SECRET, TOKEN = "PLANTEDKEYqwer", "PLANTED/secret+asdf", "PLANTEDtoken==zxcv"
OPTIONS = {"key": KEY, "secret": SECRET, "token": TOKEN}
PLANTED = ("PLANTED", "qwer", "asdf", "zxcv")
HASTY = RetryPolicy(total_seconds=0)


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    """Everything that is logged, at the level DEBUG, with tracebacks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def assert_not_told(text: str) -> None:
    at = next((text.index(part) for part in PLANTED if part in text), None)
    assert at is None, text[max(0, at - 200) : at + 200]


def told(error: BaseException) -> str:
    """Return all that anybody might print of an error."""
    shown = "".join(traceback.format_exception(error))
    return f"{error} {error!r} {shown} {pickle.loads(pickle.dumps(error))!r}"


@pytest.mark.parametrize(
    "fault", [FaultKind.FORBIDDEN, FaultKind.EXPIRED, FaultKind.NO_BUCKET, FaultKind.UNAVAILABLE]
)
def test_a_bucket_that_refuses_is_told_of_without_its_keys(
    moto: MotoServer, said: io.StringIO, fault: FaultKind
) -> None:
    options = {**moto.options, **OPTIONS}
    store = Store(moto.new_store().url, options, retry=HASTY)
    store.write_bytes("a", b"1")
    store.probe()
    operations: Any = ["put", "get", "info", "list", "delete"]
    moto.faults.play(*[Fault(fault, operation, count=None) for operation in operations])
    for attempt in (
        lambda: store.write_bytes("b", b"1"),
        lambda: store.read_bytes("a"),
        store.probe,
    ):
        with pytest.raises(DagflowError) as caught:
            attempt()
        assert_not_told(told(caught.value))
    assert_not_told(repr(store) + str(store) + repr(store.child("x")))
    assert_not_told(said.getvalue())


@pytest.mark.parametrize("options", [{**OPTIONS, "endpoint_url": "http://127.0.0.1:9"}, OPTIONS])
def test_nobody_and_a_wrong_option_are_told_of_without_keys(
    said: io.StringIO, options: dict[str, Any]
) -> None:
    wrong = {} if "endpoint_url" in options else {"endpoint_url": f"nonsense {SECRET}"}
    store = Store("s3://no-bucket/run", {**options, **wrong}, retry=HASTY)
    with pytest.raises(DagflowError) as caught:
        store.probe()
    assert_not_told(told(caught.value))
    assert_not_told(said.getvalue())


URLS = [
    f"https://{KEY}:PLANTEDpassasdf@127.0.0.1:9/data",
    "https://127.0.0.1:9/data?X-Amz-Credential=PLANTEDKEYqwer&X-Amz-Signature=PLANTEDzxcv",
    "https://127.0.0.1:9/data?sv=2024&sig=PLANTED%2Fzxcv",
    f"ftp://{KEY}:{SECRET}@127.0.0.1:9/data",
    f"simplecache::https://{KEY}:PLANTED@asdf@127.0.0.1:9/data#token={TOKEN}",
]


@pytest.mark.parametrize("url", URLS)
def test_an_address_with_secrets_is_told_of_without_them(url: str, said: io.StringIO) -> None:
    data = dagflow.TokenDataset(url, batch_size=1, sequence_length=1)
    assert_not_told(shown_url(url) + repr(data))
    assert "127.0.0.1:9" in shown_url(url)
    for attempt in (
        lambda: Store(url, retry=HASTY).read_bytes("a"),
        lambda: Store(url, retry=HASTY).write_bytes("a", b""),
        lambda: Store(url, retry=HASTY).probe(),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            attempt()
        assert_not_told(told(caught.value))
    assert_not_told(said.getvalue())


def test_a_run_holds_nothing_of_what_its_store_and_data_are_reached_with(
    moto: MotoServer, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are in fsspec's configuration, and some in the data's address."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {**moto.options, **OPTIONS})
    url = moto.new_store().url
    dagflow.TokenDataset.write(f"{url}-tokens", np.arange(64) % 8)
    data = dagflow.TokenDataset(f"{url}-tokens?{KEY}={SECRET}", batch_size=2, sequence_length=4)
    monkeypatch.setitem(_ARRAYS, data.url, TokenArray(f"{url}-tokens"))
    with local_client(1, processes=False) as client:
        result = dagflow.train(
            GPT(8, width=16, num_layers=1, num_heads=2, context=4),
            data,
            steps=2,
            store=url,
            client=client,
            optimizer=dagflow.Optimizer("SGD", lr=0.1),
            progress=False,
        )
    objects = {found.path: Store(url).read_bytes(found.path) for found in walk(Store(url))}
    assert any("ledger" in path for path in objects)
    for path, content in objects.items():
        assert_not_told(f"{path} {content.decode(errors='replace')}")
    assert b"tokens?***" in b"".join(objects.values())
    assert_not_told(repr(result) + repr(data))
    assert_not_told(said.getvalue())


@given(
    st.text(min_size=4, max_size=40).filter(lambda text: text.strip() == text and "*" not in text),
    st.sampled_from(["key", "secret", "token", "password", "account_key", "sas_token", "username"]),
)
def test_a_secret_is_hidden_wherever_a_text_has_it(secret: str, name: str) -> None:
    options: list[dict[str, object]] = [
        {name: secret},
        {"client_kwargs": {name: secret}},
        {"headers": [{"Authorization": secret}]},
        {"storage": {"target_options": {name: secret}}},
    ]
    for given_options in options:
        text = f"<said> {secret!s} <and> {secret!s}"
        assert hidden(text, "s3://bucket/run", given_options) == "<said> *** <and> ***"


def test_what_is_no_secret_stays() -> None:
    options: dict[str, object] = {
        "endpoint_url": "http://10.0.0.1:9000",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    text = "could not write s3://bucket/run/path: no answer of http://10.0.0.1:9000 in us-east-1"
    assert hidden(text, "s3://bucket/run", options) == text
