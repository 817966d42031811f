"""What a run makes sure of before its first step, and batches that need care later on."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import Client
from small import assert_same_run, batches, example, train, train_with_torch
from zoo import Example, TwoBranches

import dagflow

Refused = Callable[..., Any]


def contrastive(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)))


# Of `len`, which is what such losses are written with.
@pytest.mark.filterwarnings("ignore:The size of .* is fixed:UserWarning")
def test_a_loss_over_the_whole_batch_is_refused_before_anything_is_written(
    refused: Refused, client: Client, tmp_path: Path
) -> None:
    of = Example(example().model, example().batch, contrastive)
    with refused(dagflow.errors.ResultsDiffer, "add up to", "num_microbatches=1"):
        train(of, batches(of, 2), tmp_path / "run", client=client)
    assert not list(tmp_path.rglob("*.json"))
    whole = train(of, batches(of, 2), tmp_path / "run", client=client, num_microbatches=1)
    assert whole.losses == pytest.approx(train_with_torch(of, batches(of, 2))[0], rel=1e-5)


def test_the_check_tells_what_it_found_and_can_be_turned_off(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of = example(dropout=True)
    data = batches(of, 2)
    checked = train(of, data, tmp_path / "checked", client=client, progress=True)
    assert checked.check.exact
    assert checked.check.num_gradients == 20
    assert checked.check.seconds > 0
    assert "loss and 20 gradients are the same to the bit" in capfd.readouterr().err
    config = dagflow.Config(check=False)
    unchecked = train(of, data, tmp_path / "unchecked", client=client, config=config)
    assert unchecked.check.skipped == "the check is turned off"
    assert_same_run(unchecked, checked)


def test_a_batch_of_one_row_ends_an_epoch_and_not_the_run(client: Client, tmp_path: Path) -> None:
    of = example()
    data = [*batches(of, 2), *batches(of, 1, rows=1), *batches(of, 1, seed=4)]
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "two", client=client, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    assert_same_run(train(of, data, tmp_path / "one", client=client, num_stages=1), result)
    part = train(of, data, tmp_path / "part", client=client, num_stages=2, steps=2)
    assert part.step == 2
    assert_same_run(train(of, data, tmp_path / "part", client=client, num_stages=2), result)


@pytest.mark.slow
def test_a_first_batch_of_one_row_leaves_the_number_of_rows_open(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = [*batches(of, 1, rows=1), *batches(of, 1)]
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client)
    assert result.losses == pytest.approx(wanted, rel=1e-6)


def test_batches_and_microbatches_without_targets_do_not_end_a_run(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 4)
    data[1][1][2:4] = -100  # the second of four micro-batches
    data[2][1][:] = -100
    counted = [data[0], data[1], data[3]]
    wanted, weights = train_with_torch(of, counted)
    result = train(of, data, tmp_path / "two", client=client, num_stages=2)
    assert result.losses == pytest.approx([*wanted[:2], 0.0, wanted[2]], rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(result.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert_same_run(train(of, data, tmp_path / "one", client=client, num_stages=1), result)


def of_two_counts(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A mean over the targets that count, each by how often the batch has it, and one over all rows."""
    often = torch.nn.functional.one_hot(target.clamp(min=0), output.shape[1]).sum(0)
    loss = torch.nn.functional.cross_entropy(output, target, 1 / often.clamp(min=1))
    return loss + 0.1 * output.logsumexp(-1).square().mean()


def test_parts_of_a_loss_with_counts_of_their_own_train_like_torch_and_are_rebuilt(
    client: Client, tmp_path: Path
) -> None:
    of = Example(example().model, example().batch, of_two_counts)
    data = batches(of, 4)
    for number, (_, target) in enumerate(data):
        target[: 2 * number + 1] = -100
    wanted, weights = train_with_torch(of, data)
    result = train(of, data, tmp_path / "two", client=client, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=1e-5)
    for name, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)
    # The first part's steps are in the ledger, and replayed from the journal.
    part = tmp_path / "part"
    train(of, data, part, client=client, num_stages=2, steps=3)
    for step in (1, 2, 3):
        shutil.rmtree(part / "snapshots" / f"step-{step:08d}", ignore_errors=True)
    assert_same_run(train(of, data, part, client=client, num_stages=2), result)


@pytest.mark.slow
def test_a_sum_is_added_up(client: Client, tmp_path: Path) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, target, reduction="sum")

    of = Example(example().model, example().batch, loss)
    data = batches(of, 3, rows=10)
    wanted, _ = train_with_torch(of, data)
    assert train(of, data, tmp_path / "run", client=client).losses == pytest.approx(
        wanted, rel=1e-5
    )


def test_nothing_to_train_is_refused(refused: Refused, client: Client, tmp_path: Path) -> None:
    of = example()
    of.model.requires_grad_(False)
    with refused(dagflow.SettingsInvalid, "All 20 parameters", "frozen"):
        train(of, batches(of, 1), tmp_path / "run", client=client)

    class Detached(TwoBranches):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return super().forward(features).detach()

    of = Example(Detached(), of.batch, of.loss)
    with refused(dagflow.SettingsInvalid, "depends on none of the 20 parameters"):
        train(of, batches(of, 1), tmp_path / "run", client=client)

    class InAList(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [TwoBranches()]

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.layers[0](features)

    of = Example(InAList(), of.batch, of.loss)
    with refused(dagflow.SettingsInvalid, "no parameters", "plain list", "nn.ModuleList"):
        train(of, batches(of, 1), tmp_path / "run", client=client)


def test_a_skipped_update_does_not_move_the_schedule(client: Client, tmp_path: Path) -> None:
    of = example()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        entropy = torch.nn.functional.cross_entropy(output, target)
        return 64.0 * entropy - 63.0 * entropy.detach()

    of = Example(of.model, of.batch, loss)
    data = batches(of, 8)
    schedule = dagflow.Schedule("linear", warmup_steps=3)
    options: dict[str, Any] = {"client": client, "precision": "fp16", "schedule": schedule}
    heard: list[dagflow.StepEvent] = []
    whole = train(of, data, tmp_path / "whole", callbacks=[heard.append], **options)
    applied = 0
    for event in heard:
        factor = dagflow.Schedule("linear", 3, 8).factor(applied)
        assert event.learning_rate_factor == factor
        applied += math.isfinite(event.gradient_norm or 0.0)
    assert applied < 8
    for steps in (3, 8):
        schedule = dagflow.Schedule("linear", 3, 8)
        part = train(of, data, tmp_path / "part", steps=steps, **{**options, "schedule": schedule})
    assert_same_run(part, whole)


@pytest.mark.slow
def test_several_threads_train_at_once(client: Client, tmp_path: Path) -> None:
    of = example(dropout=True)
    data = batches(of, 2)
    wanted = train(of, data, tmp_path / "alone", client=client)
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        found[number] = train(of, data, tmp_path / str(number), client=client)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert_same_run(found[number], wanted)


SCRIPT = """
import torch, dagflow
model = torch.nn.Linear(4, 2)
data = [(torch.randn(4, 4), torch.randn(4, 2))]
dagflow.train(model, data, loss=torch.nn.functional.mse_loss, store="run")
"""


@pytest.mark.slow
def test_a_script_that_does_not_ask_for_its_name_ends_in_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"{script}, line 5: worker processes import the script" in last
    assert "if __name__ == '__main__':" in last
    assert done.stderr.count("Traceback") == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begin < 60


class Tower(torch.nn.Module):
    """Attention in each image, over one row of all images' patches (P, 8) and a grid (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> SimpleNamespace:
        parts = self.first(patches).split(grid_thw.prod(1).tolist())
        h = torch.cat([(part @ part.T).softmax(-1) @ part for part in parts])
        return SimpleNamespace(loss=self.second(h).square().mean())


@pytest.mark.filterwarnings("ignore:Forward decides by the numbers in 'grid_thw':UserWarning")
def test_rows_of_patches_beside_a_grid_of_images_train_like_torch(
    refused: Refused, client: Client, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    grid = torch.tensor([[1, 2, 4], [1, 3, 2]])
    data = [{"patches": torch.randn(14, 8), "grid_thw": grid} for _ in range(3)]
    of = Example(Tower(), lambda rows: data[0], None)
    wanted, _ = train_with_torch(of, data)
    whole = {"client": client, "num_microbatches": 1}
    result = train(of, data, tmp_path / "two", **whole, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    assert_same_run(train(of, data, tmp_path / "one", **whole, num_stages=1), result)
    with refused(dagflow.errors.BatchInvalid, "patches", "num_microbatches=1"):
        train(of, data, tmp_path / "split", client=client)
    data[2] = {**data[2], "grid_thw": grid.flip(0)}
    with pytest.raises(dagflow.errors.BatchInvalid, match=r"'grid_thw' of step 2 holds.*one size"):
        train(of, data, tmp_path / "other", **whole)
