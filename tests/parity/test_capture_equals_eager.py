"""A captured model, read back from JSON and run as one stage program, is the eager model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from inline import assert_same_bits
from zoo import SIMILAR, ZOO, Example, build, capture_example, without_dropout
from zoo import captured as dag_of

from dagflow.graph.batch import flatten_batch
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.plan.partition import partition
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.train.exchange import tensors_of
from dagflow_tasks.train.gradient_sums import total_gradients

SEQUENCE_MODELS = [name for name in ZOO if name not in ("vit", "resnet", "two_branches")]


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward leave behind."""

    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]


def eager(example: Example, batch: Any) -> Outcome:
    model = copy.deepcopy(example.model)
    loss = Example(model, example.batch, example.loss).eager_loss(batch)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.detach(), gradients, dict(model.named_buffers()))


def through_json(dag: OperatorDag) -> tuple[OperatorDag, StageProgram]:
    dag = OperatorDag.from_json(dag.to_json())
    return dag, StageProgram.from_json(partition(dag, num_stages=1)[0].to_json())


def captured(dag: OperatorDag, model: torch.nn.Module, batch: Any) -> Outcome:
    dag, program = through_json(dag)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    buffers = {name: tensor.clone() for name, tensor in buffers.items()}
    leaves = {
        use.value: parameters[use.parameter].detach().requires_grad_(use.trainable)
        for use in program.parameters
    }
    tensors, constants = flatten_batch(batch)
    values = {**tensors_of(tensors), **leaves}
    values |= {use.value: buffers[use.buffer] for use in program.buffers}
    sizes = dict(match_batch(dag, tensors, constants, "the test"))
    executable = Executable(program, torch.device("cpu"))
    loss = executable.run(values, sizes, RandomAddress(0, 0, 0))[str(program.loss)]
    loss.backward()
    by_use = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Outcome(loss.detach(), total_gradients(program.parameters, [by_use]), buffers)


def build_without_dropout(name: str) -> Example:
    example = build(name)
    without_dropout(example.model)
    return example


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert torch.equal(found.loss, wanted.loss)
    assert_same_bits(found.gradients, wanted.gradients)
    assert_same_bits(found.buffers, wanted.buffers)


def assert_close_gradients(found: Outcome, wanted: Outcome) -> None:
    assert torch.equal(found.loss, wanted.loss)
    assert sorted(found.gradients) == sorted(wanted.gradients)
    for name, gradient in wanted.gradients.items():
        error = (found.gradients[name] - gradient).norm()
        assert error <= 1e-6 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SIMILAR else [])
        for name in ZOO
        if name != "bloom"
    ],
)
def test_captured_model_equals_eager_bit_for_bit_at_any_batch_shape(name: str) -> None:
    example, dag = build_without_dropout(name), dag_of(name, dropout=False)
    shapes = [(3,), (5, 17)] if name in SEQUENCE_MODELS else [(3,), (5,)]
    for shape in shapes:
        batch = example.batch(*shape)
        assert_same(captured(dag, example.model, batch), eager(example, batch))


# transformers' BLOOM calls an autograd.Function for its GELU, whose hand-written backward rounds
# differently from the derivative of its forward, which dagflow uses.
def test_captured_bloom_equals_eager_to_rounding() -> None:
    example, dag = build_without_dropout("bloom"), dag_of("bloom", dropout=False)
    for shape in ((3,), (5, 17)):
        batch = example.batch(*shape)
        assert_close_gradients(captured(dag, example.model, batch), eager(example, batch))


def test_captured_bloom_equals_eager_bit_for_bit_once_gelu_has_no_backward_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.bloom import modeling_bloom

    monkeypatch.setattr(
        modeling_bloom.BloomGelu, "forward", lambda _, x: modeling_bloom.bloom_gelu_forward(x)
    )
    example = build_without_dropout("bloom")
    dag = capture_example(example)
    batch = example.batch(5, 17)
    assert_same(captured(dag, example.model, batch), eager(example, batch))


def test_captured_batch_norm_moves_its_statistics() -> None:
    example = build_without_dropout("resnet")
    before = {name: tensor.clone() for name, tensor in example.model.named_buffers()}
    after = captured(dag_of("resnet", dropout=False), example.model, example.batch(3)).buffers
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before)
    assert_same_bits(dict(example.model.named_buffers()), before)
