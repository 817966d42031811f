"""Programs are data: what a worker reads from one, and what it refuses."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo import captured

from dagflow.plan.partition import partition
from dagflow_tasks.errors import OperatorNotAllowed, ProgramInvalid, ProgramTooNew, TaskFailed
from dagflow_tasks.program import operators
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.nodes import Node, decode_literal, encode_literal
from dagflow_tasks.program.operators import is_allowed, resolve
from dagflow_tasks.program.sizes import evaluate_size, size_text
from dagflow_tasks.program.stage_program import Constant, StageProgram

CPU = torch.device("cpu")
ADDRESS = RandomAddress(0, 0, 0)


def program(*nodes: Node, loss: str | None = None) -> StageProgram:
    return StageProgram(0, 1, ("s0",), (), (), (), (), (), nodes, loss or nodes[-1].name)


def run(*nodes: Node, **sizes: int) -> torch.Tensor:
    written = StageProgram.from_json(program(*nodes).to_json())
    executable = Executable(written, CPU)
    result: torch.Tensor = executable.run({}, {"s0": 1, **sizes}, ADDRESS)[nodes[-1].name]
    return result


ZEROS = Node("zeros", "aten.zeros.default", ([2, 3],), {"device": {"device": "stage"}})


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm", "two_branches"])
def test_json_there_and_back_changes_nothing(name: str) -> None:
    for written in partition(captured(name), 3).programs:
        text = written.to_json()
        read = StageProgram.from_json(text)
        assert read.to_json() == text
        assert read.inputs == written.inputs
        assert read.outputs == written.outputs
        assert read.parameters == written.parameters
        assert read.buffers == written.buffers
        assert read.constants == written.constants


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, dtype=torch.bfloat16),
        torch.tensor([float("nan"), float("-inf"), -0.0]),
        torch.tensor(True),
        torch.arange(6).reshape(2, 3).t(),
        torch.empty(0, 4),
    ],
    ids=["bf16", "special floats", "scalar", "transposed", "empty"],
)
def test_a_constant_keeps_its_bytes_dtype_and_shape(tensor: torch.Tensor) -> None:
    read = Constant.from_json(json.loads(json.dumps(Constant.of("c", tensor).to_json()))).tensor()
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(read.nan_to_num(7.0), tensor.nan_to_num(7.0))


def set_field(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body[field] = value

    return change


def set_node(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["nodes"][0].update(changes)

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        for key in path[:-1]:
            body = body[key]
        del body[path[-1]]

    return change


CONSTANT = {"name": "c", "dtype": "float32", "shape": [2], "data": "AAAAAAAAAAA="}


@pytest.mark.parametrize("odd", [torch.arange(6.0).view(2, 3).t(), torch.ones(3).expand(2, 3)])
def test_a_constant_keeps_its_strides(odd: torch.Tensor) -> None:
    read = Constant.from_json(json.loads(json.dumps(Constant.of("c", odd).to_json()))).tensor()
    assert torch.equal(read, odd)
    assert read.stride() == odd.stride()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (set_node(op="os.system.default"), OperatorNotAllowed, "'os.system.default'.*allow-list"),
        (set_node(op="aten.from_file.default"), OperatorNotAllowed, "aten.from_file"),
        (set_field("format_version", 2), ProgramTooNew, "version 2.*up to 1.*Upgrade"),
        (set_field("format_version", "1"), ProgramInvalid, "doesn't say its format version"),
        (set_field("format", "zip"), ProgramInvalid, "its format is 'zip'"),
        (set_node(args=[{"ref": "ghost"}]), ProgramInvalid, "'zeros'.*reads 'ghost'"),
        (set_node(args=[{"ref": "zeros"}]), ProgramInvalid, "'zeros'.*reads 'zeros'"),
        (set_node(args=[[[{"ref": "ghost"}]]]), ProgramInvalid, "reads 'ghost'"),
        (drop("nodes", 0, "op"), ProgramInvalid, "'name', 'op' and 'args'"),
        (drop("nodes"), ProgramInvalid, "incomplete.*KeyError: 'nodes'"),
        (drop("loss"), ProgramInvalid, "incomplete.*KeyError: 'loss'"),
        (set_field("loss", "ghost"), ProgramInvalid, "returns 'ghost' but doesn't compute it"),
        (set_field("nodes", None), ProgramInvalid, "TypeError"),
        (set_field("parameters", [{"walue": 1}]), ProgramInvalid, "incomplete"),
        (set_field("constants", [{**CONSTANT, "dtype": "load"}]), ProgramInvalid, "dtype 'load'"),
        (set_field("constants", [{**CONSTANT, "shape": [3]}]), ProgramInvalid, "8 bytes.*needs 12"),
    ],
)
def test_a_bad_program_is_refused_when_it_is_read(
    change: Callable[[dict[str, Any]], None], error: type[Exception], message: str
) -> None:
    body = json.loads(program(ZEROS).to_json())
    change(body)
    with pytest.raises(error, match=message) as caught:
        StageProgram.from_json(json.dumps(body))
    assert type(caught.value) is error


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"dagflow-stage-program"'])
def test_what_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ProgramInvalid, match="Not a dagflow-stage-program file"):
        StageProgram.from_json(text)


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.out",
        "aten.set_.source_Storage",
        "aten.set.source_Tensor",
        "aten.set_data.default",
        "aten._print.default",
        "aten.record_stream.default",
        "aten.pin_memory.default",
        "aten.__dict__.update",
        "aten.__class__.__init__",
        "aten.linear.__call__",
        "aten.linear._schema",
        "aten.linear",
        "aten.linear.default.default",
        "prim.device.default",
        "torch.load",
        "builtins.eval",
        "",
    ],
)
def test_operators_that_reach_outside_a_program_are_not_allowed(op: str) -> None:
    assert not is_allowed(op)
    with pytest.raises(OperatorNotAllowed, match=r"allow-list|has no operator"):
        resolve(op)


def test_an_operator_this_torch_lacks_is_told_from_a_forbidden_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = {"aten.invented_in_2031.default": "functional"}
    monkeypatch.setattr(operators, "allowed", lambda: listed)
    with pytest.raises(OperatorNotAllowed, match="another torch"):
        resolve("aten.invented_in_2031.default")


@pytest.mark.parametrize("device", [{"device": "cuda:7"}, {"device": "stage"}, "meta", "cuda:7"])
def test_a_program_does_not_choose_its_device(device: Any) -> None:
    assert run(Node("z", "aten.zeros.default", ([2],), {"device": device})).device == CPU
    moved = Node("moved", "aten.to.device", ({"ref": "zeros"}, device, {"dtype": "float64"}))
    found = run(ZEROS, moved)
    assert (found.device, found.dtype) == (CPU, torch.float64)


def test_devices_are_written_without_their_name() -> None:
    assert encode_literal(torch.device("cuda:3")) == {"device": "stage"}
    assert decode_literal({"device": "cuda:3"}, {}, CPU) == CPU


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -2.5, 1 - 2j, complex("inf"), "mean", float("inf")),
        *(torch.bfloat16, torch.float8_e5m2, torch.strided, torch.channels_last),
    ],
    ids=str,
)
def test_literals_come_back_as_they_were(value: Any) -> None:
    written = json.loads(json.dumps(encode_literal(value)))
    read = decode_literal(written, {}, CPU) if isinstance(written, dict) else written
    assert read == value
    assert type(read) is type(value)


def test_what_is_no_literal_is_not_written() -> None:
    with pytest.raises(TypeError, match="a bytes can't be an argument"):
        encode_literal(b"1")


@pytest.mark.parametrize(
    "argument",
    [{}, {"dtype": "load"}, {"code": "1"}, {"dtype": "int8", "size": 1}, {"size": ["xor", 1, 2]}],
)
def test_an_unknown_argument_is_refused_before_anything_runs(argument: Any) -> None:
    with pytest.raises(ProgramInvalid, match="unknown argument"):
        run(ZEROS, Node("bad", "aten.sum.dim_IntList", ({"ref": "zeros"}, [argument])))


@pytest.mark.parametrize(
    ("expression", "value", "text"),
    [
        (7, 7, "7"),
        ("s0", 4, "s0"),
        (["mul", 2, ["add", "s0", 1]], 10, "2*(s0 + 1)"),
        (["add", "s0", ["mul", -1, "s1"]], 1, "s0 + -1*s1"),
        (["floordiv", "s0", 3], 1, "s0//3"),
        (["mod", "s0", "s1"], 1, "s0%s1"),
        (["max", "s0", 9, "s1"], 9, "max(s0, 9, s1)"),
        (["min", "s0", "s1"], 3, "min(s0, s1)"),
        (["pow", "s0", 2], 16, "s0**2"),
        (["pow", ["float", "s0"], -0.5], 0.5, "float(s0)**-0.5"),
        (["ceil", ["truediv", "s1", 2]], 2, "ceil(s1 / 2)"),
        (["trunc", ["mul", ["float", "s0"], 0.8]], 3, "trunc(float(s0)*0.8)"),
        (["round", ["truediv", 5, 2]], 2, "round(5 / 2)"),
        (["sqrt", ["float", "s0"]], 2.0, "sqrt(float(s0))"),
        (["where", ["lt", "s0", "s1"], 1, 2], 2, "where(s0 < s1, 1, 2)"),
        (["not", ["and", ["eq", ["mod", "s0", 2], 0], ["ne", "s1", 3]]], True, None),
    ],
)
def test_size_expressions(expression: Any, value: float, text: str | None) -> None:
    found = evaluate_size(expression, {"s0": 4, "s1": 3})
    assert (found, type(found)) == (value, type(value))
    assert text is None or size_text(expression) == text


def test_sizes_are_filled_in_for_each_batch() -> None:
    node = Node("z", "aten.zeros.default", ([{"size": ["mul", 2, "s0"]}, 3],))
    assert [run(node, s0=size).shape for size in (1, 5)] == [(2, 3), (10, 3)]


def test_what_is_kept_for_sizes_has_an_end() -> None:
    nodes = [Node(f"z{i}", "aten.zeros.default", ([{"size": "s0"}],)) for i in range(10)]
    executable = Executable(program(*nodes), CPU)

    def num_instructions_after(sizes: range) -> int:
        for size in sizes:
            executable.run({}, {"s0": size}, ADDRESS)
        gc.collect()
        return sum(type(held).__name__ == "_Instruction" for held in gc.get_objects())

    first = num_instructions_after(range(100))
    assert num_instructions_after(range(100, 200)) <= first


def test_a_failing_operator_names_itself_its_module_and_its_tensors() -> None:
    bad = Node("bad", "aten.mm.default", ({"ref": "zeros"}, {"ref": "zeros"}), module="layers.3")
    with pytest.raises(
        TaskFailed,
        match=r"Stage 0 .*'bad' \(aten.mm.default\) of module 'layers.3' on "
        r"float32\[2, 3\], float32\[2, 3\]: RuntimeError",
    ):
        run(ZEROS, bad)
