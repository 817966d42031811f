"""What a stage takes of its worker's memory follows from what is trained, and how."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from inline import assert_same_bits, run_inline
from torch import nn
from torch.nn.functional import cross_entropy
from zoo import Example

from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.plan.memory import StageNeeds, worker_bytes
from dagflow.plan.partition import partition
from dagflow.plan.training_memory import TrainingMemory
from dagflow_storage import Snapshot, list_snapshots
from dagflow_tasks.train.optimizer import Optimizer

VOCABULARY, WIDTH, ROWS = 64, 16, 4
TABLE_BYTES = VOCABULARY * WIDTH * 4


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (Optimizer("SGD", lr=0.1), 0.0),
        (Optimizer("SGD", lr=0.1, momentum=0.9), 1.0),
        (Optimizer("AdamW", lr=0.1), 2.0),
        (Optimizer("AdamW", lr=0.1, amsgrad=True), 3.0),
        (Optimizer("SGD", lr=0.1).override("head", momentum=0.9), 1.0),
    ],
    ids=str,
)
def test_an_optimizers_moments_are_counted(optimizer: Optimizer, moments: float) -> None:
    assert optimizer.moments() == moments


class Adapted(nn.Module):
    """A frozen table that is embedding and head, and a small layer between that is trained."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.table.weight.requires_grad_(not frozen)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(tokens)) @ self.table.weight.T


def batch(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(VOCABULARY, (rows,)), torch.randint(VOCABULARY, (rows,))


@cache
def adapted(*, frozen: bool) -> tuple[Example, OperatorDag]:
    example = Example(Adapted(frozen=frozen), batch, cross_entropy)
    return example, capture(example.model, example.batch(ROWS), loss=example.loss)


def test_frozen_weights_count_once_and_trained_ones_with_all_that_training_keeps() -> None:
    layer = (WIDTH * WIDTH + WIDTH) * 4
    bare = TrainingMemory(moments=2.0, copies=False, journal_steps=0)

    def state(frozen: bool, training: TrainingMemory) -> int:
        return (
            partition(adapted(frozen=frozen)[1], 1, training=training)
            .estimates[0]
            .needs.state_bytes
        )

    assert state(True, bare) == TABLE_BYTES + 4 * 2 * layer
    # A sum of gradients for each of the table's two uses.
    assert state(False, bare) == 5 * TABLE_BYTES + 4 * 2 * layer
    copied = TrainingMemory(moments=2.0, copies=True, journal_steps=0)
    assert state(True, copied) == TABLE_BYTES + 7 * 2 * layer
    sgd = TrainingMemory(moments=0.0, copies=True, journal_steps=0)
    assert state(True, sgd) == TABLE_BYTES + 3 * 2 * layer


def test_an_update_with_clipping_takes_a_copy_of_the_gradients_beside_no_activations() -> None:
    _, dag = adapted(frozen=False)

    def total(needs: StageNeeds, in_flight: int) -> int:
        return worker_bytes([replace(needs, in_flight=in_flight)])

    plain, clipped = (
        partition(dag, 1, training=TrainingMemory(scaled=scaled)).estimates[0].needs
        for scaled in (False, True)
    )
    gradients = TABLE_BYTES + 2 * (WIDTH * WIDTH + WIDTH) * 4
    assert total(clipped, 0) == total(plain, 0) + gradients
    assert total(clipped, 100) == total(plain, 100)


def test_a_frozen_table_that_two_stages_use_is_read_by_both_and_lent_by_none() -> None:
    example, dag = adapted(frozen=True)
    uncut = run_inline(example, 1, dag=dag)
    wanted = uncut.weights(5)
    cut = run_inline(example, 2, dag=dag)
    assert [p.lenders for p in cut.cut.programs] == [(), ()]
    assert cut.graph.loans == {}
    assert not any(str(key[0]).startswith("lend") for key in cut.results)
    for estimate in cut.cut.estimates:
        assert estimate.needs.weight_bytes >= TABLE_BYTES
    assert cut.losses == uncut.losses
    assert_same_bits(cut.weights(5), wanted)
    newest = Snapshot.open(cut.store, list_snapshots(cut.store)[-1])
    assert [role for role, name in newest.arrays if name == "table.weight"] == ["parameter"]


def test_a_trained_table_that_two_stages_use_is_lent_as_ever() -> None:
    example, dag = adapted(frozen=False)
    uncut, cut = (run_inline(example, num_stages, dag=dag) for num_stages in (1, 2))
    assert [p.lenders for p in cut.cut.programs] == [(), (0,)]
    assert cut.losses == uncut.losses


def test_what_waits_for_the_journal_is_bounded() -> None:
    training = TrainingMemory(num_microbatches=8, journal_steps=2)
    assert training.sent(1000) == 16_000
    assert training.sent(1 << 40) <= 1 << 30
    assert TrainingMemory(journal_steps=0).sent(1000) == 0
