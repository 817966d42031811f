"""A run that stops and goes on ends with the bits of one that didn't."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from small import assert_same_run, batches, example, train
from torch.utils.data import DataLoader, TensorDataset
from zoo import Example, normed

import dagflow
from dagflow.runs.listing import samples_of
from dagflow.training.seen import fingerprint
from dagflow_storage import RunDirectory, Store, list_snapshots

CLIPPED: dict[str, Any] = {
    "clip_grad_norm": 0.5,
    "schedule": dagflow.Schedule("cosine", warmup_steps=2, total_steps=9),
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param({**CLIPPED, "precision": "bf16"}, id="all"),
    ],
)
def test_resuming_with_other_stages_ends_with_the_same_bits(
    client: Client, tmp_path: Path, options: dict[str, Any]
) -> None:
    of = example(dropout=True)
    data = batches(of, 9)
    whole = train(of, data, tmp_path / "whole", client=client, num_stages=2, **options)
    for steps, num_stages in ((2, 1), (5, 4), (9, 3)):
        part = train(
            of, data, tmp_path / "run", client=client, num_stages=num_stages, steps=steps, **options
        )
        assert part.step == steps
        assert part.losses == whole.losses[:steps]
    assert_same_run(part, whole)


def test_batch_norms_statistics_survive_a_resume(client: Client, tmp_path: Path) -> None:
    of = normed()
    data = batches(of, 4)
    whole = train(of, data, tmp_path / "whole", client=client, num_stages=3)
    train(of, data, tmp_path / "run", client=client, num_stages=1, steps=2)
    assert_same_run(train(of, data, tmp_path / "run", client=client, num_stages=2), whole)


def test_a_finished_run_called_again_trains_nothing(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 4)
    first = train(of, data, tmp_path / "run", client=client)
    events: list[dagflow.StepEvent] = []
    again = train(of, data, tmp_path / "run", client=client, callbacks=[events.append])
    assert events == []
    assert_same_run(again, first)


def test_snapshots_are_written_as_often_as_asked_and_the_oldest_deleted(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    config = dagflow.Config(retention=dagflow.Retention(newest=2))
    train(of, batches(of, 7), tmp_path / "run", client=client, snapshot_every=2, config=config)
    assert list_snapshots(Store(str(tmp_path / "run"))) == [6, 7]
    train(of, batches(of, 3), tmp_path / "last", client=client, snapshot_every=None)
    assert list_snapshots(Store(str(tmp_path / "last"))) == [0, 3]


def shuffled(count: int = 48) -> DataLoader[Any]:
    torch.manual_seed(5)
    rows = TensorDataset(torch.randn(count, 16), torch.randint(0, 3, (count,)))
    return DataLoader(rows, batch_size=8, shuffle=True, drop_last=True)


def test_a_shuffling_loader_shows_a_resumed_run_the_same_batches(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    whole = train(of, shuffled(), tmp_path / "whole", client=client, epochs=2)
    assert whole.step == 12
    torch.manual_seed(99)
    train(of, shuffled(), tmp_path / "run", client=client, steps=4)
    torch.manual_seed(100)
    resumed = train(of, shuffled(), tmp_path / "run", client=client, epochs=2)
    assert_same_run(resumed, whole)
    other = train(of, shuffled(), tmp_path / "other", client=client, steps=4, seed=1)
    assert other.losses[1:] != whole.losses[1:4]


def test_an_epoch_is_shuffled_anew_and_leaves_the_users_random_numbers_alone(
    client: Client, tmp_path: Path
) -> None:
    seen: list[list[float]] = []

    class Watching(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            order = torch.randperm(len(self)).tolist()
            seen.append(order)
            return iter([self[index] for index in order])

    of = example()
    data = Watching(batches(of, 6))
    state = torch.get_rng_state()
    train(of, data, tmp_path / "run", client=client, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 2
    assert seen[0] != seen[1]


def test_metrics_in_the_store_hold_every_step_once(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 8)
    train(of, data, tmp_path / "run", client=client, steps=3)
    result = train(of, data, tmp_path / "run", client=client, steps=8)
    rows = RunDirectory(Store(str(tmp_path / "run"))).read_metrics()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == result.losses
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["unit"] for row in rows} == {"samples"}
    assert {row["amount"] for row in rows} == {8}


class Observer:
    def __init__(self) -> None:
        self.events: list[dagflow.StepEvent] = []

    def on_step(self, event: dagflow.StepEvent) -> None:
        self.events.append(event)


def test_callbacks_hear_of_every_step_in_order(client: Client, tmp_path: Path) -> None:
    of = example()
    observer = Observer()
    heard: list[dagflow.StepEvent] = []
    callbacks = [observer, heard.append]
    result = train(of, batches(of, 5), tmp_path / "run", client=client, callbacks=callbacks)
    assert heard == observer.events
    assert [event.step for event in heard] == [1, 2, 3, 4, 5]
    assert [event.loss for event in heard] == result.losses


def test_a_failing_callback_stops_the_run_where_it_can_be_resumed(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 6)
    whole = train(of, data, tmp_path / "whole", client=client)

    def fail(event: dagflow.StepEvent) -> None:
        if event.step == 4:
            raise RuntimeError("the callback's own")

    with pytest.raises(RuntimeError, match="the callback's own"):
        train(of, data, tmp_path / "run", client=client, snapshot_every=2, callbacks=[fail])
    assert list_snapshots(Store(str(tmp_path / "run")))[-1] in (2, 4)
    assert_same_run(train(of, data, tmp_path / "run", client=client), whole)


def test_each_sample_is_in_the_ledger_once_an_epoch_when_a_later_epoch_is_resumed(
    client: Client, tmp_path: Path
) -> None:
    # A batch is one sample of this dataset.
    of = example()
    samples = batches(of, 10)

    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(samples, batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]

    whole = train(of, loader(), tmp_path / "whole", client=client, epochs=2)
    train(of, loader(), tmp_path / "run", client=client, steps=13)
    resumed = train(of, loader(), tmp_path / "run", client=client, epochs=2)
    assert_same_run(resumed, whole)
    seen = [row["fingerprint"] for row in samples_of(str(tmp_path / "run"))]
    assert Counter(seen) == Counter(2 * [fingerprint(sample) for sample in samples])
    assert seen[:10] != seen[10:]


def test_a_model_that_has_loaded_the_result_goes_on_from_it(client: Client, tmp_path: Path) -> None:
    of, run = example(dropout=True), tmp_path / "run"
    data = batches(of, 6)
    whole = train(of, data, tmp_path / "whole", client=client)
    loaded = Example(copy.deepcopy(of.model), of.batch, of.loss)
    for steps in (2, 4, 6):
        result = train(loaded, data, run, client=client, steps=steps)
        loaded.model.load_state_dict(result.state_dict())
    assert_same_run(result, whole)
    assert_same_run(train(of, data, run, client=client), whole)  # the first weights still do
    with torch.no_grad():
        loaded.model.head.bias[0] += 1e-3
    with pytest.raises(
        dagflow.StoreHoldsAnotherRun, match=r"model\.initial_weights.*newest snapshot"
    ):
        train(loaded, data, run, client=client)


def test_a_resumed_run_that_reads_other_batches_is_refused(client: Client, tmp_path: Path) -> None:
    of = example()
    data = batches(of, 6)
    train(of, data, tmp_path / "run", client=client, steps=4)
    other = [*data[:2], data[3], data[2], *data[4:]]
    with pytest.raises(dagflow.BatchInvalid, match=r"Step 2 \(batch 2 of epoch 0"):
        train(of, other, tmp_path / "run", client=client)
    config = dagflow.Config(force=True)
    assert train(of, other, tmp_path / "run", client=client, config=config).step == 6
