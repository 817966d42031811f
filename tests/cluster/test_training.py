"""Training on worker processes is training with a plain torch loop."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from local import wait_until_forgotten
from small import LR, assert_same_run, batches, example, train, train_with_torch
from zoo import Example, normed

import dagflow

OPTIMIZERS = {
    "sgd": dagflow.Optimizer("SGD", lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": dagflow.Optimizer("Adagrad", lr=0.05),
    "adam": dagflow.Optimizer("Adam", lr=LR, weight_decay=0.01),
}


# The same bits in every cut are other tests'.
@pytest.mark.parametrize(
    "num_stages", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3]
)
def test_twenty_losses_are_those_of_a_torch_loop(
    client: Client, tmp_path: Path, num_stages: int
) -> None:
    of = example()
    data = batches(of, 20)
    wanted, weights = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client, num_stages=num_stages)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    assert result.step == 20
    assert result.plan.num_stages == num_stages
    found = result.state_dict()
    assert sorted(found) == sorted(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_tied_gpt2_has_torchs_losses_and_loads_back(client: Client, tmp_path: Path) -> None:
    of = example("gpt2")
    data = batches(of, 8)
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    state = result.state_dict()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    of.model.load_state_dict(state, strict=True)
    assert of.model.lm_head.weight is of.model.transformer.wte.weight


def test_unevenly_padded_labels_average_over_the_counted_tokens(
    client: Client, tmp_path: Path
) -> None:
    of = example("gpt2")
    data = batches(of, 4)
    for step, batch in enumerate(data):
        labels = batch["labels"].clone()
        for row in range(len(labels)):
            labels[row, 2 + (5 * row + step) % 10 :] = -100
        batch["labels"] = labels
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client, num_stages=2)
    assert result.losses == pytest.approx(wanted, rel=1e-6)


def test_dropout_runs_have_the_same_bits_every_time_and_in_every_cut(
    client: Client, tmp_path: Path
) -> None:
    of = example(dropout=True)
    data = batches(of, 5)
    first = train(of, data, tmp_path / "two", client=client, num_stages=2)
    ahead = dagflow.Config(lookahead_steps=5, in_flight_slack=2)
    split = dagflow.Config(split_points=["left.2", "right.1", "head"])
    for name, options in {
        "one": {"num_stages": 1},
        "three": {"num_stages": 3},
        "four": {"config": split},
        "again": {"num_stages": 2, "config": ahead},
    }.items():
        again = train(of, data, tmp_path / name, client=client, **options)
        assert_same_run(again, first)
    other = train(of, data, tmp_path / "seed", client=client, seed=1)
    assert other.losses != first.losses


def test_every_operator_as_a_task_gives_the_same_bits(client: Client, tmp_path: Path) -> None:
    of = example(dropout=True)
    data = batches(of, 2)
    wanted = train(of, data, tmp_path / "stages", client=client, num_microbatches=2)
    config = dagflow.Config(granularity="operator")
    found = train(
        of, data, tmp_path / "operators", client=client, num_microbatches=2, config=config
    )
    assert found.plan.num_stages > 20
    assert_same_run(found, wanted)


def test_batch_norms_statistics_follow_the_microbatches(client: Client, tmp_path: Path) -> None:
    of = normed()
    data = batches(of, 4)
    wanted, weights = train_with_torch(of, data)
    whole = train(of, data, tmp_path / "whole", client=client, num_microbatches=1, num_stages=2)
    assert whole.losses == pytest.approx(wanted, rel=1e-5)
    found = whole.state_dict()
    assert sorted(found) == sorted(weights)
    for name in [name for name in weights if "running" in name or "num_batches" in name]:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=1e-5)
    split = train(of, data, tmp_path / "two", client=client, num_stages=2)
    counts = {n: int(t) for n, t in split.state_dict().items() if n.endswith("num_batches_tracked")}
    assert set(counts.values()) == {16}
    assert_same_run(train(of, data, tmp_path / "four", client=client, num_stages=4), split)
    of.model.load_state_dict(split.state_dict(), strict=True)


@pytest.mark.parametrize("rows", [3, 10])
def test_batches_that_microbatches_do_not_divide_keep_their_mean(
    client: Client, tmp_path: Path, rows: int
) -> None:
    of = example()
    data = batches(of, 3, rows=rows)
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client, num_microbatches=4)
    assert result.losses == pytest.approx(wanted, rel=1e-6)


def test_batches_of_different_sizes_train_one_after_the_other(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = [batches(of, 1, rows=rows, seed=rows)[0] for rows in (8, 5, 12, 2, 8)]
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client)
    assert result.losses == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers_are_torchs(client: Client, tmp_path: Path, name: str) -> None:
    of = example()
    data = batches(of, 5)
    optimizer = OPTIMIZERS[name]

    def make(parameters: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, optimizer.name)(
            parameters, **optimizer.options
        )
        return made

    wanted, _ = train_with_torch(of, data, make=make)
    result = train(of, data, tmp_path / "run", client=client, optimizer=optimizer)
    assert result.losses == pytest.approx(wanted, rel=2e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_and_clipping_are_torchs(client: Client, tmp_path: Path, kind: Any) -> None:
    of = example()
    data = batches(of, 10)

    def factor(step: int) -> float:
        if step < 3:
            return (step + 1) / 3
        progress = min(1.0, (step - 3) / 7)
        return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress

    events: list[dagflow.StepEvent] = []
    wanted, _ = train_with_torch(of, data, factor=factor, clip_norm=0.1)
    result = train(
        of,
        data,
        tmp_path / "run",
        client=client,
        schedule=dagflow.Schedule(kind, warmup_steps=3),
        clip_grad_norm=0.1,
        callbacks=[events.append],
    )
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    assert [e.learning_rate_factor for e in events] == pytest.approx([factor(k) for k in range(10)])
    assert min(e.gradient_norm or 0.0 for e in events) > 0.1
    unclipped, _ = train_with_torch(of, data, factor=factor)
    assert result.losses != pytest.approx(unclipped, rel=1e-6)


def test_bf16_is_close_to_autocast_and_the_same_in_every_cut(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    data = batches(of, 5)
    wanted, _ = train_with_torch(of, data, autocast=torch.bfloat16)
    full, _ = train_with_torch(of, data)
    found = train(of, data, tmp_path / "two", client=client, precision="bf16", num_stages=2)
    assert found.losses == pytest.approx(wanted, rel=5e-3)
    assert found.losses != pytest.approx(full, rel=1e-6)
    assert all(t.dtype == torch.float32 for t in found.state_dict().values())
    again = train(of, data, tmp_path / "four", client=client, precision="bf16", num_stages=4)
    assert_same_run(again, found)


def frozen_and_unused() -> Example:
    of = example()
    for parameter in of.model.left.parameters():
        parameter.requires_grad_(False)
    of.model.register_parameter("spare", torch.nn.Parameter(torch.arange(3.0)))
    of.model.register_buffer("note", torch.tensor([7, 8], dtype=torch.int64))
    of.model.register_buffer("narrow", torch.ones(2, dtype=torch.bfloat16))
    of.model.register_buffer("scratch", torch.zeros(2), persistent=False)
    return of


def test_frozen_and_unused_tensors_come_back_as_they_were(client: Client, tmp_path: Path) -> None:
    of = frozen_and_unused()
    data = batches(of, 6)
    wanted, _ = train_with_torch(of, data)
    result = train(of, data, tmp_path / "run", client=client, num_stages=2, snapshot_every=2)
    assert result.losses == pytest.approx(wanted, rel=1e-6)
    before, after = of.model.state_dict(), result.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {n for n in before if n.startswith(("left", "spare", "note", "narrow"))}
    assert list(after) == list(before)
    assert after["narrow"].dtype == torch.bfloat16
    of.model.load_state_dict(after, strict=True)


def test_the_users_model_is_left_as_it_was(client: Client, tmp_path: Path) -> None:
    of = example(dropout=True)
    of.model.left.eval()
    before = copy.deepcopy(of.model.state_dict())
    train(of, batches(of, 2), tmp_path / "run", client=client)
    assert {n for n, m in of.model.named_modules() if not m.training} == {
        n for n, _ in of.model.named_modules() if n.startswith("left")
    }
    assert all(torch.equal(before[name], t) for name, t in of.model.state_dict().items())
    assert all(parameter.grad is None for parameter in of.model.parameters())


def test_a_callback_that_keeps_its_traceback_keeps_no_task(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    """A traceback keeps the frames of all callers, and these keep what they name."""
    kept = []

    def callback(event: dagflow.StepEvent) -> None:
        try:
            raise LookupError(event.step)
        except LookupError as error:
            kept.append(error)

    of = example()
    train(of, batches(of, 3), tmp_path / "run", client=client, callbacks=[callback])
    assert len(kept) == 3
    wait_until_forgotten(cluster)
