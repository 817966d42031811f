"""A worker's memory is only a cache: every task gives the same result without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from inline import InlineRun, assert_same_bits, run_inline, save_now
from torch.nn.functional import mse_loss
from zoo import Example, build, captured

from dagflow_storage import commit_snapshot
from dagflow_tasks.errors import StateLost
from dagflow_tasks.program.weight_gradients import WeightGradients
from dagflow_tasks.train import exchange
from dagflow_tasks.train import update as updating
from dagflow_tasks.train.arguments import UpdateArguments
from dagflow_tasks.train.cache import CACHE, SavedGraph
from dagflow_tasks.train.references import StateRef
from dagflow_tasks.train.results import BackwardResult, ForwardResult
from dagflow_tasks.train.state import StageState
from dagflow_tasks.train.worker_journal import JOURNAL, EntryKey

STEPS, STAGES, MICROBATCHES = 2, 3, 3


class Amnesia:
    """Empties the cache before every task, once what only the cache holds is in the store."""

    def __init__(self) -> None:
        self.step = 1
        self.shards: dict[int, Any] = {}

    def __call__(self, run: InlineRun) -> None:
        for ref in run.refs:
            state = CACHE.states.get(ref.key)
            if state is not None and state.step == self.step:
                self.shards[ref.stage] = save_now(ref, self.step)
        if len(self.shards) == len(run.refs):
            commit_snapshot(run.store, self.step, list(self.shards.values()), {})
            self.step, self.shards = self.step + 1, {}
        CACHE.clear()


@dataclass(frozen=True)
class Trained:
    run: InlineRun
    weights: dict[str, torch.Tensor]
    recomputed: int


def train(name: str, before_task: Callable[[InlineRun], None]) -> Trained:
    before = CACHE.recomputed
    run = run_inline(
        build(name), STAGES, STEPS, MICROBATCHES, dag=captured(name), before_task=before_task
    )
    recomputed = CACHE.recomputed - before
    return Trained(run, run.weights(STEPS), recomputed)


def remember(run: InlineRun) -> None:
    """Leave the cache alone."""


def tensors_of(result: Any) -> dict[str, torch.Tensor]:
    if isinstance(result, ForwardResult):
        return {**result.values, **(result.buffers or {})}
    if isinstance(result, BackwardResult):
        sums = result.sums.tensors if result.sums else {}
        return {**result.gradients, **sums, **(result.buffers or {})}
    return dict(result) if isinstance(result, dict) else {}


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm"])
def test_every_task_gives_the_same_result_with_an_emptied_cache(name: str) -> None:
    warm, cold = train(name, remember), train(name, Amnesia())
    assert cold.run.losses == warm.run.losses
    assert_same_bits(cold.weights, warm.weights)
    warm_results = {(k[0].partition("-")[0], *k[1:]): r for k, r in warm.run.results.items()}
    cold_results = {(k[0].partition("-")[0], *k[1:]): r for k, r in cold.run.results.items()}
    assert sorted(map(str, cold_results)) == sorted(map(str, warm_results))
    for key, result in warm_results.items():
        assert_same_bits(tensors_of(cold_results[key]), tensors_of(result))


def test_a_warm_cache_recomputes_nothing() -> None:
    assert train("gpt2", remember).recomputed == 0


def test_an_emptied_cache_recomputes_a_forward_for_each_backward_and_each_half() -> None:
    trained = train("gpt2", Amnesia())
    kinds = Counter((str(key[0]).partition("-")[0], key[2]) for key in trained.run.results)
    whole_with_forward = MICROBATCHES  # the last stage's backwards run their forward themselves
    halves = [kinds["weights", stage] for stage in range(STAGES)]
    assert halves == [0, STEPS * MICROBATCHES, STEPS * MICROBATCHES]
    backwards = sum(kinds["backward", stage] for stage in range(STAGES))
    assert trained.recomputed == backwards - STEPS * whole_with_forward + sum(halves)


def test_a_graph_serves_one_backward() -> None:
    train("two_branches", remember)
    assert CACHE.graphs == {}


def state_of(run: InlineRun, stage: int) -> tuple[int, dict[str, torch.Tensor]]:
    state: StageState = CACHE.states[run.refs[stage].key]
    tensors = {name: tensor.detach().clone() for name, tensor in state.parameters.items()}
    tensors |= {f"buffer {name}": tensor.clone() for name, tensor in state.buffers.items()}
    return state.step, tensors


def run_last_update_again(run: InlineRun, stage: int) -> Any:
    step = STEPS - 1
    there = run.there(step, stage, MICROBATCHES - 1)
    gradients = run.sums(step, stage, MICROBATCHES - 1)
    last = there if there.buffers is not None else None
    return updating.update(UpdateArguments(run.refs[stage], step, gradients, 1.0, last=last))


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_an_update_that_runs_twice_changes_nothing_the_second_time(name: str) -> None:
    run = train(name, remember).run
    before = state_of(run, 1)
    assert before[0] == STEPS
    again = run_last_update_again(run, 1)
    assert again == run.results[run.graph.key("update", STEPS - 1, 1)]
    after = state_of(run, 1)
    assert after[0] == before[0]
    assert_same_bits(after[1], before[1])


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_an_update_on_another_worker_makes_the_same_state(name: str) -> None:
    run = train(name, Amnesia()).run
    before = state_of(run, 1)
    CACHE.clear()
    run_last_update_again(run, 1)
    after = state_of(run, 1)
    assert after[0] == before[0]
    assert_same_bits(after[1], before[1])


def test_lent_parameters_stay_those_of_their_step_when_the_owner_moves_on() -> None:
    run = train("gpt2", remember).run
    names = ["transformer.wte.weight"]
    (lent,) = (r for key, r in run.results.items() if key[0].startswith("lend") and key[1] == 0)
    initial = dict(build("gpt2").model.named_parameters())
    assert_same_bits(lent, {name: initial[name].detach() for name in names})


class SharedView(torch.nn.Module):
    """Reads a view of one weight in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        turned = self.weight.t()
        return torch.tanh(features @ turned) @ turned


def test_a_boundary_value_that_views_a_weight_does_not_move_with_it() -> None:
    example = Example(SharedView(), lambda rows: (torch.randn(rows, 8),) * 2, mse_loss)
    run = run_inline(example, None, 1, 1)
    (view,) = run.there(0, 0, 0).values.values()
    assert run.cut[0].nodes[0].op == "aten.t.default"
    assert torch.equal(view, example.model.weight.detach().t())


def test_weights_neither_cached_nor_stored_are_reported_as_lost() -> None:
    run = train("two_branches", remember).run
    CACHE.clear()
    with pytest.raises(StateLost, match=r"stage 1 after step 1 .* complete are: \[0, 2\]"):
        exchange.lend_parameters(run.refs[1], StateRef(1), [])


def test_an_update_that_fails_leaves_no_half_updated_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train("two_branches", Amnesia()).run
    key, wanted = run.refs[1].key, state_of(run, 1)[1]
    CACHE.clear()
    steps = torch.optim.AdamW.step

    def fail(self: torch.optim.AdamW) -> None:
        steps(self)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(MemoryError):
            run_last_update_again(run, 1)
    assert key not in CACHE.states
    run_last_update_again(run, 1)
    assert_same_bits(state_of(run, 1)[1], wanted)


def test_an_update_whose_buffers_are_lost_takes_no_step() -> None:
    run = train("resnet", Amnesia()).run
    wanted = state_of(run, 1)[1]
    CACHE.clear()
    there = run.there(STEPS - 1, 1, MICROBATCHES - 1)
    assert there.buffers
    gradients = run.sums(STEPS - 1, 1, MICROBATCHES - 1)
    travelled = replace(there, buffers=None)
    with pytest.raises(StateLost, match="buffers of stage 1"):
        updating.update(UpdateArguments(run.refs[1], STEPS - 1, gradients, 1.0, last=travelled))
    run_last_update_again(run, 1)
    assert_same_bits(state_of(run, 1)[1], wanted)


def test_an_update_that_ends_before_the_journal_knows_steps_once_and_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train("two_branches", Amnesia()).run
    wanted = state_of(run, 1)[1]
    CACHE.clear()
    run.refs[1] = replace(run.refs[1], journal=1)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(JOURNAL, "put", fail)
        with pytest.raises(MemoryError):
            run_last_update_again(run, 1)
    run_last_update_again(run, 1)
    assert_same_bits(state_of(run, 1)[1], wanted)
    assert JOURNAL.find(run.refs[1], STEPS - 1, EntryKey("update", 1, 0)) is not None


def test_a_step_forgets_graphs_that_a_cancelled_step_left() -> None:
    run = run_inline(build("two_branches"), 2, 1, 1, dag=captured("two_branches"))
    ref = run.refs[0]
    CACHE.save_graph(ref, 0, 0, SavedGraph({}, {}, {}, WeightGradients()))
    CACHE.save_graph(ref, 1, 0, SavedGraph({}, {}, {}, WeightGradients()))
    assert list(CACHE.graphs) == [(ref.key, 1, 0)]
