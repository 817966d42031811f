"""Weights in oneDNN's order: the same products, and programs that read them so."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from dagflow_tasks.kernels.onednn import LINEAR_PACKED, linear_packed, pack, packs
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.packing import pack_linears
from dagflow_tasks.program.stage_program import ParameterUse, StageInput, StageProgram, ValueSpec

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
LINEAR = "aten.linear.default"
WIDTH = 256


def _weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", [(0,), (1,), (1, 1), (2,), (1, 3), (4,), (3, 11), ()])
def test_a_packed_linear_layer_computes_the_same(leading: Sequence[int], with_bias: bool) -> None:
    weight, x = _weight(320, WIDTH), _weight(*leading, WIDTH, seed=1)
    bias = _weight(320, seed=2) if with_bias else None
    assert packs(weight)
    found = linear_packed(x, pack(weight), bias)
    torch.testing.assert_close(found, functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    weight, x = _weight(WIDTH, 1024, dtype=torch.bfloat16), _weight(2, 1024, dtype=torch.bfloat16)
    if not packs(weight):
        pytest.skip("this processor has no instructions for bfloat16")
    found = linear_packed(x, pack(weight))
    wanted = functional.linear(x.float(), weight.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0, rtol=2**-8)


def test_a_packed_weight_takes_no_more_memory() -> None:
    weight = _weight(WIDTH, 2 * WIDTH)
    packed = pack(weight.t().contiguous().t())  # however it lies
    assert (packed.nbytes, packed.shape, packed.dtype) == (
        weight.nbytes,
        weight.shape,
        weight.dtype,
    )
    x = _weight(8, 2 * WIDTH, seed=1)
    torch.testing.assert_close(linear_packed(x, packed), linear_packed(x, pack(weight)))


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(128, 128),
        torch.ones(1 << 16),
        torch.ones(WIDTH, WIDTH, dtype=torch.int8),
        torch.ones(WIDTH, WIDTH, dtype=torch.float64),
        torch.ones(WIDTH, WIDTH, device="meta"),
    ],
    ids=["small", "a vector", "integers", "float64", "elsewhere"],
)
def test_what_gains_nothing_stays_as_it_is(weight: torch.Tensor) -> None:
    assert not packs(weight)


def test_a_machine_without_onednn_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packs(_weight(WIDTH, WIDTH))


def _program(nodes: Sequence[Node], uses: dict[str, str]) -> StageProgram:
    """Return a program of square weights: uses by value, with the parameter's name."""
    shape = (WIDTH, WIDTH)
    parameters = tuple(ParameterUse(v, n, "float32", shape, False, 0) for v, n in uses.items())
    x = StageInput(ValueSpec("x", "float32", (2, WIDTH)))
    return StageProgram(0, 1, (), (x,), (), parameters, (), (), tuple(nodes), nodes[-1].name)


def _linear(name: str, x: str, weight: str) -> Node:
    return Node(name, LINEAR, ({"ref": x}, {"ref": weight}))


def _packed_ops(program: StageProgram, weights: dict[str, torch.Tensor]) -> list[str]:
    """Pack a program's weights; check that it computes the same; return its operators."""
    plain = {name: weight.clone() for name, weight in weights.items()}
    packed = pack_linears(program, weights)
    results = []
    for version, held in ((program, plain), (packed, weights)):
        values = {use.value: held[use.parameter] for use in version.parameters}
        values["x"] = _weight(2, WIDTH, seed=9)
        executable = Executable(version, torch.device("cpu"))
        outputs = executable.run(values, {}, RandomAddress(0, 0, 0))
        results.append(outputs[program.nodes[-1].name])
    torch.testing.assert_close(results[1], results[0], atol=1e-2, rtol=1e-4)
    return [node.op for node in packed.nodes]


def test_weights_that_linear_operators_read_are_packed_once() -> None:
    nodes = [_linear("a", "x", "p.w"), _linear("b", "a", "p.w#1"), _linear("c", "b", "p.v")]
    weights = {"w": _weight(WIDTH, WIDTH), "v": _weight(WIDTH, WIDTH, seed=1)}
    uses = {"p.w": "w", "p.w#1": "w", "p.v": "v"}
    assert _packed_ops(_program(nodes, uses), weights) == [LINEAR_PACKED] * 3
    assert all(weight.is_mkldnn for weight in weights.values())


def test_weights_that_others_read_stay_plain() -> None:
    product = Node("b", "aten.mm.default", ({"ref": "a"}, {"ref": "p.w#1"}))
    weights = {"w": _weight(WIDTH, WIDTH)}
    program = _program([_linear("a", "x", "p.w"), product], {"p.w": "w", "p.w#1": "w"})
    ops = _packed_ops(program, weights)
    assert ops == [LINEAR, "aten.mm.default"]
    assert not weights["w"].is_mkldnn


def test_a_weight_multiplied_with_itself_stays_plain() -> None:
    weights = {"w": _weight(WIDTH, WIDTH)}
    nodes = [_linear("a", "p.w", "p.w"), _linear("b", "x", "a")]
    assert _packed_ops(_program(nodes, {"p.w": "w"}), weights) == [LINEAR, LINEAR]
