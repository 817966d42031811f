"""What stages take of memory, told from their programs, and where they fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SOME
from test_decoder_stage import TOKENS, _captured, _feed, _part, _stages

from dagflow.errors import StageTooLarge
from dagflow.plan.decoder_cuts import cut_at_layers
from dagflow.plan.memory import CACHE_SHARE, StageNeeds, WorkerMemory, fits, needs_by_worker
from dagflow.plan.placement import place
from dagflow.plan.serving_memory import (
    Room,
    cache_budget,
    room_of,
    serving_needs,
    tokens_that_fit,
)
from dagflow_tasks.kernels.session_cache import BLOCK_TOKENS, whole_blocks
from dagflow_tasks.kernels.states import REACH_TOKENS

NEEDS = [StageNeeds(1000, 1), StageNeeds(4000, 2)]


@pytest.mark.parametrize("family", SOME)
def test_what_stages_take_is_known_from_their_programs(family: str) -> None:
    stages = _stages(family, 2)
    _feed(stages, _part(0, 7), TOKENS[:7])
    _feed(stages, _part(7, 1), TOKENS[7:8])
    _feed(stages, _part(0, BLOCK_TOKENS + 1, session="b"), [1] * (BLOCK_TOKENS + 1))
    for stage in stages:
        stage.fork("b", "c", BLOCK_TOKENS)
    blocks = whole_blocks(8) + whole_blocks(BLOCK_TOKENS + 1) + BLOCK_TOKENS
    dag = _captured(family)[1]
    for stage, program in zip(stages, cut_at_layers(dag, 2).programs, strict=True):
        needs = serving_needs(dag, program)
        assert stage.num_cache_bytes == blocks * needs.token_bytes
        constants = sum(constant.tensor().nbytes for constant in program.constants)
        assert stage.num_weight_bytes + constants == needs.weight_bytes


def test_what_is_told_counts_keys_values_and_rows_for_the_next_stage() -> None:
    dag: Any = _captured("llama")[1]
    first, last = (serving_needs(dag, program) for program in cut_at_layers(dag, 2).programs)
    key_heads, width, hidden, layers = 2, 8, 32, 2
    attention = layers * 2 * key_heads * width * torch.float32.itemsize
    assert last.token_bytes == attention
    assert first.token_bytes >= attention + hidden * torch.float32.itemsize


def test_long_sessions_take_less_where_layers_have_windows() -> None:
    needs = StageNeeds(0, 4, ((96, 3),))
    room = Room(960, (needs, StageNeeds(0, 4, ((96, 1),))))
    assert [room.taken(n) for n in (32, 96, 160, 960)] == [32, 96, 160 - 16, 960 - 216]
    assert Room(960, (needs,)).taken(960) == 96 + 864 // 4
    assert Room(960).taken(960) == Room(960, (StageNeeds(0, 4),)).longest == 960
    longest = Room(960, (needs,)).longest
    assert Room(960, (needs,)).taken(longest) <= 960 < Room(960, (needs,)).taken(longest + 32)


def test_what_a_long_session_takes_with_windows_is_known() -> None:
    stages, dag = _stages("gemma3", 2), _captured("gemma3")[1]
    count = 300
    for start in range(0, count, 50):
        _feed(stages, _part(start, 50), [1] * 50)
    for stage, program in zip(stages, cut_at_layers(dag, 2).programs, strict=True):
        needs = serving_needs(dag, program)
        rows = whole_blocks(count)
        most = (rows - needs.spared(rows)) * needs.token_bytes
        assert needs.windows
        assert 0.7 * most < stage.num_cache_bytes <= most < rows * needs.token_bytes


def test_caches_get_a_share_of_what_weights_leave() -> None:
    memory = WorkerMemory(limit_bytes=10_000, taken_bytes=2000)
    needs = StageNeeds(3000, 10)
    assert cache_budget(memory, 3000, needs, None) == 5000 * CACHE_SHARE
    assert cache_budget(memory, 3000, needs, 700) == 700
    assert cache_budget(memory, 7500, needs, 700) == 500


def test_one_session_may_take_all_caches_and_a_pass_of_it_has_room_to_look_back() -> None:
    memory, needs = WorkerMemory(limit_bytes=11_000), StageNeeds(1000, 10, pass_bytes=30)
    for cache_bytes, budget in ((None, 2500), (9000, 2500), (700, 700)):
        assert cache_budget(memory, 1000, needs, cache_bytes) == budget
        num_tokens = tokens_that_fit(["a"], [needs], {"a": 1000}, {"a": memory}, cache_bytes)
        assert num_tokens == budget // 10 // BLOCK_TOKENS * BLOCK_TOKENS
        assert num_tokens * (needs.token_bytes + needs.pass_bytes) <= 10_000
    stages = [StageNeeds(0, 1, pass_bytes=20), needs, StageNeeds(5, 0)]
    both = next(iter(needs_by_worker(stages, "aaa").values()))
    assert (both.token_bytes, both.pass_bytes) == (11, 30)  # a worker computes one stage at a time
    assert cache_budget(memory, 1000, stages[2], None) == 10_000 * CACHE_SHARE
    with pytest.raises(StageTooLarge, match=r"at least 1\.28 kB for caches"):
        place([needs], {"a": WorkerMemory(2000)}, None)
    assert place([needs], {"a": WorkerMemory(1000 + 32 * 40)}, None).workers == ("a",)


def test_the_fullest_worker_says_how_many_tokens_there_may_be() -> None:
    workers = {"a": WorkerMemory(10_000), "b": WorkerMemory(10_000)}
    weights = {"a": 1000, "b": 4000}
    apart = tokens_that_fit(["a", "b"], NEEDS, weights, workers, None)
    assert apart == 6000 * CACHE_SHARE // 2 // BLOCK_TOKENS * BLOCK_TOKENS
    together = tokens_that_fit(["a", "a"], NEEDS, {"a": 5000}, workers, 960)
    assert together == 960 // 3 // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_session_takes_the_largest_share_that_its_states_take_of_a_budget() -> None:
    needs = [StageNeeds(0, 10, (), 4000), StageNeeds(0, 1, (), 9000)]
    workers = {"a": WorkerMemory(1 << 20), "b": WorkerMemory(1 << 20)}
    room = room_of(["a", "b"], needs, {"a": 0, "b": 0}, workers, 64_000)
    assert room.capacity == 6400
    assert room.session_tokens == 900  # 9000 of 64000 bytes, of 6400 tokens
    assert (room.taken(0), room.taken(32), room.reach) == (0, 932, REACH_TOKENS)
    assert room.longest == (6400 - 900) // BLOCK_TOKENS * BLOCK_TOKENS
    # As many sessions as fit, short or long, are too much for neither worker.
    for num_tokens in (32, 640, 5472):
        count = room.capacity // room.taken(num_tokens)
        for need in needs:
            assert count * (need.session_bytes + num_tokens * need.token_bytes) <= 64_000
    assert not fits([needs[1]], workers["a"], 9000)
    assert room_of(["a"], [StageNeeds(0, 1)], {"a": 0}, workers, 640).reach is None


def test_stages_are_placed_in_a_row_where_they_fit_so() -> None:
    workers = {name: WorkerMemory(10_000) for name in "cab"}
    assert place(NEEDS, workers, None).workers == ("a", "b")
    assert place(NEEDS, {"a": WorkerMemory(10_000)}, None).workers == ("a", "a")


def test_otherwise_the_largest_goes_where_most_is_left() -> None:
    workers = {"a": WorkerMemory(5000), "b": WorkerMemory(2000), "c": WorkerMemory(1000)}
    assert place(NEEDS, workers, None).workers == ("b", "a")


@pytest.mark.parametrize("cache_bytes", [None, 500])
def test_workers_that_are_too_small_are_told_by_how_much(cache_bytes: int | None) -> None:
    workers = {"a": WorkerMemory(3000), "b": WorkerMemory(2500)}
    caches = cache_bytes or int(2 * BLOCK_TOKENS / CACHE_SHARE)
    short = (4000 + caches - 3000) / 1000
    with pytest.raises(StageTooLarge, match=rf"{short:.3g} kB are missing.*1 kB, 4 kB.*a 3 kB"):
        place(NEEDS, workers, cache_bytes)
    found = place(NEEDS, {**workers, "a": WorkerMemory(4000 + caches)}, cache_bytes)
    assert found.workers == ("b", "a")
