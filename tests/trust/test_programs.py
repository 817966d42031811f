"""Programs are data: whatever one says, it reads and takes nothing but its own, and has an end."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trust.hostile_calls import hostile_calls

from dagflow.errors import CaptureFailed
from dagflow.graph.capture import capture
from dagflow_tasks.errors import (
    LimitReached,
    OperatorNotAllowed,
    ProgramInvalid,
    SizeInvalid,
    TaskFailed,
)
from dagflow_tasks.program import fences
from dagflow_tasks.program.allow_list import FILE, allowed, name_in_programs
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.limits import Limits
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import is_allowed, own_operators, resolve
from dagflow_tasks.program.sizes import evaluate_size
from dagflow_tasks.program.stage_program import Constant, StageInput, StageProgram, ValueSpec

CPU = torch.device("cpu")
SMALL = Limits(memory_bytes=64 << 20, seconds=20.0)


def program(*nodes: Node, inputs: tuple[str, ...] = (), **constants: torch.Tensor) -> StageProgram:
    given = tuple(StageInput(ValueSpec(f"in.{name}", "float32", (4,))) for name in inputs)
    known = tuple(Constant.of(name, tensor) for name, tensor in constants.items())
    return StageProgram(0, 1, ("s0",), given, (), (), (), known, nodes, nodes[-1].name)


def run(
    *nodes: Node, limits: Limits = SMALL, values: Any = None, s0: int = 1, **constants: torch.Tensor
) -> torch.Tensor:
    """Run nodes as a worker does, from the program's text on."""
    written = program(*nodes, inputs=tuple(values or ()), **constants)
    executable = Executable(StageProgram.from_json(written.to_json()), CPU, limits=limits)
    given = {f"in.{name}": value for name, value in (values or {}).items()}
    return executable.run(given, {"s0": s0}, RandomAddress(0, 0, 0))[nodes[-1].name]


def call(name: str, op: str, *args: Any, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs)


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


# The list


def test_every_operator_of_the_list_is_what_its_section_says() -> None:
    assert [op for op in allowed() if not is_allowed(op)] == []


def test_what_isnt_plainly_functional_has_a_reason() -> None:
    body = tomllib.loads((files("dagflow_tasks.program") / FILE).read_text("utf-8"))
    sections = [section for name, section in body.items() if name != "functional"]
    assert all(len(reason) > 8 for section in sections for reason in section.values())
    assert {name_in_programs(name) for name in body["checked"]} == fences.checked_operators()
    assert set(body["own"]) == own_operators()


@pytest.mark.parametrize(
    "op",
    [
        *("_reshape_alias.default", "_sparse_coo_tensor_unsafe.default", "to_dense.default"),
        *("sparse_coo_tensor.indices_size", "sparse_compressed_tensor.comp_plain_value_size"),
        *(
            "save.default",
            "from_file.default",
            "set_.source_Tensor_storage_offset",
            "set_.source_Tensor",
        ),
        *(
            "resize_.default",
            "resize_as_.default",
            "_resize_output_.default",
            "as_strided_.default",
        ),
        *("manual_seed.default", "set_grad_enabled.default", "set_num_threads.default"),
        *("_unsafe_index.Tensor", "_unsafe_masked_index.default", "_index_put_impl.default"),
        *("_embedding_bag.default", "_mkldnn_reshape.default", "_nested_view_from_buffer.default"),
        *("quantize_per_tensor.default", "_make_per_tensor_quantized_tensor.default"),
        *("_pin_memory.default", "record_stream.default", "data.default", "requires_grad_.default"),
        *("lu_solve.default", "linalg_ldl_solve.default", "segment_reduce.default"),
        *(
            "_foreach_add_.Scalar",
            "_cuda_getCurrentRawStream.default",
            "_local_scalar_dense.default",
        ),
        *(
            "embedding_dense_backward.default",
            "max_unpool2d.out",
            "_cufft_set_plan_cache_max_size.default",
        ),
    ],
)
def test_operators_outside_of_the_list_are_refused(op: str) -> None:
    with pytest.raises(OperatorNotAllowed, match=r"aten\..* allow-list"):
        run(call("x", "zeros.default", [2]), call("y", op, ref("x")))


class Unlisted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._reshape_alias(x, [2, 2], [2, 1]).sum()


def test_capture_refuses_an_operator_outside_of_the_list_by_module_and_line() -> None:
    model = nn.Sequential(Unlisted())
    with pytest.raises(
        CaptureFailed,
        match=r"aten._reshape_alias.default.*allow-list.*Module: '0'.*test_programs.py:\d+.*What to do",
    ):
        capture(model, (torch.randn(4),))


# Memory that isn't the program's


def test_strides_stay_within_the_tensor_whatever_its_storage_holds() -> None:
    shared = torch.arange(12.0)
    middle = shared[4:8]
    rows = call("y", "as_strided.default", ref("in.x"), [2, 2], [1, 2], 4)
    assert run(rows, values={"x": middle}).tolist() == [[4.0, 6.0], [5.0, 7.0]]
    for size, stride, offset in (
        *(([4], [1], 0), ([4], [1], 3), ([5], [1], 4), ([2], [7], 4), ([2], [-1], 5)),
        *(([1], [1], 1 << 40), ([1 << 40], [1], 4), ([1 << 40, 1 << 40], [1, 1], 4)),
    ):
        with pytest.raises(
            TaskFailed, match=r"as_strided.*(elements|below 0|result may take|Negative|overflow)"
        ):
            run(
                call("y", "as_strided.default", ref("in.x"), size, stride, offset),
                values={"x": middle},
            )


@pytest.mark.parametrize(
    "node",
    [
        call("y", "empty.memory_format", [4096]),
        call("y", "empty_strided.default", [64], [64]),
        call("y", "new_empty.default", ref("c"), [4096]),
        call("y", "empty_like.default", ref("c"), dtype={"dtype": "float64"}),
        call("y", "new_empty_strided.default", ref("c"), [64], [64]),
    ],
    ids=lambda node: node.op,
)
def test_memory_that_nobody_has_written_is_zeros(node: Node) -> None:
    for _ in range(8):  # freed as it is allocated
        torch.full((4096,), 7.0)
    found = run(node, c=torch.ones(4096))
    assert not bytes(found.untyped_storage().tolist()).strip(b"\0")


def test_gaps_between_a_constants_elements_are_zeros() -> None:
    wide = torch.full((8, 64), 7.0)[:, :1]
    written = Constant.of("c", wide)
    assert written.strides == (64, 1)
    read = Constant.from_json(written.to_json()).tensor()
    assert read.stride() == (64, 1)
    assert torch.as_strided(read, (7 * 64,), (1,), 0).sum() == 7 * 7.0


def test_a_bools_byte_is_0_or_1() -> None:
    body = Constant.of("c", torch.ones(4, dtype=torch.uint8)).to_json()
    bools = Constant.from_json({**body, "dtype": "bool", "data": "/wACAA=="}).tensor()
    assert bools.view(torch.uint8).tolist() == [1, 0, 1, 0]
    with pytest.raises(TaskFailed, match="bytes of numbers aren't bools"):
        run(call("y", "view.dtype", ref("c"), {"dtype": "bool"}), c=torch.ones(4).to(torch.uint8))


def test_a_result_goes_only_into_what_has_its_shape() -> None:
    values = {"x": torch.arange(4.0)}
    into = call("y", "add.out", ref("in.x"), 1.0, out=ref("in.x"))
    assert run(into, values=values).tolist() == [1.0, 2.0, 3.0, 4.0]
    part = call("p", "slice.Tensor", ref("in.x"), 0, 0, 1)
    with pytest.raises(TaskFailed, match=r"\[4\] doesn't go into \[1\]"):
        run(part, call("y", "add.out", ref("in.x"), 1.0, out=ref("p")), values=values)
    assert values["x"].tolist() == [0.0, 1.0, 2.0, 3.0]


QUERY, LONG = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("scaled_dot_product_attention.default", (QUERY, LONG[:, :, :2], LONG)),
        ("floor_divide.default", (torch.tensor([-(2**63)]), torch.tensor([-1]))),
        ("remainder.Tensor", (torch.tensor([-(2**31)]).int(), torch.tensor([-1]).int())),
        ("arange.start_step", (0, -(2**63), -1)),
        ("range.step", (0, -(2**63), -1, torch.int64)),
        ("range.step", (0, 5, 0.5, torch.int64)),
        ("random_.from", (torch.ones(2), 2**63 - 1, None)),
        ("random_.from", (torch.ones(2).double(), -(2**63), 0)),
        ("grid_sampler.default", (torch.ones(1, 1, 4, 4), torch.zeros(1, 3, 3, 2), 7, 0, False)),
        (
            "ctc_loss.Tensor",
            (torch.ones(5, 1, 3), torch.tensor([[1, 9**6]]), torch.tensor([5]), torch.tensor([2])),
        ),
        (
            "fractional_max_pool2d.default",
            (torch.ones(1, 1, 8, 8), [2, 2], [3, 3], torch.full((1, 1, 2), 1e9)),
        ),
        ("_weight_norm.default", (torch.ones(3, 2), torch.ones(1, 1))),
        (
            "lstm.input",
            (
                *(torch.ones(4, 7, 5), [torch.zeros(1, 2, 3)] * 2),
                [torch.ones(12, 5), torch.ones(12, 3), torch.ones(12), torch.ones(12)],
                *(True, 1, 0.0, False, False, False),
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_operators_take_for_granted_is_checked(op: str, arguments: Any) -> None:
    operator = resolve(f"aten.{op}")
    with torch.no_grad(), pytest.raises(ValueError, match=r"\w"):
        operator(*arguments)


def test_hostile_calls_end_no_process_and_tell_of_no_other_memory() -> None:
    report = hostile_calls(2000, seed=5)
    assert report.found == [], str(report)
    assert report.returned > 300


@pytest.mark.slow
def test_many_hostile_calls_end_no_process_and_tell_of_no_other_memory() -> None:
    report = hostile_calls(20_000, seed=6)
    assert report.found == [], str(report)


@pytest.mark.parametrize(
    ("op", "calls"),
    [
        ("aten.empty.memory_format", 400),
        pytest.param("aten._reshape_alias.default", 60, marks=pytest.mark.slow),  # ends processes
    ],
)
def test_hostile_calls_find_an_operator_that_looks_elsewhere(op: str, calls: int) -> None:
    """What finds nothing must be able to find something."""
    assert hostile_calls(calls, seed=1, unfenced=op).found


# Memory and time


@pytest.mark.parametrize(
    "nodes",
    [
        [call("y", "zeros.default", [1 << 40])],
        [call("y", "full.default", [1 << 20, 1 << 20], 1.0)],
        [call("y", "arange.default", 1 << 45)],
        [call("x", "zeros.default", [1]), call("y", "expand.default", ref("x"), [1 << 40])],
        [call("x", "zeros.default", [1024]), call("y", "repeat.default", ref("x"), [1 << 30])],
        [
            call("x", "ones.default", [1 << 10], dtype={"dtype": "int64"}),
            call("r", "mul.Tensor", ref("x"), 1 << 40),
            call("y", "repeat_interleave.self_Tensor", ref("x"), ref("r")),
        ],
        [
            call("x", "ones.default", [1 << 10], dtype={"dtype": "int64"}),
            call("r", "mul.Tensor", ref("x"), 1 << 40),
            call("y", "one_hot.default", ref("r")),
        ],
        [call("x", "zeros.default", [4]), call("y", "pad.default", ref("x"), [1 << 40, 1 << 40])],
        [call("x", "zeros.default", [1 << 20]), call("y", "outer.default", ref("x"), ref("x"))],
        [
            call("x", "zeros.default", [1 << 16, 1]),
            call("t", "t.default", ref("x")),
            call("y", "matmul.default", ref("x"), ref("t")),
        ],
        [
            call("x", "zeros.default", [1 << 10]),
            call("y", "einsum.default", "a,b,c->abc", [ref("x"), ref("x"), ref("x")]),
        ],
        [
            call("x", "zeros.default", [1, 1, 4, 4]),
            call("y", "conv2d.default", ref("x"), ref("x"), None, [1, 1], [1 << 20, 1 << 20]),
        ],
        [
            call("n0", "zeros.default", [1 << 10]),
            *(
                call(f"n{i}", "cat.default", [ref(f"n{i - 1}"), ref(f"n{i - 1}")])
                for i in range(1, 61)
            ),
        ],
        [
            call("n0", "zeros.default", [1 << 20]),
            *(call(f"n{i}", "add.Tensor", ref("n0"), 1.0) for i in range(1, 40)),
            call("y", "stack.default", [ref(f"n{i}") for i in range(1, 40)]),
        ],
    ],
    ids=lambda nodes: nodes[-1].op,
)
def test_memory_is_refused_before_it_is_taken(nodes: list[Node]) -> None:
    with pytest.raises(LimitReached, match=r"may take \d+ MB, beside \d+ MB .* of 67 MB"):
        run(*nodes)


def test_what_is_drawn_is_no_draw_more() -> None:
    """The check before the first step counts draws, of the graph as of the model."""
    drawn = []

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                drawn.append(str(func))
            return func(*args, **(kwargs or {}))

    with Draws():
        run(
            call("a", "randperm.default", 5),
            call("b", "randint.low", 1, 9, [2, 3]),
            call("c", "normal.float_float", 0.0, 1.0, [4]),
            call("d", "rand.default", [4]),
            call("y", "multinomial.default", ref("d"), 2),
        )
    assert len(drawn) == 5


@pytest.mark.parametrize(
    "node",
    [
        call("y", "randperm.default", 1 << 40),
        call("y", "randint.default", 5, [1 << 40]),
        call("y", "randint.low", 1, 5, [1 << 20, 1 << 20]),
        call("y", "normal.float_float", 0.0, 1.0, [1 << 40]),
    ],
    ids=lambda node: node.op,
)
def test_memory_of_what_is_drawn_is_refused_before_it_is_taken(node: Node) -> None:
    with pytest.raises(LimitReached, match=r"may take \d+ MB"):
        run(node)


def test_memory_that_is_free_again_is_no_longer_counted() -> None:
    nodes = [call("n0", "zeros.default", [1 << 22])]  # 16 MB
    nodes += [call(f"n{i}", "add.Tensor", ref(f"n{i - 1}"), 1.0) for i in range(1, 20)]
    assert float(run(*nodes)[0]) == 19.0


def test_memory_that_autograd_keeps_is_counted() -> None:
    nodes = [call("n0", "mul.Tensor", ref("in.x"), ref("in.x"))]
    nodes += [call(f"n{i}", "mul.Tensor", ref(f"n{i - 1}"), ref("in.x")) for i in range(1, 20)]
    values = {"x": torch.ones(1 << 22)}
    assert run(*nodes, values=values).numel() == 1 << 22
    with pytest.raises(LimitReached, match="MB that are in use"):
        run(*nodes, values={"x": torch.ones(1 << 22, requires_grad=True)})


def test_what_data_makes_large_is_refused_in_a_later_run_of_the_same_sizes_too() -> None:
    nodes = [
        call("rows", "nonzero.default", ref("in.x")),
        call("across", "t.default", ref("rows")),
        call("y", "mul.Tensor", ref("rows"), ref("across")),
    ]
    executable = Executable(program(*nodes, inputs=("x",)), CPU, limits=SMALL)
    few, many = torch.zeros(1 << 14), torch.ones(1 << 14)
    few[3] = 1.0
    found = executable.run({"in.x": few}, {"s0": 1}, RandomAddress(0, 0, 0))["y"]
    assert found.tolist() == [[9]]
    with pytest.raises(LimitReached, match="may take 2147 MB"):
        executable.run({"in.x": many}, {"s0": 1}, RandomAddress(0, 0, 0))


def test_a_program_ends_when_its_time_is_over() -> None:
    nodes = [call("n0", "zeros.default", [4])]
    nodes += [call(f"n{i}", "add.Tensor", ref(f"n{i - 1}"), 1.0) for i in range(1, 5)]
    with pytest.raises(LimitReached, match=r"'n0'.*0 seconds are over"):
        run(*nodes, limits=Limits(seconds=0.0))


# Sizes


@pytest.mark.parametrize(
    "expression",
    [
        ["pow", 7, ["pow", 10, 8]],
        ["pow", "s0", ["pow", 10, 8]],
        ["pow", -3, 1 << 40],
        ["lshift", 1, 1 << 40],
        ["mul", *[1 << 40] * 2000],
        ["round", 5, -(10**9)],
        ["pow", 10.0, 400],
        ["pow", -1, 0.5],
        ["floordiv", 1, 0],
        ["trunc", 1e300],
        ["sqrt", -1],
        ["lshift", 1.5, 2],
        1 << 80,
    ],
    ids=str,
)
def test_sizes_that_are_no_sizes_are_refused_at_once(expression: Any) -> None:
    with pytest.raises(SizeInvalid, match="can't be calculated"):
        evaluate_size(expression, {"s0": 7})
    with pytest.raises(SizeInvalid, match="can't be calculated"):
        run(call("y", "zeros.default", [{"size": expression}]), s0=7)


def nested(depth: int, inner: Any = "s0") -> Any:
    for _ in range(depth):
        inner = ["neg", inner]
    return inner


@pytest.mark.parametrize(
    "expression",
    [
        *(nested(100), ["add", *[1] * 5000], ["xor", 1, 2], ["neg", 1, 2], ["where", 1, 2], []),
        *("s7", ["neg", "s7"], None, {"size": 1}, [["neg"], 1], ["round", 1, 2, 3], ["add"]),
    ],
    ids=lambda expression: repr(expression)[:30],
)
def test_expressions_are_checked_when_a_program_is_read(expression: Any) -> None:
    text = program(call("y", "zeros.default", [{"size": expression}])).to_json()
    with pytest.raises(ProgramInvalid, match=r"size|unknown argument"):
        StageProgram.from_json(text)


# What is read


@pytest.mark.parametrize(
    "deep", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
)
def test_deeply_nested_json_is_no_program(deep: str) -> None:
    with pytest.raises(ProgramInvalid, match="Not a dagflow-stage-program file"):
        StageProgram.from_json(deep)
    text = program(call("y", "zeros.default", [1])).to_json()
    with pytest.raises(ProgramInvalid, match="Not a dagflow-stage-program file"):
        StageProgram.from_json(text.replace("[[1]]", f"[{deep}]"))


def test_how_many_values_there_are_is_known_before_they_are_made() -> None:
    with pytest.raises(ProgramInvalid, match="16000000 values"):
        StageProgram.from_json("[" + "[]," * 9_000_000 + "1]")


def test_a_program_has_a_limited_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = program(*(call(f"n{i}", "zeros.default", [1]) for i in range(4))).to_json()
    StageProgram.from_json(text)
    monkeypatch.setattr("dagflow_tasks.program.stage_program.MOST_NODES", 3)
    with pytest.raises(ProgramInvalid, match="4 nodes, and may have 3"):
        StageProgram.from_json(text)


def change(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *way, last = path
    for key in way:
        body = body[key]
    body[last] = value


CONSTANT = {"name": "c", "dtype": "float32", "shape": [2], "data": "AAAAAAAAAAA="}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nodes", 0, "args"), [[[[[[[[[1]]]]]]]]]),
        (("nodes", 0, "args"), ["x" * 5000]),
        (("nodes", 0, "args"), [1 << 70]),
        (("nodes", 0, "args"), [{"ref": 3}]),
        (("nodes", 0, "args"), [{"complex": [1, 2, 3]}]),
        (("nodes", 0, "args"), [{"dtype": ["int8"]}]),
        (("nodes", 0, "name"), ["n"]),
        (("nodes", 0, "name"), 3),
        (("nodes", 0, "op"), {}),
        (("nodes", 0, "grad"), "no"),
        (("nodes", 0, "kwargs"), [1]),
        (("nodes",), [1]),
        (("nodes",), "nodes"),
        (("symbols",), [1]),
        (("constants",), [{**CONSTANT, "shape": [-1, -2]}]),
        (("constants",), [{**CONSTANT, "shape": [1 << 62] * 60}]),
        (("constants",), [{**CONSTANT, "shape": [1] * 10_000}]),
        (("constants",), [{**CONSTANT, "shape": [2.0]}]),
        (("constants",), [{**CONSTANT, "strides": [1 << 40]}]),
        (("constants",), [{**CONSTANT, "strides": [-1]}]),
        (("constants",), [{**CONSTANT, "strides": [1, 1]}]),
        (("constants",), [{**CONSTANT, "dtype": ["int8"]}]),
        (("constants",), [{**CONSTANT, "data": 7}]),
        (("constants",), [[]]),
        (("inputs",), [{"name": "x", "dtype": "int8", "shape": [{"a": 1}]}]),
        (("parameters",), [3]),
        (("loss",), ["y"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_whatever_stands_in_a_program_the_answer_is_an_error_of_ours(
    path: tuple[Any, ...], value: Any
) -> None:
    body = json.loads(program(call("y", "zeros.default", [1])).to_json())
    change(body, path, value)
    with pytest.raises(ProgramInvalid, match=r"program|value"):
        StageProgram.from_json(json.dumps(body))


# Settings of the process


def test_no_setting_of_the_process_survives_a_program() -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(),
        )

    before = settings()
    quiet = Node("q", "aten.rand.default", ([4],), {}, grad=False, autocast_dtype="bfloat16")
    bad = call("bad", "mm.default", ref("q"), ref("q"))
    run(quiet, call("y", "normal_.default", ref("q")))
    assert settings() == before
    with pytest.raises(TaskFailed):
        run(quiet, bad)
    assert settings() == before
