from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagflow_storage import (
    DagflowError,
    DamagedData,
    FormatTooNew,
    NotFound,
    RunDirectory,
    Store,
    StoreHoldsAnotherRun,
    settings_diff,
)
from dagflow_storage.records.rows import RowLog

SETTINGS = {"optimizer": {"name": "adamw", "options": {"lr": 0.0003}}, "steps": 100}


def test_a_run_keeps_its_settings_and_id(store: Store) -> None:
    run = RunDirectory(store)
    assert not run.exists()
    run.create(SETTINGS)
    assert run.exists()
    assert RunDirectory(store).settings() == SETTINGS
    assert RunDirectory(store).run_id == run.run_id
    assert len(run.run_id) == 32


def test_a_second_run_is_refused_and_told_what_differs(store: Store) -> None:
    RunDirectory(store).create(SETTINGS)
    with pytest.raises(StoreHoldsAnotherRun, match="steps: 100 -> 7"):
        RunDirectory(store).create({**SETTINGS, "steps": 7})
    assert RunDirectory(store).settings() == SETTINGS


def test_of_two_creators_one_wins(store: Store) -> None:
    def create(steps: int) -> int | None:
        try:
            RunDirectory(store).create({"steps": steps})
        except StoreHoldsAnotherRun:
            return None
        return steps

    with ThreadPoolExecutor(2) as pool:
        winners = [steps for steps in pool.map(create, [1, 2]) if steps is not None]
    assert [RunDirectory(store).settings()["steps"]] == winners


def test_a_lost_answer_is_not_taken_for_a_lost_race(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create_bytes

    def answer_lost(self: Store, path: str, data: bytes) -> bool:
        assert create(self, path, data)
        return create(self, path, data)

    monkeypatch.setattr(Store, "create_bytes", answer_lost)
    RunDirectory(memory).create(SETTINGS)
    assert RunDirectory(memory).settings() == SETTINGS


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", DamagedData),
        (b'{"format_version": 1}', DamagedData),
        (b'{"format_version": 2}', FormatTooNew),
    ],
)
def test_a_run_file_that_makes_no_sense_is_refused(
    memory: Store, content: bytes, error: type[DagflowError]
) -> None:
    memory.write_bytes("run.json", content)
    with pytest.raises(error, match=r"run\.json"):
        RunDirectory(memory).settings()


def test_programs_come_back_by_stage(store: Store) -> None:
    run = RunDirectory(store)
    programs = [f'{{"stage": {stage}}}' for stage in range(12)]
    run.write_programs("train", programs)
    run.write_programs("train", programs[:11])
    assert run.read_programs("train") == programs[:11]


def test_half_written_programs_are_not_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(store)
    run.write_programs("train", ["{}", "{}"])
    write = Store.write_bytes

    def crash_at_second(self: Store, path: str, data: bytes) -> None:
        if path.endswith("stage-001.json"):
            raise KeyboardInterrupt
        write(self, path, data)

    monkeypatch.setattr(Store, "write_bytes", crash_at_second)
    with pytest.raises(KeyboardInterrupt):
        run.write_programs("train", ["[]", "[]"])
    with pytest.raises(NotFound, match="programs/train"):
        run.read_programs("train")


def test_facts_are_kept_beside_the_settings_and_compared_by_nobody(store: Store) -> None:
    RunDirectory(store).create(SETTINGS, {"tied": {"head": "table"}})
    assert RunDirectory(store).facts() == {"tied": {"head": "table"}}
    assert RunDirectory(store).settings() == SETTINGS


def test_a_run_of_an_older_dagflow_has_no_facts(memory: Store) -> None:
    memory.write_bytes("run.json", b'{"format_version": 1, "run_id": "a", "settings": {}}')
    assert RunDirectory(memory).facts() == {}


def rows(*steps: int, by: str = "") -> list[dict[str, Any]]:
    return [{"step": step, "by": by} for step in steps]


def test_metrics_are_read_by_step(store: Store) -> None:
    run = RunDirectory(store)
    assert run.read_metrics() == []
    run.append_metrics([])
    run.append_metrics(rows(1, 0))
    run.append_metrics(rows(2, 3, 3))
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2, 3, 3]


def test_the_last_row_is_found_without_reading_those_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(store)
    assert run.read_last_metrics() is None
    for start in (0, 10, 20):
        RunDirectory(store).append_metrics(rows(*range(start, start + 10)))
    read: list[str] = []
    original = Store.read_bytes

    def recording(self: Store, path: str) -> bytes:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(Store, "read_bytes", recording)
    assert run.read_last_metrics() == rows(29)[0]
    assert read == ["metrics/part-00000020.jsonl"]


def test_rows_since_a_step_cost_as_many_objects_however_long_the_run(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Store.read_bytes

    def recording(self: Store, path: str) -> bytes:
        read.append(path)
        return original(self, path)

    monkeypatch.setattr(Store, "read_bytes", recording)
    run, counts = RunDirectory(memory), []
    for end in (1000, 2000):
        for start in range(end - 1000, end, 8):
            run.ledger.append(rows(*range(start, start + 8)))
        read.clear()
        assert run.ledger.read(since=end - 200) == rows(*range(end - 200, end))
        counts.append(len(read))
    assert counts[1] <= 1.1 * counts[0]
    assert counts[0] <= 5


def test_rows_since_a_step_are_those_that_hold(memory: Store) -> None:
    run = RunDirectory(memory)
    for start in (0, 10, 20, 30):
        RunDirectory(memory).append_metrics(rows(*range(start, start + 10)))
    run.append_metrics(rows(15, 16))
    log = RowLog(memory, "metrics")
    every = log.read()
    for since in (0, 9, 10, 14, 15, 16, 17, 40):
        assert log.read(since) == [row for row in every if row["step"] >= since]


def test_a_rollback_supersedes_what_did_not_happen(store: Store) -> None:
    run = RunDirectory(store)
    for start in (0, 10, 20, 30):
        run.append_metrics(rows(*range(start, start + 10), by="before"))
    run.append_metrics(rows(15, 16, by="after"))
    found = run.read_metrics()
    assert [row["step"] for row in found] == list(range(17))
    assert [row["by"] for row in found] == ["before"] * 15 + ["after"] * 2


def test_small_additions_share_a_part_until_it_is_long_enough(store: Store) -> None:
    run = RunDirectory(store)
    for step in range(100):
        run.append_metrics(rows(step))
    assert run.read_metrics() == rows(*range(100))
    assert store.list("metrics") == ["part-00000000.jsonl", "part-00000064.jsonl"]


def test_the_same_first_step_replaces(store: Store) -> None:
    run = RunDirectory(store)
    run.append_metrics(rows(5, 6, by="first"))
    run.append_metrics(rows(5, by="second"))
    assert run.read_metrics() == rows(5, by="second")


def test_a_crash_in_a_rollback_leaves_no_row_that_never_came_true(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in (0, 10, 20):  # a writer each, so that each has a part
        RunDirectory(store).append_metrics(rows(*range(start, start + 10)))
    run = RunDirectory(store)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "write_bytes", crash)
        run.append_metrics(rows(5))
    assert [row["step"] for row in run.read_metrics()] == list(range(10))


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), max_size=8))
@settings(deadline=None, max_examples=60)
def test_metrics_are_what_a_log_with_truncation_would_hold(appended: list[list[int]]) -> None:
    root = Store("memory://")
    name = f"metrics-{id(appended)}"
    expected: list[tuple[int, str]] = []
    run = RunDirectory(root.child(name))
    try:
        for number, steps in enumerate(appended):
            run.append_metrics(rows(*steps, by=str(number)))
            kept = [row for row in expected if row[0] < min(steps)]
            expected = kept + [(step, str(number)) for step in steps]
        found = [(row["step"], row["by"]) for row in run.read_metrics()]
    finally:
        root.delete(name)
    assert found == sorted(expected, key=lambda row: row[0])


@pytest.mark.parametrize("row", [{}, {"step": "3"}, {"step": -1}, {"step": 1.0}])
def test_a_row_without_a_step_is_refused(memory: Store, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="step"):
        RunDirectory(memory).append_metrics([row])


def test_damaged_metrics_are_named(memory: Store) -> None:
    memory.write_bytes("metrics/part-00000004.jsonl", b'{"step": 4')
    with pytest.raises(DamagedData, match=r"part-00000004\.jsonl"):
        RunDirectory(memory).read_metrics()


def test_settings_diff_reads_like_a_sentence() -> None:
    old = {"optimizer": {"options": {"lr": 0.0003}}, "seed": 1, "gone": None, "shape": (1, 2)}
    new = {"optimizer": {"options": {"lr": 0.001}}, "seed": 1, "new": {"x": "y"}, "shape": [1, 2]}
    assert settings_diff(old, new) == [
        "gone: None -> (absent)",
        "new.x: (absent) -> 'y'",
        "optimizer.options.lr: 0.0003 -> 0.001",
    ]
    assert settings_diff(old, old) == []
