"""Second halves of backwards that are done ahead, and steps that are taken up wherever they stopped."""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline
from zoo import Example, build, captured

from dagflow.training.step_inputs import Standing
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.train.cache import CACHE
from dagflow_tasks.train.gradient_sums import SUMS
from dagflow_tasks.train.replay import StageProgress, progress, restore
from dagflow_tasks.train.worker_journal import JOURNAL

STAGES, MICROBATCHES = 3, 4

Work = Callable[[], None]


@pytest.fixture
def waiting() -> Iterator[deque[Work]]:
    """What the worker's thread would run next; the test runs it."""
    queue: deque[Work] = deque()
    CACHE.run_next = queue.append
    yield queue
    CACHE.run_next = None


def run_all(waiting: deque[Work]) -> int:
    count = len(waiting)
    while waiting:
        waiting.popleft()()
    return count


def train(
    name: str, before_task: Callable[[InlineRun], None] = lambda run: None, **options: Any
) -> tuple[InlineRun, Mapping[str, torch.Tensor]]:
    options = {"dag": captured(name), "before_task": before_task, **options}
    run = run_inline(build(name), STAGES, 2, MICROBATCHES, **options)
    return run, run.weights(2)


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm"])
def test_work_done_ahead_changes_no_bit_and_is_not_done_again(
    name: str, waiting: deque[Work]
) -> None:
    done = []
    asked, wanted = train(name)
    waiting.clear()
    before = CACHE.recomputed
    run, weights = train(name, lambda run: done.append(run_all(waiting)))
    assert run.losses == asked.losses
    assert_same_bits(weights, wanted)
    assert CACHE.recomputed == before
    halved = [stage for stage, is_halved in enumerate(run.graph.halved) if is_halved]
    assert halved
    # All but those in flight after a stage's last forward, in each of two steps.
    assert sum(done) == 2 * sum(MICROBATCHES - run.graph.limits[stage] for stage in halved)
    assert CACHE.graphs == {}


def test_sums_have_what_was_done_ahead_before_it_is_asked_for(waiting: deque[Work]) -> None:
    seen: list[bool] = []

    def look(run: InlineRun) -> None:
        while waiting:
            work = waiting.popleft()
            work()
            ref, (step, index) = work.args  # type: ignore[attr-defined]
            place, sums = CACHE.newest(ref, SUMS)
            if index > 0:
                assert place == (step, index - 1)
                seen.append(sums.place == (step, index))

    train("gpt2", look)
    assert len(seen) == 2 * (1 + 2)  # stages 1 and 2, all but a step's first and last micro-batches
    assert all(seen)


def test_work_ahead_of_a_cache_that_is_emptied_does_nothing(waiting: deque[Work]) -> None:
    train("gpt2")
    late = list(waiting)
    assert late
    CACHE.clear()
    for work in late:
        work()
    assert (CACHE.graphs, CACHE.kept) == ({}, {})


def test_work_that_fails_ahead_fails_in_the_task_that_asks_for_it(
    waiting: deque[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("in work ahead")

    def break_one(run: InlineRun) -> None:
        for work in [w for w in waiting if w.args[1] == (0, 1)]:  # type: ignore[attr-defined]
            with monkeypatch.context() as patched:
                patched.setattr(WeightGradients, "finish", fail)
                work()
            assert progress(work.args[0]).step == -1  # type: ignore[attr-defined]
        run_all(waiting)

    with pytest.raises(MemoryError, match="in work ahead"):
        train("gpt2", break_one)


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

    def __init__(self, name: str, waiting: deque[Work]) -> None:
        self.waiting = waiting
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
            run_all(self.waiting)
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
def test_a_step_is_taken_up_after_any_of_its_tasks(name: str, waiting: deque[Work]) -> None:
    whole = Interrupted(name, waiting)
    num_tasks = whole.stop_after(None)
    whole.run.finished(whole.inputs)
    wanted = whole.run.weights(2)
    before = CACHE.recomputed
    for stop in range(0, num_tasks, 1 if name == "two_branches" else 5):
        run = Interrupted(name, waiting)
        run.stop_after(stop)
        assert_same_bits(run.go_on(), wanted)
        assert run.run.losses == whole.run.losses
    assert CACHE.recomputed == before


@pytest.mark.parametrize("lost", range(STAGES))
def test_a_step_is_taken_up_without_one_of_its_stages(lost: int, waiting: deque[Work]) -> None:
    whole = Interrupted("two_branches", waiting)
    num_tasks = whole.stop_after(None)
    whole.run.finished(whole.inputs)
    wanted = whole.run.weights(2)
    for stop in range(1, num_tasks - STAGES, 4):
        run = Interrupted("two_branches", waiting)
        run.stop_after(stop)
        ref = run.run.refs[lost]
        CACHE.begin_again(ref)
        del CACHE.states[ref.key]
        assert JOURNAL.flush(60)
        assert_same_bits(run.go_on(lost), wanted)
