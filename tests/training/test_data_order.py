"""Whoever reads a run's data again, after going back or in a new process, reads the same batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dagflow
from dagflow.training.data import BatchStream
from dagflow.training.generators import doubts, generators_in
from dagflow.training.seen import SeenBatches, fingerprint


def rows(count: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class Noisy(Dataset[Any]):
    """Rows with noise from somewhere."""

    def __init__(self, draw: Callable[[], float], count: int = 10) -> None:
        self.draw = draw
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), self.draw()], dtype=torch.float64)


class HoldsPython(Noisy):
    def __init__(self) -> None:
        self.generator = random.Random(3)
        super().__init__(self.generator.random)


SCRIPTS = random.Random()  # a global variable of the user's script


class DrawsFromTheScripts(Noisy):
    def __init__(self) -> None:
        SCRIPTS.seed(3)
        super().__init__(lambda: 0.0)

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), SCRIPTS.random()])


class Shuffling(IterableDataset[Any]):
    """Shuffles by epoch, as Hugging Face's iterable datasets do."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(self.epoch).permutation(10)
        return iter([torch.tensor([float(i)]) for i in order])


def collate_with_noise() -> Callable[[list[Any]], Any]:
    generator = np.random.default_rng(5)

    def collate(found: list[Any]) -> Any:
        return torch.stack([row for (row,) in found]) + float(generator.random())

    return collate


def sampled(make: Callable[[torch.Generator], Any]) -> DataLoader[Any]:
    return DataLoader(rows(), sampler=make(seeded()))


LOADERS: dict[str, Callable[[], Any]] = {
    "the global generator": lambda: DataLoader(rows(), shuffle=True),
    "a loader's generator": lambda: DataLoader(rows(), shuffle=True, generator=seeded()),
    "batches of three": lambda: DataLoader(rows(), 3, shuffle=True, generator=seeded()),
    "a sampler's": lambda: sampled(lambda g: RandomSampler(rows(), generator=g)),
    "with replacement": lambda: sampled(lambda g: RandomSampler(rows(), True, 10, generator=g)),
    "weights": lambda: sampled(lambda g: WeightedRandomSampler([1.0] * 10, 10, generator=g)),
    "a batch sampler's": lambda: DataLoader(
        rows(), batch_sampler=BatchSampler(RandomSampler(rows(), generator=seeded()), 2, False)
    ),
    "no batching": lambda: DataLoader(rows(), batch_size=None, shuffle=True, generator=seeded()),
    "distributed": lambda: DataLoader(
        rows(), sampler=DistributedSampler(rows(), num_replicas=1, rank=0)
    ),
    "an iterable": lambda: Shuffling(),
    "an iterable's loader": lambda: DataLoader(Shuffling(), batch_size=2),
    "torch": lambda: DataLoader(Noisy(lambda: torch.rand(()).item()), shuffle=True),
    "random": lambda: DataLoader(Noisy(random.random), shuffle=True),
    "NumPy": lambda: DataLoader(Noisy(np.random.standard_normal), shuffle=True),
    "a dataset's own": lambda: DataLoader(ConcatDataset([HoldsPython(), rows(2)]), shuffle=True),
    "NumPy's newer": lambda: DataLoader(Noisy(np.random.default_rng(3).random), shuffle=True),
    "Python's own": lambda: DataLoader(Noisy(random.Random(3).random), shuffle=True),
    "the script's": lambda: DataLoader(DrawsFromTheScripts(), shuffle=True),
    "a collator's": lambda: DataLoader(rows(), 3, collate_fn=collate_with_noise()),
    "without a loader": HoldsPython,
}


def prints(stream: BatchStream, count: int = 10**9) -> list[str]:
    found = []
    while len(found) < count and (batch := stream.take()) is not None:
        found.append(fingerprint(batch))
    return found


@pytest.mark.parametrize("kind", LOADERS)
def test_a_stream_that_goes_back_and_one_in_a_new_process_give_the_undisturbed_order(
    kind: str,
) -> None:
    whole = prints(BatchStream(LOADERS[kind](), 3, 0, None))
    epoch = len(whole) // 3
    assert whole[:epoch] != whole[epoch : 2 * epoch] != whole[2 * epoch :]
    for stop, again in ((2 * epoch + 2, 2 * epoch + 1), (2 * epoch + 1, epoch - 1), (epoch, 1)):
        data = LOADERS[kind]()
        stream = BatchStream(data, 3, 0, None)
        stream.peek()
        assert prints(stream, stop) == whole[:stop]
        seen = SeenBatches()
        seen.learn({"step": k, "samples": {"fingerprint": f}} for k, f in enumerate(whole))
        stream.seek(again, seen)  # a second attempt
        assert prints(stream) == whole[again:]
        same_process = BatchStream(data, 3, 0, None)  # train was called again
        same_process.seek(again, seen)
        assert prints(same_process) == whole[again:]
        torch.rand(1), random.random(), np.random.rand()
        resumed = BatchStream(LOADERS[kind](), 3, 0, None)
        resumed.peek()
        resumed.seek(stop, seen)
        assert resumed.step == stop
        assert prints(resumed) == whole[stop:]


@pytest.mark.parametrize("kind", ["a loader's generator", "a batch sampler's", "weights"])
def test_a_generator_of_the_users_own_gives_the_order_of_a_plain_loop(kind: str) -> None:
    loader = LOADERS[kind]()
    plain = [fingerprint(batch) for _ in range(3) for batch in loader]
    assert prints(BatchStream(LOADERS[kind](), 3, 0, None)) == plain


class HuggingFace(Shuffling):
    """As `datasets.IterableDataset` is used."""

    def with_format(self, kind: str) -> HuggingFace:
        assert kind == "torch"
        return self

    def iter(self, batch_size: int, drop_last_batch: bool) -> Iterator[torch.Tensor]:
        assert drop_last_batch
        rows = torch.stack(list(self))
        return iter(rows.split(batch_size)[: len(rows) // batch_size])


def test_a_hugging_face_dataset_is_told_the_epoch() -> None:
    whole = prints(BatchStream(HuggingFace(), 2, 0, 4))
    assert len(set(whole)) == 4
    resumed = BatchStream(HuggingFace(), 2, 0, 4)
    resumed.seek(3)
    assert prints(resumed) == whole[3:]


def test_ten_samples_stopped_at_step_13_of_20_are_seen_twice_each() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(rows(), shuffle=True, generator=seeded())

    def samples(stream: BatchStream, count: int) -> list[float]:
        return [stream.take()[0].item() for _ in range(count)]  # type: ignore[index]

    first = samples(BatchStream(loader(), 2, 0, None), 13)
    resumed = BatchStream(loader(), 2, 0, None)
    resumed.seek(13)
    rest = samples(resumed, 7)
    assert resumed.take() is None
    assert Counter(first + rest) == Counter({float(i): 2 for i in range(10)})
    assert first[:10] != (first + rest)[10:]


def test_worker_processes_draw_the_same_when_the_data_is_read_again() -> None:
    # One process kept alive over epochs, which would go on drawing; one started anew each time.
    for keep in (True, False):
        loader = DataLoader(
            Noisy(random.random, 3), num_workers=1, persistent_workers=keep, shuffle=True
        )
        stream = BatchStream(loader, 3, 0, None)
        whole = prints(stream)
        stream.seek(4)
        assert prints(stream) == whole[4:]
        assert len(set(whole)) == 9


def test_old_epochs_of_a_loader_are_passed_over_without_reading_their_samples() -> None:
    read: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counted(torch.arange(10.0)), shuffle=True, generator=seeded())
    stream = BatchStream(loader, 5, 0, None)
    stream.seek(43)
    assert (
        len(read) == 10 + 3
    )  # the first epoch, which has been opened, and what is left of the last
    stream.seek(30)
    stream.take()
    assert len(read) == 13 + 1
    assert stream.position == (3, 0)


def test_reading_leaves_everybodys_generators_as_they_were() -> None:
    mine = seeded()
    np.random.standard_normal()  # NumPy keeps the second of a pair
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2:], mine.get_state()
    normal = np.random.RandomState()
    normal.set_state(np.random.get_state())
    data = DataLoader(Noisy(lambda: np.random.rand() + random.random()), 2, True, generator=mine)
    stream = BatchStream(data, 2, 0, None)
    prints(stream, 7)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[2:], mine.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert np.random.standard_normal() == normal.standard_normal()


class Forgetful(IterableDataset[Any]):
    """Counts by itself how often it was read: another order each time."""

    times = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.times += 1
        return iter([torch.tensor([float(i * self.times)]) for i in range(4)])


def test_another_batch_than_before_is_an_error_that_says_which_and_what_to_do() -> None:
    seen = SeenBatches()
    stream = BatchStream(Forgetful(), 2, 0, None)
    for step in range(3):
        seen.check(step, stream.position, stream.take())
    with pytest.raises(
        dagflow.BatchInvalid, match=r"Step 1 \(batch 1 of epoch 0.*set_epoch.*force=True"
    ):
        stream.seek(2, seen)
    regardless = SeenBatches(strict=False)
    regardless.learn([{"step": 1, "samples": {"epoch": 0, "batch": 1, "fingerprint": "00000000"}}])
    stream.seek(1)
    assert regardless.check(1, (0, 1), stream.take()) != "00000000"


def test_a_ledger_without_fingerprints_is_accepted() -> None:
    seen = SeenBatches()
    seen.learn([{"step": 0, "samples": {"epoch": 0, "batch": 0}}])
    seen.learn([{"step": 1, "samples": {"tokens": "there", "seed": 0, "rows": 2}}])
    stream = BatchStream([torch.ones(2), torch.zeros(2)], 1, 0, None)
    stream.seek(2, seen)
    with pytest.raises(dagflow.BatchInvalid):
        seen.check(0, (0, 0), torch.zeros(2))


def test_what_cannot_be_read_again_in_the_same_order_is_said_before_it_is_read() -> None:
    unordered = DataLoader(rows(), num_workers=2, in_order=False)
    said = {
        "iterator": doubts(iter([torch.ones(1)])),
        "SystemRandom": doubts(DataLoader(Noisy(random.SystemRandom().random))),
        "in_order=False": doubts(unordered),
    }
    assert [word in doubt for word, (doubt,) in said.items()] == [True] * 3
    assert [doubts(make()) for make in LOADERS.values()] == [[]] * len(LOADERS)


def test_the_processs_own_generators_are_none_that_data_holds() -> None:
    held = [torch.default_generator, np.random.mtrand._rand, random.random.__self__]
    assert generators_in(held) == []
    assert len(generators_in({"a": [seeded()], "b": HoldsPython()})) == 2
