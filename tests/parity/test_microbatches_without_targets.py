"""Micro-batches, and parts of a loss, of which nothing counts; however the model is cut."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits
from torch.nn.functional import cross_entropy
from zoo import Example, build, capture_example, without_dropout

from dagflow.graph.dag import OperatorDag
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.plan.partition import partition, partition_by_operator
from dagflow.training.feed import split_batch
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.optimizer import Optimizer
from dagflow_tasks.train.replay import StepRecord, restore
from dagflow_tasks.train.worker_journal import JOURNAL

# Of five micro-batches the first, one in between and the last have no target.
WEIGHTS = [0.0, 0.5, 0.0, 0.5, 0.0]
STEPS = 3


def steps_of(example: Example) -> list[list[Any]]:
    torch.manual_seed(2)
    steps = []
    for _ in range(STEPS):
        parts = [example.batch(3) for _ in WEIGHTS]
        for (_, target), weight in zip(parts, WEIGHTS, strict=True):
            if not weight:
                target[:] = -100
        steps.append(parts)
    return steps


def example() -> tuple[Example, OperatorDag]:
    found = build("two_branches")
    without_dropout(found.model)
    return found, capture_example(found)


def trained(of: Example, dag: OperatorDag, num_stages: int | None, journal: int = 0) -> InlineRun:
    CACHE.clear()
    cut = partition_by_operator(dag) if num_stages is None else partition(dag, num_stages)
    run = InlineRun(
        of, dag, cut, num_microbatches=len(WEIGHTS), optimizer=Optimizer("Adam", lr=0.01),
        journal=journal,
    )  # fmt: skip
    for step, parts in enumerate(steps_of(of)):
        run.step(step, parts, WEIGHTS)
    return run


def test_they_leave_loss_and_weights_as_if_they_were_not_there() -> None:
    of, dag = example()
    model = copy.deepcopy(of.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wanted = []
    for parts in steps_of(of):
        counted = [part for part, weight in zip(parts, WEIGHTS, strict=True) if weight]
        losses = [Example(model, of.batch, of.loss).eager_loss(part) for part in counted]
        (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(sum(loss.item() for loss in losses) / len(losses))
    run = trained(of, dag, 1)
    assert run.losses == pytest.approx(wanted, rel=1e-6)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(run.weights(STEPS)[name], tensor, rtol=1e-5, atol=1e-6)


def rebuilt(run: InlineRun) -> dict[str, torch.Tensor]:
    """Lose all stages, and return their parameters when each has been rebuilt alone."""
    assert JOURNAL.flush(60)
    CACHE.clear()
    JOURNAL.forget(run.refs[0].run_id)
    found: dict[str, torch.Tensor] = {}
    for stage, ref in enumerate(run.refs):
        restore(ref, STEPS, run.records, run.neighbours(stage))
        found |= CACHE.states[ref.key].parameters
    return found


def test_every_cut_and_every_rebuilding_has_the_same_bits() -> None:
    of, dag = example()
    whole = trained(of, dag, 1)
    weights = whole.weights(STEPS)
    for num_stages in (2, 3, None):
        run = trained(of, dag, num_stages, journal=1 if num_stages == 3 else 0)
        assert run.losses == whole.losses
        assert_same_bits(run.weights(STEPS), weights)
        if num_stages == 3:
            assert_same_bits(rebuilt(run), weights)


def of_two_counts(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, target) + 0.1 * output.logsumexp(-1).square().mean()


def test_parts_of_a_loss_have_counts_of_their_own_in_every_cut_and_rebuilding() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    of = Example(
        model, lambda rows: (torch.randn(rows, 6), torch.randint(0, 5, (rows,))), of_two_counts
    )
    shares = LossWeights(capture_example(of))
    torch.manual_seed(2)
    steps = [of.batch(9) for _ in range(STEPS)]
    for _, target in steps:
        target[1:6] = -100  # of three micro-batches' targets one is left, none, and all
    model, wanted = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in steps:
        optimizer.zero_grad()
        loss = Example(model, of.batch, of.loss).eager_loss(batch)
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    expected = {n: p.detach() for n, p in model.named_parameters()}
    results = []
    for num_stages in (1, None):
        CACHE.clear()
        cut = partition(shares.dag, num_stages) if num_stages else partition_by_operator(shares.dag)
        run = InlineRun(
            of, shares.dag, cut, num_microbatches=3, optimizer=Optimizer("SGD", lr=0.1), journal=1
        )
        for step, batch in enumerate(steps):
            _, microbatches = split_batch(shares.dag, batch, step, 3, shares)
            parts = [tuple(tensor[3 * m : 3 * m + 3] for tensor in batch) for m in range(3)]
            weights, terms = zip(*((m.weight, m.numbers) for m in microbatches), strict=True)
            assert weights == (1.0, 1.0, 1.0)
            assert [dict(of_part)["w.0"] for of_part in terms] == [0.25, 0.0, 0.75]
            run.step(step, parts, weights, terms)
        assert [StepRecord.from_json(record.to_json()) for record in run.records] == run.records
        results.append(rebuilt(run))
        assert run.losses == pytest.approx(wanted, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-4, atol=1e-6)
    for found in results[1:]:
        assert_same_bits(found, results[0])


def test_a_step_without_any_target_changes_nothing() -> None:
    of, dag = example()
    CACHE.clear()
    run = InlineRun(of, dag, partition(dag, 2), optimizer=Optimizer("Adam", lr=0.01), clip_norm=1.0)
    parts = [of.batch(3) for _ in range(2)]
    run.step(0, parts)
    before = run.weights(1)
    for _, target in parts:
        target[:] = -100
    run.step(1, parts, [0.0, 0.0])
    assert run.losses[1] == 0.0
    assert math.isfinite(run.losses[0])
    assert_same_bits(run.weights(2), before)
