"""What the loss doesn't need is stored once, not at every snapshot."""

from __future__ import annotations

import torch

from dagflow.training.initial_weights import Leftovers
from dagflow_storage import Snapshot, Store, commit_snapshot, delete_snapshot
from dagflow_tasks.train.state import BUFFER, PARAMETER, read_tensors, write_tensors


def bytes_written(store: Store, step: int) -> int:
    """Bytes of a snapshot's arrays that lie in its own folder."""
    snapshot = Snapshot.open(store, step)
    own = f"snapshots/step-{step:08d}/"
    return sum(o.size_bytes for path, o in snapshot.objects.items() if path.startswith(own))


def test_leftovers_are_written_once_and_referred_to_afterwards() -> None:
    store = Store("memory://leftovers")
    table, counts = torch.randn(1000, 50), torch.arange(1000)
    tensors = {(PARAMETER, "unused.table"): table, (BUFFER, "unused.counts"): counts}
    trained = {(PARAMETER, "trained"): torch.randn(2000)}
    commit_snapshot(store, 0, [write_tensors(store, 0, "initial", tensors | trained)], {})

    def save(step: int, leftovers: Leftovers) -> None:
        shard = write_tensors(store, step, "stage-0", trained)
        commit_snapshot(store, step, [shard, *leftovers.write(step)], {})

    class Owner:
        owned_parameters = (type("Use", (), {"parameter": "trained"}),)
        buffers = ()

    first = Leftovers(store, 0, [Owner()])  # type: ignore[list-item]
    save(1, first)
    save(2, first)
    resumed = Leftovers(store, 2, [Owner()])  # type: ignore[list-item]
    save(3, resumed)
    assert bytes_written(store, 1) > table.nbytes / 2
    assert bytes_written(store, 2) < 20_000
    assert bytes_written(store, 3) < 20_000
    for step in (0, 1, 2):
        delete_snapshot(store, step)
    newest = Snapshot.open(store, 3)
    assert torch.equal(read_tensors(newest, PARAMETER, ["unused.table"])["unused.table"], table)
    assert torch.equal(read_tensors(newest, BUFFER, ["unused.counts"])["unused.counts"], counts)
    # The weights that have changed since are not kept with them.
    assert not store.exists("snapshots/step-00000000")
