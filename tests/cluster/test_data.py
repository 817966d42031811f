"""Every kind of data and of store that `dagflow.train` takes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from safetensors.torch import save_file
from small import assert_same_run, batches, example, train, train_with_torch

import dagflow
from dagflow.demo.gpt import GPT
from dagflow.training import feed
from dagflow.training.data import BatchStream
from dagflow.training.driver import Disturbed
from dagflow.training.feed import StreamFeed
from dagflow_tasks.program.interpreter import RANDOM_LOCK


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(32, width=16, num_layers=2, num_heads=2, context=8)


def token_dataset(folder: Path, **options: Any) -> dagflow.TokenDataset:
    tokens = np.random.default_rng(0).integers(0, 32, 500)
    assert dagflow.TokenDataset.write(str(folder), tokens.astype("uint16")) == 500
    return dagflow.TokenDataset(str(folder), batch_size=8, sequence_length=8, **options)


def train_gpt(model: torch.nn.Module, data: Any, store: Any, **options: Any) -> dagflow.TrainResult:
    options = {"num_microbatches": 2, "progress": False, **options}
    return dagflow.train(model, data, store=store, **options)


def test_workers_read_the_tokens_that_the_driver_would_have_sent(
    client: Client, tmp_path: Path
) -> None:
    data = token_dataset(tmp_path / "tokens")
    read = train_gpt(gpt(), data, tmp_path / "read", client=client, steps=4)
    sent = [data.rows(step, 0, 8) for step in range(4)]
    assert_same_run(train_gpt(gpt(), sent, tmp_path / "sent", client=client), read)
    assert len(data) == 500 // 64
    assert train_gpt(gpt(), data, tmp_path / "epoch", client=client).step == 7


def test_tokens_read_by_workers_resume_with_the_same_bits(client: Client, tmp_path: Path) -> None:
    data = token_dataset(tmp_path / "tokens", seed=3)
    whole = train_gpt(gpt(), data, tmp_path / "whole", client=client, steps=6)
    train_gpt(gpt(), data, tmp_path / "run", client=client, steps=2, num_stages=1)
    resumed = train_gpt(gpt(), data, tmp_path / "run", client=client, steps=6)
    assert_same_run(resumed, whole)


class Mapped:
    """A map-style dataset that doesn't end by IndexError."""

    def __init__(self, data: list[Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return self._data[index % len(self._data)]


def test_lists_generators_and_map_style_datasets_give_the_same_run(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 3)

    def generated() -> Iterator[Any]:
        yield from data

    wanted = train(of, data, tmp_path / "list", client=client)
    for name, same in {
        "map": Mapped(data),
        "generator": generated(),
        "mappings": [{"features": x, "labels": y} for x, y in data],
        "arrays": [(x.numpy(), y.numpy()) for x, y in data],
    }.items():
        assert_same_run(train(of, same, tmp_path / name, client=client), wanted)


def test_a_generator_that_ends_early_ends_the_run(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 3)
    with pytest.warns(UserWarning, match="iterator, which can be read once"):
        result = train(of, iter(data), tmp_path / "run", client=client, steps=10)
    assert result.step == len(result.losses) == 3


def test_a_list_is_read_again_until_the_steps_are_done(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 3)
    wanted, _ = train_with_torch(of, [*data, *data, data[0]])
    result = train(of, data, tmp_path / "run", client=client, steps=7)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    assert train(of, data, tmp_path / "epochs", client=client, epochs=2).step == 6


def test_skipping_goes_past_what_a_run_has_seen() -> None:
    stream = BatchStream([1, 2, 3], None, 0, None)
    assert stream.peek() == 1
    stream.skip(4)
    assert [stream.take(), stream.take()] == [2, 3]


def test_the_embedded_cluster_trains_into_memory(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 4)
    wanted = train(of, data, tmp_path / "run", client=client)
    url = f"memory://{uuid.uuid4().hex}"
    config = dagflow.Config(cluster=dagflow.ClusterSettings(num_workers=2, num_torch_threads=1))
    train(of, data, url, steps=2, config=config)
    assert_same_run(train(of, data, url, config=config), wanted)


def test_the_embedded_cluster_trains_on_processes_of_its_own(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 3)
    wanted = train(of, data, tmp_path / "run", client=client)
    config = dagflow.Config(cluster=dagflow.ClusterSettings(num_workers=2, num_torch_threads=1))
    assert_same_run(train(of, data, tmp_path / "embedded", config=config), wanted)


def test_a_schedulers_address_will_do(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 2)
    wanted = train(of, data, tmp_path / "client", client=client)
    found = train(of, data, tmp_path / "address", client=client.scheduler.address)
    assert_same_run(found, wanted)


def test_a_model_without_memory_trains_from_its_weights_file(
    client: Client, tmp_path: Path
) -> None:
    data = token_dataset(tmp_path / "tokens")
    model = gpt()
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    wanted = train_gpt(model, data, tmp_path / "real", client=client, steps=3)
    with dagflow.empty_weights():
        empty = GPT(32, width=16, num_layers=2, num_heads=2, context=8)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    for name, source in {"file": tmp_path / "model.safetensors", "folder": tmp_path}.items():
        found = train_gpt(
            empty, data, tmp_path / name, client=client, steps=3, state_dict=source, num_stages=2
        )
        assert_same_run(found, wanted)
    model.load_state_dict(found.state_dict(), strict=True)


def test_batches_that_are_on_their_way_when_something_is_lost_are_forgotten(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture `nothing_left` waits for that."""
    of = example(dropout=True)
    data = batches(of, 4)
    wanted = train(of, data, tmp_path / "undisturbed", client=client)
    sent: list[str] = []
    scatter, disturbances = StreamFeed._scatter, [7, 2]

    def noted(feed: StreamFeed, data: Any, address: str) -> Any:
        sent.append(address)
        return scatter(feed, data, address)

    def look_around() -> None:
        # Or later: nobody looks around while a batch is sent that is there at once.
        if disturbances and len(sent) >= disturbances[-1]:
            disturbances.pop()
            raise Disturbed("Somebody left.")

    monkeypatch.setattr(feed, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(StreamFeed, "_scatter", noted)
    # Not the driver's own, which it sets.
    monkeypatch.setattr(StreamFeed, "look_around", property(lambda _: look_around, lambda *_: None))
    assert_same_run(train(of, data, tmp_path / "run", client=client, num_stages=2), wanted)
    assert disturbances == []


def test_data_that_draws_has_the_generator_to_itself() -> None:
    # Workers that are threads of this process seed the same generator for dropout.
    held: list[bool] = []

    def drawing() -> Iterator[torch.Tensor]:
        for _ in range(3):
            held.append(RANDOM_LOCK.locked())
            yield torch.rand(2)

    before = torch.get_rng_state()
    stream = BatchStream(drawing(), 1, 0, None)
    assert len({tuple(stream.take().tolist()) for _ in range(3)}) == 3  # type: ignore[union-attr]
    assert held == [True] * 3
    assert not RANDOM_LOCK.locked()
    assert torch.equal(torch.get_rng_state(), before)
