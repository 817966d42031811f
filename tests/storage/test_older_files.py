"""What was written before is read: `older_store.zip` holds a run's files as they were at format 3.

Written once, by `write_shard`, `commit_snapshot`, `write_segment` and `RowLog.append`, into a folder
(arrays as they are) and into an object store (arrays in blosc2).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dagflow_storage import Snapshot, Store, newest_whole_snapshot
from dagflow_storage.records.journal import EntryKey, journalled_steps, read_segments
from dagflow_storage.records.rows import RowLog

OLDER = Path(__file__).with_name("older_store.zip")


@pytest.fixture(params=["folder", "objects"])
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    with zipfile.ZipFile(OLDER) as files:
        files.extractall(tmp_path)
    return Store(tmp_path / str(request.param))


def test_a_snapshot_that_was_written_before_is_read(older: Store) -> None:
    assert newest_whole_snapshot(older) == 4
    snapshot = Snapshot.open(older, 4)
    assert snapshot.meta["run_id"] == "old"
    weights = np.arange(12, dtype="<f4").reshape(3, 4) / 7
    moments = np.linspace(-1, 1, 12, dtype="<f4").reshape(3, 4)
    np.testing.assert_array_equal(snapshot.read("parameter", ["w"])["w"], weights)
    np.testing.assert_array_equal(snapshot.read("optimizer", ["w.exp_avg"])["w.exp_avg"], moments)


def test_a_journal_that_was_written_before_is_read(older: Store) -> None:
    assert journalled_steps(older, "plan") == [4]
    (segment,) = read_segments(older, "plan", 4, {1})
    sent, received = EntryKey("forward", 1, 0), EntryKey("backward", 1, 2)
    assert segment.facts == {sent: {"finite": True}, received: {"loss": 0.5}}
    activations = np.arange(64, dtype="<f4").reshape(4, 16)
    np.testing.assert_array_equal(segment.read(older, sent)["h"], activations)
    np.testing.assert_array_equal(segment.read(older, received)["h"], np.arange(8, dtype="<u2"))
    assert segment.dtypes(received) == {"h": "bfloat16"}
    assert {key.stage for s in read_segments(older, "plan", 4) for key in s.facts} == {1, 10}


def test_a_ledger_that_was_written_before_is_read(older: Store) -> None:
    assert RowLog(older, "ledger").read() == [{"step": 4, "samples": [[0, 1]]}]
