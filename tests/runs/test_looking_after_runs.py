"""`dagflow runs`: what it shows, and how it tells a damaged run from a whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made import Tied, invoke, make_run, take, tensors

from dagflow.runs.listing import verify_run
from dagflow_storage import RunDirectory, Store, delete_snapshot, walk
from dagflow_tasks.train.state import write_tensors


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return make_run(tmp_path / "runs" / "first", Tied())


def edit(store: Store, path: str, **changes: object) -> None:
    document = json.loads(store.read_bytes(path))
    store.write_bytes(path, json.dumps({**document, **changes}).encode())


@pytest.mark.parametrize("command", ["ls", "show", "verify", "gc", "export"])
def test_every_command_has_an_example(command: str) -> None:
    result = invoke("runs", command, "--help")
    assert result.exit_code == 0
    assert f"dagflow runs {command}" in result.output


def test_ls_lists_the_runs_below_a_folder(run: Store, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "second", Tied(), steps=(0, 1, 2, 3, 4, 5))
    (tmp_path / "runs" / "notes").mkdir()
    lines = invoke("runs", "ls", tmp_path / "runs").output.splitlines()
    assert lines[0].split() == ["run", "steps", "last", "loss", "snapshots", "size"]
    assert [line.split()[0] for line in lines[1:]] == ["first", "second"]
    assert lines[1].split()[1:6] == ["8", f"{1 / 9:.4f}", "0,", "4,", "8"]
    assert "0, ... 4, 5 (6)" in lines[2]
    assert lines[1].split()[-1] == "kB"


def test_ls_of_a_run_shows_that_run(run: Store) -> None:
    assert len(invoke("runs", "ls", run.url).output.splitlines()) == 2


def test_ls_of_nothing_says_so(tmp_path: Path) -> None:
    result = invoke("runs", "ls", tmp_path / "absent")
    assert result.exit_code == 0
    assert "no runs below" in result.output


def test_ls_goes_on_after_a_run_that_it_cannot_read(run: Store, tmp_path: Path) -> None:
    for name, content in (("newer", b'{"format_version": 9}'), ("bad", b"[")):
        make_run(tmp_path / "runs" / name, Tied()).write_bytes("run.json", content)
    make_run(tmp_path / "runs" / "half", Tied()).delete("run.json")
    result = invoke("runs", "ls", tmp_path / "runs")
    assert result.exit_code == 0
    by_name = {line.split()[0]: line for line in result.output.splitlines()}
    assert "upgrade dagflow" in by_name["newer"]
    assert "DamagedData" in by_name["bad"]
    assert "copied by half" in by_name["half"]
    assert "0, 4, 8" in by_name["first"]


def test_show_describes_snapshots_and_names_a_damaged_one(run: Store) -> None:
    edit(run, "snapshots/step-00000004/manifest.json", meta={})
    result = invoke("runs", "show", run.url)
    assert result.exit_code == 0
    assert "snapshots: 0, 4, 8" in result.output
    assert "step 4: DAMAGED" in result.output
    assert f"step 8, loss {1 / 9:.4f}" in result.output


def test_show_of_no_run_is_one_message(tmp_path: Path) -> None:
    result = invoke("runs", "show", tmp_path)
    assert result.exit_code == 1
    assert "holds no run" in result.output


@pytest.mark.parametrize("command", ["ls", "show", "verify", "gc"])
def test_an_unknown_protocol_is_one_message(command: str) -> None:
    result = invoke("runs", command, "gopher://bucket/run")
    assert result.exit_code == 1
    assert "fsspec knows no protocol 'gopher'" in result.output


# verify


def test_a_whole_run_verifies_with_status_0(run: Store) -> None:
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 0, result.output
    assert "whole snapshots: 0, 4, 8" in result.output


def test_a_deleted_chunk_is_named_with_status_1(run: Store) -> None:
    (chunk,) = Path(run.url).glob("snapshots/step-00000004/*/float32/c/0")
    chunk.unlink()
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert f"{chunk.relative_to(run.url)}: missing" in result.output
    assert "whole snapshots: 0, 8" in result.output


def test_a_hand_edited_manifest_is_named(run: Store) -> None:
    edit(run, "snapshots/step-00000008/manifest.json", meta={"loss": 0.0})
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert "changed after it was written, by hand" in result.output


def test_a_newer_format_is_no_damage_and_says_what_to_do(run: Store) -> None:
    run.write_bytes("snapshots/step-00000008/manifest.json", b'{"format_version": 9}')
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert "upgrade dagflow" in result.output
    assert "DAMAGED" not in result.output


def test_a_half_copied_run_is_told_from_a_whole_one(run: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.url, copy)
    (copy / "run.json").unlink()
    for chunk in copy.glob("snapshots/step-0000000[48]/*/float32/c/0"):
        chunk.unlink()
    result = invoke("runs", "verify", copy)
    assert result.exit_code == 1
    assert "run.json: missing, while there are snapshots" in result.output
    assert "whole snapshots: 0\n" in result.output


def test_a_snapshot_of_another_model_is_named(run: Store, tmp_path: Path) -> None:
    take(run, Tied(width=4), 12)
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert (
        "of another model: parameter 'table.weight' is float32[5, 4] there and float32[5, 3] in "
        "this run" in result.output
    )


def test_a_snapshot_of_another_run_of_the_same_model_is_named(run: Store) -> None:
    take(run, Tied(), 12, run_id=RunDirectory(run).run_id)
    assert invoke("runs", "verify", run.url).exit_code == 0
    take(run, Tied(), 16, run_id="another")
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert "of run another" in result.output


def test_damaged_metrics_are_named(run: Store) -> None:
    run.write_bytes("metrics/part-00000001.jsonl", b'{"step":')
    result = invoke("runs", "verify", run.url)
    assert result.exit_code == 1
    assert "part-00000001.jsonl" in result.output


def test_a_snapshot_that_the_run_deletes_meanwhile_is_no_damage(run: Store) -> None:
    seen: list[str] = []

    def delete_others(path: str) -> None:
        if not seen:
            delete_snapshot(run, 0)
            delete_snapshot(run, 4)
        seen.append(path)

    report = verify_run(run.url, delete_others)
    assert report.is_whole
    assert 8 in report.whole
    assert 4 not in report.snapshots


def test_verifying_nothing_is_an_error(tmp_path: Path) -> None:
    result = invoke("runs", "verify", tmp_path)
    assert result.exit_code == 1
    assert "neither run.json nor a snapshot" in result.output


# gc


def test_gc_tells_first_and_deletes_then(run: Store) -> None:
    unfinished = write_tensors(run, 12, "stage-0", tensors(Tied(), 12))
    before = [found.path for found in walk(run)]
    told = invoke("runs", "gc", run.url, "--dry-run", "--idle")
    assert [found.path for found in walk(run)] == before
    assert unfinished.path in told.output
    assert "would be deleted: " in told.output
    done = invoke("runs", "gc", run.url, "--idle")
    assert f"deleted {unfinished.path}" in done.output
    assert [found.path for found in walk(run, "snapshots/step-00000012")] == []
    assert invoke("runs", "verify", run.url).exit_code == 0
    assert "deleted: 0 objects" in invoke("runs", "gc", run.url, "--idle").output


def test_gc_spares_what_is_young_and_says_how_to_insist(run: Store) -> None:
    write_tensors(run, 12, "stage-0", tensors(Tied(), 12))
    result = invoke("runs", "gc", run.url)
    assert "deleted: 0 objects" in result.output
    assert "--idle" in result.output
    assert list(walk(run, "snapshots/step-00000012"))


def test_gc_deletes_nothing_where_no_run_is(run: Store) -> None:
    run.delete("run.json")
    before = [found.path for found in walk(run)]
    result = invoke("runs", "gc", run.url, "--idle")
    assert result.exit_code == 1
    assert "Nothing was deleted" in result.output
    assert [found.path for found in walk(run)] == before
