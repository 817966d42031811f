"""Recurrent layers are captured for training as one operator each: soon, for any length, to the bit."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from zoo.recurrent import recurrent_model

from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.partition import partition
from dagflow_tasks.program.interpreter import Executable, RandomAddress

FAMILIES = {
    "mamba": "dagflow.selective_scan.default",
    "mamba2": "dagflow.state_space_chunks.default",
    "qwen3_next": "dagflow.delta_rule_chunks.default",
    "kimi_linear": "dagflow.kimi_delta_chunks.default",
    "recurrent_gemma": "dagflow.linear_recurrence.default",
    "rwkv": "dagflow.weighted_sums.default",
    "minimax": "dagflow.lightning_blocks.default",
    "xlstm": "dagflow.matrix_memory.default",
}
MOST_SECONDS = 10.0


# Keys that heads share would go through another attention kernel while it is traced than when it runs.
OWN_KEYS = {
    family: {"num_key_value_heads": 4} for family in ("qwen3_next", "minimax", "recurrent_gemma")
}
# xLSTM's chunks of 64 tokens can't be trained: they are written in place.
LONGER = {"xlstm": 40}


def _batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (2, length))
    return {"input_ids": ids, "labels": ids}


def _run(dag: OperatorDag, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Return the captured loss, and gradients by parameter."""
    program = partition(dag, 1).programs[0]
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    leaves = {
        use.value: tensors[use.parameter].detach().clone().requires_grad_()
        for use in program.parameters
    }
    given = {f"in.{name}": tensor for name, tensor in batch.items()}
    given |= {use.value: tensors[use.buffer] for use in program.buffers}
    sizes = {symbol.name: batch[symbol.input[3:]].shape[symbol.dim] for symbol in dag.symbols}
    values = {n: v for n, v in {**given, **leaves}.items() if n in program.defined_values()}
    loss = Executable(program, torch.device("cpu")).run(values, sizes, RandomAddress(0, 0, 0))
    loss[dag.loss].backward()
    found: dict[str, torch.Tensor] = {}
    for use in program.parameters:  # a tied one has several
        gradient = leaves[use.value].grad
        if gradient is not None:
            found[use.parameter] = found.get(use.parameter, 0) + gradient
    return loss[dag.loss], found


@pytest.mark.parametrize(
    "family",
    ["mamba2", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "mamba2")],
)
def test_captured_once_they_train_at_any_length_to_the_bit(family: str) -> None:
    torch.manual_seed(0)
    model = recurrent_model(family, **OWN_KEYS.get(family, {})).train()
    begin = time.process_time()
    dag = capture(model, _batch(12))
    assert time.process_time() - begin < MOST_SECONDS
    assert FAMILIES[family] in {node.op for node in dag.nodes}
    for length in (12, LONGER.get(family, 70)):  # one chunk, and two
        batch = _batch(length)
        model.zero_grad()
        wanted = model(**batch).loss
        wanted.backward()
        loss, gradients = _run(OperatorDag.from_json(dag.to_json()), model, batch)
        assert torch.equal(loss, wanted)
        parameters = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert parameters.keys() == gradients.keys()
        assert [n for n, g in parameters.items() if not torch.equal(g, gradients[n])] == []
