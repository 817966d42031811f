"""Steps that are taken up wherever they stopped, and weight gradients that are asked for twice."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline
from zoo import Example, build, captured

from dagflow.training.step_inputs import Standing
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.replay import StageProgress, progress, restore
from dagflow_tasks.train.worker_journal import JOURNAL

STAGES = 3


def by_priority(run: InlineRun, graph: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Tasks in the order in which a worker each would begin with them."""
    left = dict(graph)
    while left:
        ready = [k for k, task in left.items() if not set(task.dependencies) & set(left)]
        key = max(ready, key=lambda key: (run.priorities(key), str(key)))
        yield key, left.pop(key)


class Interrupted:
    """A run whose second step stops after some of its tasks, and is taken up again."""

    num_microbatches = 3  # the least that fill all stages

    def __init__(self, name: str) -> None:
        example = build(name)
        self.example: Example = example
        dag = captured(name)
        self.run = run_inline(example, STAGES, 1, self.num_microbatches, dag=dag, journal=1)
        torch.manual_seed(3)
        batches = [example.batch(3) for _ in range(self.num_microbatches)]
        self.inputs = replace(self.run.inputs(1, batches), first=True)

    def execute(self, graph: dict[Any, Any], num_tasks: int | None = None) -> int:
        """Run so many tasks; return how many there were."""
        count = 0
        for key, task in itertools.islice(by_priority(self.run, graph), num_tasks):
            self.run.results[key] = task(self.run.results)
            count += 1
        return count

    def stop_after(self, num_tasks: int | None) -> int:
        return self.execute(self.run.graph.step(self.inputs), num_tasks)

    def go_on(self, lost: int | None = None) -> Mapping[str, torch.Tensor]:
        """Take the step up where every stage stands; return the weights after it."""
        run = self.run
        known = {ref.stage: progress(ref) for ref in run.refs}
        if lost is not None:
            known[lost] = StageProgress(lost, 1)
            lost_ref = run.refs[lost]
            restore(lost_ref, 1, run.records, run.neighbours(lost), (1, 1))
        run.graph = run.graph.again(uuid.uuid4().hex[:8])
        self.execute(run.graph.step(replace(self.inputs, standing=Standing(known))))
        run.finished(self.inputs)
        return run.weights(2)


@pytest.mark.parametrize(
    "name", ["two_branches", "gpt2", pytest.param("resnet", marks=pytest.mark.slow)]
)
def test_a_step_is_taken_up_after_any_of_its_tasks(name: str) -> None:
    whole = Interrupted(name)
    num_tasks = whole.stop_after(None)
    whole.run.finished(whole.inputs)
    wanted = whole.run.weights(2)
    before = CACHE.recomputed
    for stop in range(0, num_tasks, 1 if name == "two_branches" else 5):
        run = Interrupted(name)
        run.stop_after(stop)
        assert_same_bits(run.go_on(), wanted)
        assert run.run.losses == whole.run.losses
    assert CACHE.recomputed == before


@pytest.mark.parametrize("lost", range(STAGES))
def test_a_step_is_taken_up_without_one_of_its_stages(lost: int) -> None:
    whole = Interrupted("two_branches")
    num_tasks = whole.stop_after(None)
    whole.run.finished(whole.inputs)
    wanted = whole.run.weights(2)
    for stop in range(1, num_tasks - STAGES, 4):
        run = Interrupted("two_branches")
        run.stop_after(stop)
        ref = run.run.refs[lost]
        CACHE.begin_again(ref)
        del CACHE.states[ref.key]
        assert JOURNAL.flush(60)
        assert_same_bits(run.go_on(lost), wanted)


def test_weight_gradients_that_are_asked_for_again_are_added_once() -> None:
    once = Interrupted("gpt2")
    once.stop_after(None)
    wanted = once.run.weights(2)
    twice = Interrupted("gpt2")
    results, num_again = twice.run.results, 0
    for key, task in by_priority(twice.run, twice.run.graph.step(twice.inputs)):
        results[key] = task(results)
        if key[0].startswith("weights"):
            again = task(results)
            assert (again.losses, again.place) == (results[key].losses, results[key].place)
            num_again += 1
    assert num_again == 2 * twice.num_microbatches
    assert_same_bits(twice.run.weights(2), wanted)


def test_weight_gradients_without_what_the_input_gradients_left_make_both() -> None:
    whole = Interrupted("gpt2")
    whole.stop_after(None)
    wanted = whole.run.weights(2)
    alone = Interrupted("gpt2")
    before = CACHE.recomputed
    for key, task in by_priority(alone.run, alone.run.graph.step(alone.inputs)):
        if key[0].startswith("weights"):
            assert CACHE.take_graph(alone.run.refs[key[2]], key[1], key[3]) is not None
        alone.run.results[key] = task(alone.run.results)
    assert CACHE.recomputed == before + 2 * alone.num_microbatches
    assert_same_bits(alone.run.weights(2), wanted)
