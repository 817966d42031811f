"""A micro-batch whose targets are all ignored counts nothing, however the model is cut."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits
from zoo import Example, build, capture_example, without_dropout

from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import partition, partition_by_operator
from dagflow_tasks.cache import CACHE
from dagflow_tasks.journal import JOURNAL
from dagflow_tasks.optimizer import Optimizer
from dagflow_tasks.replay import restore

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


def test_every_cut_and_every_rebuilding_has_the_same_bits() -> None:
    of, dag = example()
    whole = trained(of, dag, 1)
    weights = whole.weights(STEPS)
    for num_stages in (2, 3, None):
        run = trained(of, dag, num_stages, journal=1 if num_stages == 3 else 0)
        assert run.losses == whole.losses
        assert_same_bits(run.weights(STEPS), weights)
        if num_stages == 3:
            assert JOURNAL.flush(60)
            CACHE.clear()
            JOURNAL.forget(run.refs[0].run_id)
            for stage in range(3):
                restore(run.refs[stage], STEPS, run.records, run.neighbours(stage))
            assert_same_bits(
                {
                    n: t
                    for s in range(3)
                    for n, t in CACHE.states[run.refs[s].key].parameters.items()
                },
                weights,
            )


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
