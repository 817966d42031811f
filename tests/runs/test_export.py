"""What is exported is what the model's own state_dict would hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made import Tied, invoke, make_run
from safetensors import safe_open
from safetensors.torch import load_file

from dagflow.errors import DamagedData, NotFound, SettingsInvalid
from dagflow.runs import export as module
from dagflow.runs.export import export
from dagflow_storage import Store


@pytest.fixture
def model() -> Tied:
    return Tied()


@pytest.fixture
def run(model: Tied, tmp_path: Path) -> Store:
    return make_run(tmp_path / "run", model)


def expected(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    return {n: t + step if n in parameters else t for n, t in state.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize(("format", "load"), [("safetensors", load_file), ("torch", load_torch)])
@pytest.mark.parametrize("step", [4, 8])
def test_an_export_loads_into_the_model_tied_names_included(
    run: Store, model: Tied, tmp_path: Path, format: Any, load: Callable[..., Any], step: int
) -> None:
    done = export(run.url, tmp_path / "out", format=format, step=step)
    assert (done.step, done.note) == (step, None)
    found = load(tmp_path / "out")
    assert_same(found, expected(model, step))
    Tied().load_state_dict(found)


def test_tied_names_share_memory_in_torchs_file(run: Store, tmp_path: Path) -> None:
    export(run.url, tmp_path / "out.pt", format="torch")
    found = load_torch(tmp_path / "out.pt")
    assert found["head.weight"].data_ptr() == found["table.weight"].data_ptr()


def test_the_newest_step_is_the_default(run: Store, tmp_path: Path) -> None:
    assert export(run.url, tmp_path / "out", format="torch").step == 8


def test_tensors_in_a_safetensors_file_are_aligned_and_the_library_reads_it(
    run: Store, tmp_path: Path
) -> None:
    export(run.url, tmp_path / "out.safetensors", format="safetensors")
    data = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "I64": 8, "BF16": 2, "BOOL": 1}
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(h["data_offsets"][0] % sizes[h["dtype"]] == 0 for h in header.values())
    with safe_open(str(tmp_path / "out.safetensors"), "pt") as opened:
        assert set(opened.keys()) == header.keys()


def test_a_safetensors_file_is_written_with_memory_for_a_few_tensors(
    run: Store, model: Tied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 20)
    seen: list[str] = []
    export(run.url, tmp_path / "out", format="safetensors", on_tensor=seen.append)
    assert sorted(seen) == sorted(model.state_dict())
    assert_same(load_file(tmp_path / "out"), expected(model, 8))


def gpt2() -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def test_a_hugging_face_folder_is_one_that_from_pretrained_takes(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    run = make_run(tmp_path / "run", model)
    export(run.url, tmp_path / "tuned", format="hf", step=4, config=tmp_path / "original")
    files = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "tuned", output_loading_info=True
    )
    assert not any(report.values())
    assert_same(dict(loaded.state_dict()), expected(model, 4))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


# What can't be exported


def test_a_run_that_does_not_know_its_models_names_exports_all_with_a_note(
    model: Tied, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "old", model, facts={})
    done = export(run.url, tmp_path / "out", format="safetensors")
    assert done.note is not None
    found = load_file(tmp_path / "out")
    assert set(found) == {*expected(model, 8), "mask"} - {"head.weight"}


def test_a_snapshot_of_another_model_is_refused(run: Store, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", torch.nn.Linear(2, 2), steps=(8,))
    (Path(run.url) / "snapshots/step-00000008").rename(tmp_path / "old")
    (Path(other.url) / "snapshots/step-00000008").rename(Path(run.url) / "snapshots/step-00000008")
    with pytest.raises(NotFound, match=r"lacks \d+ of the model's tensors.*another model"):
        export(run.url, tmp_path / "out", format="torch", step=8)


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_damaged_snapshot_leaves_no_file(run: Store, tmp_path: Path, format: Any) -> None:
    for chunk in Path(run.url).glob("snapshots/step-00000008/*/float32/c/0"):
        chunk.write_bytes(chunk.read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DamagedData, match="float32/c/0"):
        export(run.url, tmp_path / "out", format=format)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(run: Store, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SettingsInvalid, match="exists already"):
        export(run.url, tmp_path / "out", format="torch")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_step_without_snapshot_is_answered_with_those_there_are(
    run: Store, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"step 5; complete are: \[0, 4, 8\]"):
        export(run.url, tmp_path / "out", format="torch", step=5)


@pytest.mark.parametrize(("config", "words"), [(None, "--config FOLDER"), (".", "no config.json")])
def test_a_hugging_face_folder_needs_a_configuration(
    run: Store, tmp_path: Path, config: str | None, words: str
) -> None:
    folder = None if config is None else tmp_path
    with pytest.raises(SettingsInvalid, match=words):
        export(run.url, tmp_path / "out", format="hf", config=folder)
    assert not (tmp_path / "out").exists()


def test_the_command_exports(run: Store, model: Tied, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.safetensors"
    result = invoke("runs", "export", run.url, "--step", 4, "--format", "safetensors", "--to", out)
    assert result.exit_code == 0, result.output
    assert f"{len(model.state_dict())} tensors of step 4" in result.output
    assert_same(load_file(out), expected(model, 4))
    again = invoke("runs", "export", run.url, "--format", "safetensors", "--to", out)
    assert again.exit_code == 1
    assert "exists already" in again.output
