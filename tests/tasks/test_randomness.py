"""Random numbers are addressed by run, step, micro-batch and operator, not drawn from a stream."""

from __future__ import annotations

import pytest
import torch
from inline import run_inline
from zoo import build, captured

from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import draws_random_numbers
from dagflow_tasks.program.stage_program import StageProgram


def noise(name: str) -> Node:
    return Node(name, "aten.rand.default", ([64],))


def draw(address: RandomAddress, *names: str) -> dict[str, torch.Tensor]:
    """What operators of these names draw when they run one after the other."""
    joined = Node("joined", "aten.stack.default", ([{"ref": name} for name in names],))
    nodes = (*map(noise, names), joined)
    program = StageProgram(0, 1, (), (), (), (), (), (), nodes, "joined")
    rows = Executable(program, torch.device("cpu")).run({}, {}, address)["joined"]
    return dict(zip(names, rows, strict=True))


def test_the_address_determines_the_numbers() -> None:
    first = draw(RandomAddress(7, 17, 2), "a")["a"]
    torch.manual_seed(1234)
    torch.rand(5)
    assert torch.equal(draw(RandomAddress(7, 17, 2), "a")["a"], first)


def test_neighbours_and_order_do_not_matter() -> None:
    address = RandomAddress(7, 17, 2)
    together = draw(address, "a", "b")
    assert torch.equal(draw(address, "b", "a")["a"], together["a"])
    assert torch.equal(draw(address, "b")["b"], together["b"])


def test_every_part_of_the_address_counts() -> None:
    drawn = [
        draw(RandomAddress(7, 17, 2), "a")["a"],
        draw(RandomAddress(8, 17, 2), "a")["a"],
        draw(RandomAddress(7, 18, 2), "a")["a"],
        draw(RandomAddress(7, 17, 3), "a")["a"],
        draw(RandomAddress(7, 17, 2), "b")["b"],
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)


def test_parts_of_the_address_do_not_run_into_each_other() -> None:
    assert RandomAddress(1, 12, 3).of("a") != RandomAddress(11, 2, 3).of("a")
    assert RandomAddress(0, 1, 23).of("a") != RandomAddress(0, 12, 3).of("a")


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_a_run_leaves_the_process_random_state_alone(name: str) -> None:
    example, dag = build(name), captured(name)
    run = run_inline(example, 2, steps=1, dag=dag)
    batch = [example.batch(3)]
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    run.step(1, batch)
    assert torch.equal(torch.get_rng_state(), wanted)


def test_a_stage_that_fails_leaves_the_process_random_state_alone() -> None:
    bad = Node("bad", "aten.mm.default", ({"ref": "a"}, {"ref": "a"}))
    program = StageProgram(0, 1, (), (), (), (), (), (), (noise("a"), bad), "bad")
    before = torch.get_rng_state()
    with pytest.raises(Exception, match="bad"):
        Executable(program, torch.device("cpu")).run({}, {}, RandomAddress(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_between_steps_and_microbatches() -> None:
    run = run_inline(build("two_branches"), 2, steps=1, dag=captured("two_branches"))
    torch.manual_seed(3)
    batch = build("two_branches").batch(3)
    for step in (1, 2):
        run.step(step, [batch, batch])
    reports = [run.results[run.graph.report_key(step)] for step in (1, 2)]
    assert len({loss for report in reports for loss in report.losses}) == 4


@pytest.mark.parametrize(
    ("op", "draws"),
    [
        ("aten.dropout.default", True),
        ("aten.scaled_dot_product_attention.default", True),
        ("aten.lstm.input", True),
        ("aten.multinomial.default", True),
        ("aten.linear.default", False),
        ("getitem", False),
    ],
)
def test_operators_that_draw_are_known(op: str, draws: bool) -> None:
    assert draws_random_numbers(op) is draws
