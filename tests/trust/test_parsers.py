"""Stores, folders and files of others: what can't be right is told by the right error, at no cost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from trust.parsers import PARSERS, DictStore, Parser

from dagflow.demo.language import resume_run
from dagflow.errors import (
    DamagedData,
    NotFound,
    ProgramInvalid,
    SettingsInvalid,
    StoreNotReadable,
)
from dagflow.models.groups import write_groups
from dagflow.models.source import of_folder
from dagflow.models.tokenizing import open_tokenizer, tokenizer_files
from dagflow.models.weight_files import WeightFiles
from dagflow.runs.export import STATE_DICT_NAMES, TIED_NAMES, num_tensors
from dagflow.runs.inspect import describe_run
from dagflow_storage import RunDirectory, SequenceLog, Store, commit_snapshot
from dagflow_storage.arrays.flat import FlatArray
from dagflow_storage.lease import _LeaseFiles
from dagflow_storage.records.manifest import _checksum as manifest_checksum
from dagflow_storage.records.sequences import _checksum as row_checksum

_MADE: dict[str, Parser] = {}


def parser(name: str) -> Parser:
    return _MADE.setdefault(name, PARSERS[name]())


def changed(name: str, place: str, value: Any) -> bytes:
    """A parser's right document, with another value at a place such as ``shards.0.path``."""
    document = json.loads(parser(name).right)
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    inner = document
    for step in way:
        inner = inner[step]
    inner[last] = value
    return json.dumps(document).encode()


def manifest(place: str, value: Any) -> bytes:
    document = json.loads(changed("manifest", place, value))
    return json.dumps({**document, "checksum": manifest_checksum(document)}).encode()


@pytest.mark.parametrize("name", PARSERS)
@given(rng=st.randoms(use_true_random=True))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_hostile_inputs_get_the_parsers_own_errors(name: str, rng: random.Random) -> None:
    one = parser(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about what it finds in a file
        with contextlib.suppress(*one.errors):
            one.read(one.hostile(rng))


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_right_is_read(name: str) -> None:
    parser(name).read(parser(name).right)


_DEEP = ["[" * 100_000, '{"a":' * 50_000]


@pytest.mark.parametrize("text", _DEEP, ids=["arrays", "objects"])
@pytest.mark.parametrize(
    "name",
    ["metadata", "manifest", "journal", "ledger", "model", "index", "configuration", "generation"],
)
def test_json_nested_beyond_the_stack_is_damage(name: str, text: str) -> None:
    one = parser(name)
    with pytest.raises(one.errors):
        one.read(text.encode())


@pytest.mark.parametrize("name", ["manifest", "journal", "ledger", "model", "index", "generation"])
def test_numbers_of_5000_digits_are_damage(name: str) -> None:
    one = parser(name)
    with pytest.raises(one.errors):
        one.read(b'{"format_version": ' + b"9" * 5000 + b"}")


# zarr


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("chunk_grid.configuration.chunk_shape", [0]),
        ("chunk_grid.configuration.chunk_shape", [-4]),
        ("chunk_grid.configuration.chunk_shape", [2**40]),
        ("chunk_grid.configuration.chunk_shape", [1, 1]),
        ("chunk_grid.configuration.chunk_shape", []),
        ("chunk_grid.configuration", {}),
        ("shape", [-1]),
        ("shape", [2**62]),
        ("shape", [2**70]),
        ("shape", "100"),
        ("shape", None),
        ("attributes", []),
        ("zarr_format", 4),
        ("codecs", 3),
        ("codecs", [3]),
        ("data_type", 3),
    ],
)
def test_metadata_that_no_array_has_is_damage(place: str, value: Any) -> None:
    with pytest.raises(DamagedData):
        parser("metadata").read(changed("metadata", place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("data_type", "string"),
        ("data_type", "object"),
        ("data_type", {"name": "null_terminated_bytes", "configuration": {"length_bytes": 0}}),
        ("data_type", "r16"),
        ("data_type", "datetime64"),
        ("codecs", [{"name": "numcodecs.pickle", "configuration": {}}]),
        ("codecs", [{"name": "sharding_indexed", "configuration": {}}]),
        ("chunk_grid", {"name": "rectilinear", "configuration": {}}),
        ("storage_transformers", [{"name": "x"}]),
        ("node_type", "group"),
    ],
)
def test_arrays_that_dagflow_never_writes_are_none_of_its_own(place: str, value: Any) -> None:
    with pytest.raises(NotFound, match="didn't write"):
        parser("metadata").read(changed("metadata", place, value))


def test_a_terabyte_that_a_store_has_no_chunks_of_is_not_allocated() -> None:
    stored = json.loads(parser("manifest").right)["shards"][0]["arrays"][0]
    array = FlatArray.create(DictStore(), "a", "float32", 2**38, 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedData):
            parser("manifest").read(manifest("shards.0.arrays.0", {**stored, "shape": [2**38]}))
        with pytest.raises(DamagedData, match="missing"):
            array.read(0, 2**38)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


# Snapshots, journals, leases, runs


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("shards.0.arrays.0.shape", [-1, -4]),
        ("shards.0.arrays.0.shape", [-4, -3]),
        ("shards.0.arrays.0.shape", [2**40, 2**40]),
        ("shards.0.arrays.0.shape", [4, 4]),
        ("shards.0.arrays.0.shape", 12),
        ("shards.0.arrays.0.offset", -12),
        ("shards.0.arrays.0.offset", 2**80),
        ("shards.0.arrays.0.offset", 1e300),
        ("shards.0.arrays.0.offset", 4),  # into the next array
        ("shards.0.arrays.0.dtype", "float64"),
        ("shards.0.arrays.0.dtype", "bfloat16"),
        ("shards.0.arrays.0.dtype", "object"),
        ("shards.0.arrays.0.array", ".."),
        ("shards.0.arrays.0.array", "../../other"),
        ("shards.0.arrays.0.array", "float32\0"),
        ("shards.0.arrays.0.array", "\ud800"),
        ("shards.0.path", "../../other"),
        ("shards.0.path", "/etc"),
        ("shards.0.path", ""),
        ("shards.0.objects", {"../x": "1 00000000"}),
        ("shards.0.objects", {"float32/c/0": "-1 00000000"}),
        ("shards.0.objects", {"float32/c/0": "1 zz"}),
        ("shards.0.objects", []),
        ("shards", {}),
        ("meta", []),
        ("step", 4),
        ("step", "3"),
        ("format_version", 1e999),
        ("format_version", True),
    ],
)
def test_manifests_that_contradict_themselves_are_damage(place: str, value: Any) -> None:
    with pytest.raises(DamagedData):
        parser("manifest").read(manifest(place, value))


def journal(place: str, value: Any) -> bytes:
    return changed("journal", f"attributes.dagflow_journal.{place}", value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("entries.0.arrays.0.shape", [-1, -12]),
        ("entries.0.arrays.0.shape", [-3, -4]),
        ("entries.0.arrays.0.shape", [2**62, 4]),
        ("entries.0.arrays.0.offset", -64),
        ("entries.0.arrays.0.offset", 2**40),
        ("entries.0.arrays.0.offset", 64),
        ("entries.0.arrays.0.stored_as", "|O"),
        ("entries.0.arrays.0.stored_as", "|S0"),
        ("entries.0.arrays.0.stored_as", "|V0"),
        ("entries.0.arrays.0.stored_as", "f4,f4"),
        ("entries.0.arrays.0.stored_as", ">f4"),
        ("entries.0.arrays.0.dtype", "float64"),
        ("entries.0.arrays.0.dtype", "object"),
        ("entries.0.arrays.0.name", 3),
        ("entries.0.facts", []),
        ("entries.0.facts.finite", "yes"),
        ("entries.0.facts.layouts", []),
        ("entries.0.facts.layouts.t.strides", [2**40, 1]),
        ("entries.0.facts.layouts.t.strides", [-1, 1]),
        ("entries.0.facts.layouts.t.shape", [9, 9]),
        ("entries.1.facts.non_finite", 3),
        ("entries.2.facts.decision", {"norm": "x"}),
        ("entries.0.kind", None),
        ("entries.0.stage", -1),
        ("entries", 3),
        ("format_version", None),
    ],
)
def test_journals_that_contradict_themselves_are_damage(place: str, value: Any) -> None:
    with pytest.raises(DamagedData):
        parser("journal").read(journal(place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", -1),
        ("step", True),
        ("step", "4"),
        ("step", 2**64),
        ("microbatches", [[0.5]]),
        ("microbatches", [[]]),
        ("microbatches", [["0.5", []]]),
        ("microbatches", [[0.5, [["s0", -8]]]]),
        ("microbatches", [[0.5, [[8, "s0"]]]]),
        ("microbatches", [[0.5, [], [["w.0", "x"]]]]),
        ("decision", {"norm": 1.0, "unknown": 2}),
        ("decision", []),
        ("samples", None),
    ],
)
def test_rows_of_a_ledger_that_no_step_has_are_damage(place: str, value: Any) -> None:
    with pytest.raises(DamagedData):
        parser("ledger").read(changed("ledger", place, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonce", "../../run"),
        ("nonce", "a/b"),
        ("nonce", "a\0"),
        ("epoch", 2),
        ("patience_seconds", float("inf")),
        ("patience_seconds", float("nan")),
        ("patience_seconds", 1e300),
        ("beat_seconds", -1),
        ("process", {"host": "h", "pid": 2**70}),
        ("process", {"host": "h", "pid": -1}),
        ("process", {"host": "h", "pid": 1, "machine": 3}),
        ("process", None),
    ],
)
def test_leases_that_nobody_holds_are_damage(key: str, value: Any, tmp_path: Path) -> None:
    holder = {**json.loads(parser("lease").right[0]), key: value}
    store = Store(tmp_path)
    store.write_bytes("lease/epoch-00000001.json", json.dumps(holder).encode())
    with pytest.raises(DamagedData, match="delete"):
        _LeaseFiles(store).read(1)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (1, {"at": -1}),
        (1, {"at": 5}),
        (1, {"at": "0"}),
        (1, {"tokens": [-5]}),
        (1, {"tokens": [1.5, 2]}),
        (1, {"tokens": 3}),
        (1, {"details": [[1.0]]}),
        (1, {"details": [["x"], ["y"]]}),
        (2, {"end": 3}),
    ],
)
def test_rows_of_a_sequence_hold_up_to_the_first_that_cannot(
    row: int, change: dict[str, Any]
) -> None:
    rows = [json.loads(line) for line in parser("sequences").right.splitlines()]
    rows[row] |= change
    del rows[row]["crc32c"]
    rows[row]["crc32c"] = row_checksum(rows[row])
    text = b"\n".join(json.dumps(one).encode() for one in rows)
    found = SequenceLog(DictStore({"sessions/a/part-00000000.jsonl": text}), "a").read()
    assert found.is_damaged
    assert found.num_rows == row
    assert found.tokens == ((), (5, 6))[row - 1]


def test_settings_that_no_run_has_are_damage_to_who_shows_them(tmp_path: Path) -> None:
    RunDirectory(Store(tmp_path)).create({"optimizer": 3})
    with pytest.raises(DamagedData, match=r"run\.json"):
        describe_run(str(tmp_path))


@pytest.mark.parametrize(
    "origin",
    [3, {"command": "train"}, {"command": "train", "files": ["/etc/passwd"], "more": 1}, ["demo"]],
    ids=str,
)
def test_commands_that_no_run_was_begun_by_are_not_run_again(origin: Any, tmp_path: Path) -> None:
    RunDirectory(Store(tmp_path)).create({"seed": 1}, {"origin": origin})
    with pytest.raises(DamagedData, match="how the run was begun"):
        resume_run(str(tmp_path), None)


@pytest.mark.parametrize("facts", [{"state_dict": 3}, {"tied": []}, {"state_dict": [[]]}], ids=str)
def test_names_of_no_state_dict_are_damage(facts: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    named = {{"state_dict": STATE_DICT_NAMES, "tied": TIED_NAMES}[n]: v for n, v in facts.items()}
    RunDirectory(store).create({"seed": 1}, named)
    commit_snapshot(store, 0, [], {})
    with pytest.raises(DamagedData, match=r"run\.json"):
        num_tensors(str(tmp_path), None)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(StoreNotReadable, match="no file"):
        RunDirectory(Store(tmp_path)).settings()


def test_a_file_larger_than_any_document_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(StoreNotReadable, match="too many"):
        RunDirectory(Store(tmp_path)).settings()


@pytest.mark.parametrize("loss", [[], {}, 0, False, ["m"]], ids=str)
def test_programs_whose_loss_has_no_name_are_refused(loss: Any) -> None:
    with pytest.raises(ProgramInvalid):
        parser("program").read(changed("program", "loss", loss))


# Models


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("tokenizer_files", ["../../.bashrc"]),
        ("tokenizer_files", ["/etc/passwd"]),
        ("tokenizer_files", [3]),
        ("groups.0.path", "../other"),
        ("groups.0.arrays.0.shape", [-2, -3]),
        ("groups.0.arrays.0.array", "../float32"),
        ("groups", {}),
        ("end_tokens", ["2"]),
        ("config", []),
        ("config", {"vocab_size": "many"}),
        ("max_tokens", "x"),
    ],
)
def test_descriptions_of_no_model_are_damage(place: str, value: Any) -> None:
    with pytest.raises(DamagedData, match="describes no model"):
        parser("model").read(changed("model", place, value))


def test_a_tokenizers_files_are_written_nowhere_else(tmp_path: Path) -> None:
    for name in ("../escaped", str(tmp_path / "escaped"), "a/../../escaped", "..", "a\0"):
        with pytest.raises(SettingsInvalid, match="no name of a tokenizer"):
            open_tokenizer("m", {"tokenizer.json": b"{}", name: b"x"})
    assert not (tmp_path / "escaped").exists()


def test_links_out_of_a_models_folder_are_not_followed_into_the_store(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(SettingsInvalid, match="outside of the model's folder"):
        tokenizer_files(folder)


def test_links_within_a_folder_and_a_cache_of_hugging_face_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "3f9a"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "77").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/77")
    (folder / "vocab.json").symlink_to("tokenizer.json")
    assert set(tokenizer_files(folder)) == {"tokenizer.json", "vocab.json"}


@pytest.mark.parametrize("file", ["../a.safetensors", "/tmp/a.safetensors", "..", "", 3, "a\0b"])
def test_an_index_names_files_of_its_folder_alone(file: Any, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(SettingsInvalid, match="is damaged"):
        WeightFiles(folder)


def _tensors(**described: Any) -> bytes:
    header = json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


_F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "data",
    [
        _tensors(w={**_F4, "shape": [-1, -4]}),
        _tensors(w={**_F4, "shape": [2**62, 4]}),
        _tensors(w={**_F4, "shape": [5]}),
        _tensors(w={**_F4, "data_offsets": [0, 2**40]}, v=_F4),
        _tensors(w={**_F4, "data_offsets": [8, 24]}),
        _tensors(w=_F4, v={**_F4, "data_offsets": [8, 24]}),
        _tensors(w={**_F4, "dtype": "O"}),
        _tensors(w={"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}),  # of no operator
        (2**63).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        b"",
    ],
)
def test_safetensors_that_contradict_themselves_are_refused(data: bytes) -> None:
    with pytest.raises(SettingsInvalid):
        parser("safetensors").read(data)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2**70},
        {"hidden_size": 10**30},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"rope_parameters": 3},
        {"vocab_size": -5},
        {"model_type": []},
        {"model_type": "nothing"},
    ],
    ids=str,
)
def test_configurations_that_no_model_has_are_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    config = {**json.loads(parser("configuration").right), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsInvalid):
        of_folder(tmp_path, torch.float32)


@pytest.mark.parametrize("said", ["x", [[]], ["x"], {"a": 1}, [1e999]], ids=str)
def test_generation_configurations_that_end_answers_with_nothing_are_refused(said: Any) -> None:
    one = parser("generation")
    with pytest.raises(SettingsInvalid, match=r"[mM]end"):
        one.read(json.dumps({**json.loads(one.right), "eos_token_id": said}).encode())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"[" * 100_000,
        lambda _: b"{}",
        lambda text: text.replace(b'"shape": [2]', b'"shape": [-2]'),
        lambda text: text.replace(b'"w"', b'"other"'),
    ],
)
def test_a_group_whose_index_is_spoilt_is_written_anew(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    (first,) = write_groups(store, [["w"]], lambda _: torch.ones(2))
    (again,) = write_groups(store, [["w"]], lambda _: torch.ones(2))
    assert again == first
    index = next(f"weights/{name}" for name in store.list("weights") if name.endswith(".json"))
    store.write_bytes(index, spoil(store.read_bytes(index)))
    (anew,) = write_groups(store, [["w"]], lambda _: torch.ones(2))
    assert anew["path"] != first["path"]
    assert anew["arrays"] == first["arrays"]
