"""The command line: what it shows, and how it says no."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from distributed import Client
from processes import BIN
from small import batches, example, train

import dagflow
from dagflow.cli import main
from dagflow.graph.dag import OperatorDag


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["train", "join", "demo", "inspect", "runs"])
def test_every_help_text_has_examples(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert result.output.count(f"dagflow {command}") >= 3


def test_help_is_there_under_dask_too() -> None:
    done = subprocess.run(
        [BIN / "dask", "dagflow", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    for command in ("train", "join", "demo", "inspect", "runs"):
        assert command in done.stdout


def test_inspect_shows_a_run_and_its_programs(client: Client, tmp_path: Path) -> None:
    of = example()
    run = tmp_path / "run"
    result = train(of, batches(of, 5), run, client=client, num_stages=2, snapshot_every=2)
    shown = invoke("inspect", run)
    assert shown.exit_code == 0
    for words in (
        "AdamW(lr=0.001)",
        "4 micro-batches, fp32, seed 0",
        "steps: 5",
        f"{result.losses[0]:.4f}",
        f"{result.losses[-1]:.4f}",
        "snapshots: 2, 4, 5",
    ):
        assert words in shown.output
    (program,) = (run / "programs").glob("*/stage-001.json")
    shown = invoke("inspect", program)
    assert shown.exit_code == 0
    for words in ("stage 1 of 2", "inputs: in.1 (batch)", "loss", "aten.cross_entropy_loss"):
        assert words in shown.output


def test_a_trained_run_verifies_and_exports_what_was_trained(
    client: Client, tmp_path: Path
) -> None:
    of = example()
    run = tmp_path / "run"
    result = train(of, batches(of, 5), run, client=client, num_stages=2, snapshot_every=2)
    verified = invoke("runs", "verify", run)
    assert verified.exit_code == 0, verified.output
    assert "whole snapshots: 2, 4, 5" in verified.output
    assert "deleted: 0 objects" in invoke("runs", "gc", run, "--idle", "--dry-run").output
    exported = invoke("runs", "export", run, "--format", "torch", "--to", tmp_path / "out.pt")
    assert exported.exit_code == 0, exported.output
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = result.state_dict()
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def dag() -> OperatorDag:
    of = example()
    return dagflow.capture(of.model, batches(of, 1)[0], loss=of.loss)


def test_inspect_shows_and_draws_a_dag(dag: OperatorDag, tmp_path: Path) -> None:
    file, dot = tmp_path / "dag.json", tmp_path / "dag.dot"
    file.write_text(dag.to_json())
    shown = invoke("inspect", file)
    assert shown.exit_code == 0
    assert shown.output.strip() == str(dag).strip()
    drawn = invoke("inspect", file, "--dot", dot)
    assert drawn.exit_code == 0
    assert str(dot) in drawn.output
    assert dot.read_text().startswith("digraph")


def test_inspect_refuses_what_it_cannot_show(dag: OperatorDag, tmp_path: Path) -> None:
    body = json.loads(dag.to_json())
    contents = {
        "text.json": ("not JSON", "isn't JSON"),
        "list.json": ("[1, 2]", "format"),
        "other.json": ('{"format": "something"}', "'something'"),
        "newer.json": (json.dumps({**body, "format_version": 99}), "99"),
        "binary.json": ("\0\0", "JSON"),
    }
    for name, (text, words) in contents.items():
        (tmp_path / name).write_text(text)
        refused = invoke("inspect", tmp_path / name)
        assert (refused.exit_code, type(refused.exception)) == (1, SystemExit), name
        assert words in refused.output
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "bytes.json", tmp_path / "empty", tmp_path / "nowhere"):
        refused = invoke("inspect", path)
        assert (refused.exit_code, type(refused.exception)) == (1, SystemExit), path
        assert path.name in refused.output


def test_train_learns_a_text_file_and_goes_on_with_it(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options = [
        *("--layers", "1", "--width", "32", "--batch-size", "4", "--sequence-length", "16"),
        *("--microbatches", "2", "--scheduler", client.scheduler.address),
        *("--store", str(tmp_path / "run")),
    ]
    done = invoke("train", text, *options, "--steps", "3")
    assert done.exit_code == 0, done.output
    assert "in 3 steps" in done.output
    assert f"dagflow inspect {tmp_path / 'run'}" in done.output
    assert invoke("inspect", tmp_path / "run").exit_code == 0
    refused = invoke("train", text, *options, "--steps", "3", "--lr", "0.5")
    assert refused.exit_code == 1
    assert "StoreHoldsAnotherRun" in refused.output
    assert "optimizer.options.lr" in refused.output


def test_train_says_what_is_wrong_with_its_arguments(client: Client, tmp_path: Path) -> None:
    missing = invoke("train", tmp_path / "nowhere.txt", "--store", tmp_path / "run")
    assert missing.exit_code != 0
    assert "nowhere.txt" in missing.output
    text = tmp_path / "text.txt"
    text.write_text("word " * 500)
    for arguments in (["--stages", "many"], ["--precision", "fp8"], ["--steps", "-1"]):
        refused = invoke(
            "train", text, *arguments, "--layers", "1", "--width", "32",
            "--store", tmp_path / "run", "--scheduler", client.scheduler.address,
        )  # fmt: skip
        assert refused.exit_code != 0
        assert type(refused.exception) is SystemExit, arguments
        assert arguments[1] in refused.output
    assert torch.get_num_threads() == 1
