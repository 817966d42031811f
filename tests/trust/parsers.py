"""All parsers of what others send or have written: a right input, a hostile one, and how it is read.

Each lets through what is right, and answers everything else with the errors that are named here.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from distributed.protocol import deserialize, serialize
from safetensors.torch import save as save_safetensors
from trust.mutations import broken, document, mutated

from dagflow.errors import (
    DamagedData,
    FormatTooNew,
    GarbageReceived,
    NotFound,
    ProgramInvalid,
    SettingsInvalid,
    StoreUnreachable,
)
from dagflow.models.defaults import read_generation
from dagflow.models.model import Model
from dagflow.models.source import _config
from dagflow.models.tokenizing import open_tokenizer
from dagflow.models.weight_files import WeightFiles
from dagflow.serving import kept
from dagflow.swarm import wire
from dagflow.training.seen import SeenBatches
from dagflow_storage import (
    ArraySpec,
    RetryPolicy,
    RunDirectory,
    SequenceLog,
    Snapshot,
    Store,
    TokenArray,
    commit_snapshot,
    hold_lease,
    walk,
    write_arrays,
    write_shard,
    write_tokens,
)
from dagflow_storage.arrays.codec import Blosc2Codec
from dagflow_storage.arrays.flat import FlatArray
from dagflow_storage.faults import FakeClock
from dagflow_storage.lease import _LeaseFiles
from dagflow_storage.place.backends import Backend
from dagflow_storage.place.bounded_json import JsonLimits, JsonRefused, parse_json
from dagflow_storage.records.journal import EntryKey, read_segments, write_segment
from dagflow_storage.records.manifest import _checksum
from dagflow_storage.records.rows import RowLog
from dagflow_storage.records.sequences import _checksum as row_checksum
from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.stage_program import (
    BufferUse,
    Constant,
    ParameterUse,
    StageInput,
    StageOutput,
    StageProgram,
    ValueSpec,
)
from dagflow_tasks.tensors import TensorDict
from dagflow_tasks.train.references import Microbatch
from dagflow_tasks.train.replay import StepRecord
from dagflow_tasks.train.results import BackwardResult, Decision
from dagflow_tasks.train.state import read_tensors
from dagflow_tasks.train.worker_journal import Sent, encode, read_sent

STORED = (DamagedData, FormatTooNew, NotFound, StoreUnreachable)


@dataclass(frozen=True)
class Parser:
    """A parser, and what to try on it.

    Attributes
    ----------
    hostile
        Makes an input from random numbers.
    read
        Parses an input.
    errors
        All that it may raise.
    right
        An input that it must read.
    weight
        How many inputs it gets, in comparison; slow ones fewer.
    """

    name: str
    right: Any
    hostile: Callable[[random.Random], Any]
    read: Callable[[Any], Any]
    errors: tuple[type[Exception], ...]
    weight: float = 1.0


class DictStore(Store):
    """A store in a dictionary, quick enough for a million inputs."""

    def __init__(self, objects: dict[str, bytes] | None = None, prefix: str = "") -> None:
        super().__init__("memory://fuzz", retry=RetryPolicy(total_seconds=1.0), clock=FakeClock())
        self.objects = {} if objects is None else objects
        self._prefix = prefix

    def backend(self) -> Backend:
        return _DictBackend(self.objects, self._prefix)

    def child(self, *parts: str) -> DictStore:
        return DictStore(self.objects, f"{self._prefix}{'/'.join(parts)}/")

    def with_object(self, path: str, data: bytes) -> DictStore:
        return DictStore({**self.objects, path: data})


class _DictBackend(Backend):
    def __init__(self, objects: dict[str, bytes], prefix: str) -> None:
        self._objects, self._prefix = objects, prefix

    def read(self, path: str) -> bytes:
        try:
            return self._objects[self._prefix + path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def write(self, path: str, data: bytes, *, durable: bool = True) -> None:
        self._objects[self._prefix + path] = data

    def create(self, path: str, data: bytes, *, look_first: bool) -> bool:
        return self._objects.setdefault(self._prefix + path, data) is data

    def exists(self, path: str) -> bool:
        return bool(self._below(path))

    def list(self, path: str) -> list[str]:
        prefix = self._prefix + (f"{path}/" if path else "")
        below = [p.removeprefix(prefix) for p in self._objects if p.startswith(prefix)]
        return list(dict.fromkeys(p.partition("/")[0] for p in below))

    def delete(self, path: str) -> None:
        for found in self._below(path):
            del self._objects[found]

    def flush(self, path: str) -> None:
        pass

    def _below(self, path: str) -> Sequence[str]:
        whole = self._prefix + path
        return [p for p in self._objects if p == whole or p.startswith(f"{whole}/")]


def _of_documents(
    name: str,
    right: Any,
    read: Callable[[bytes], Any],
    errors: tuple[type[Exception], ...],
    weight: float = 1.0,
) -> Parser:
    """A parser of JSON."""
    text = json.dumps(right).encode()
    return Parser(name, text, lambda rng: document(right, rng), read, errors, weight)


def _json() -> Parser:
    right = {"a": [1, -2.5, 'x\\"y', None, True, {"b": {}}], "c": "\u00e4\U0001f600"}
    limits = JsonLimits(num_bytes=2**20, num_values=10_000)
    return _of_documents("JSON", right, lambda t: parse_json(t, limits), (JsonRefused,), 10)


# The wire


def _frames(name: str, value: Any, weight: float) -> Parser:
    wire.register()
    header, frames = serialize(value, serializers=["dask"])
    plain = [bytes(memoryview(frame).cast("B")) for frame in frames]
    sub = json.loads(json.dumps(header["sub-header"]))
    packed = [wire.compress(memoryview(frame), 4) if frame else frame for frame in plain]
    compressed = json.loads(json.dumps(sub))
    for one in compressed["tensors"]:
        one["blosc2"] = bool(one["shape"])
    count = len(sub["tensors"])
    frames_of = {
        False: plain,
        True: [
            p if i < count and sub["tensors"][i]["shape"] else f
            for i, (p, f) in enumerate(zip(packed, plain, strict=True))
        ],
    }

    def hostile(rng: random.Random) -> Any:
        is_packed = rng.random() < 0.5
        header, frames = (compressed if is_packed else sub), frames_of[is_packed]
        if rng.random() < 0.6:
            header = mutated(header, rng)
        if rng.random() < 0.5:
            frames = list(frames)
            at = rng.randrange(len(frames))
            frames[at] = broken(frames[at][:64], rng) + (
                frames[at][64:] if rng.random() < 0.5 else b""
            )
        return header, frames

    def read(sent: Any) -> Any:
        return deserialize({**header, "sub-header": sent[0]}, list(sent[1]))

    return Parser(name, (compressed, frames_of[True]), hostile, read, (GarbageReceived,), weight)


def _tensors() -> Parser:
    base = torch.arange(24.0).reshape(4, 6)
    values = TensorDict(
        {
            "plain": base,
            "transposed": base.T,
            "slice": base[:, 1:3],
            "mask": base > 3,
            "half": base.to(torch.bfloat16),
            "expanded": base[:, :1].expand(4, 5),
            "complex": torch.ones(3, dtype=torch.complex64).conj(),
        }
    )
    return _frames("tensors on the wire", values, 8)


def _results() -> Parser:
    result = BackwardResult({"g": torch.ones(2, 2)}, None, (0, 2), (0.5, 2.0), (3, 1))
    return _frames("results on the wire", result, 4)


# Chunks, arrays, snapshots


def _chunk() -> Parser:
    store = DictStore()
    data = np.arange(600, dtype=np.float32) // 3
    array = FlatArray.create(store, "a", "float32", 600, 600, codec=Blosc2Codec())
    array.write(0, data)
    body = store.objects["a/c/0"][:-4]

    def sealed(body: bytes) -> bytes:
        return body + int(google_crc32c.value(body)).to_bytes(4, "little")

    def hostile(rng: random.Random) -> bytes:
        # Mostly in the header, and mostly with the checksum that belongs to it.
        head, tail = (body[:48], body[48:]) if rng.random() < 0.7 else (body, b"")
        found = broken(head, rng) + tail
        return sealed(found) if rng.random() < 0.95 else found

    def read(content: bytes) -> Any:
        return FlatArray.open(store.with_object("a/c/0", content), "a").read(10, 500)

    return Parser("chunks", sealed(body), hostile, read, STORED, 1)


def _metadata() -> Parser:
    store = DictStore()
    array = FlatArray.create(store, "a", "int32", 100, 40, {"k": [1]}, codec=Blosc2Codec())
    array.write(0, np.arange(100, dtype=np.int32))
    right = json.loads(store.objects["a/zarr.json"])

    def read(text: bytes) -> Any:
        found = FlatArray.open(store.with_object("a/zarr.json", text), "a")
        return found.attributes, found.read(0, min(len(found), 2**16))

    return _of_documents("zarr.json", right, read, STORED, 3)


def _manifest() -> Parser:
    written = Store("memory://").child(f"fuzz-{uuid.uuid4().hex}")
    specs = [
        ArraySpec("w", "parameter", "float32", (4, 3)),
        ArraySpec("b", "parameter", "bfloat16", (5,)),
        ArraySpec("m", "buffer", "bool", (6,)),
        ArraySpec("v", "optimizer", "float32", (12,)),
    ]
    stand_ins = {"bfloat16": "uint16"}
    record = write_shard(
        written, 3, "s", specs, lambda n: _array(next(s for s in specs if s.name == n), stand_ins)
    )
    commit_snapshot(written, 3, [record], {"loss": 1.5, "run_id": "r"})
    store = DictStore({found.path: written.read_bytes(found.path) for found in walk(written)})
    path = "snapshots/step-00000003/manifest.json"
    right = json.loads(store.objects[path])

    def hostile(rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            return document(right, rng)
        changed = mutated(right, rng)
        if isinstance(changed, dict):
            with suppress(ValueError):
                changed["checksum"] = _checksum(changed)
        return json.dumps(changed).encode()

    def read(text: bytes) -> Any:
        snapshot = Snapshot.open(store.with_object(path, text), 3)
        for role in snapshot.roles:
            read_tensors(snapshot, role, snapshot.names(role))
        return snapshot.array_folders, snapshot.objects

    return Parser("manifests", json.dumps(right).encode(), hostile, read, STORED, 2)


def _array(spec: ArraySpec, stand_ins: Mapping[str, str]) -> np.ndarray[Any, Any]:
    return np.ones(spec.shape, stand_ins.get(spec.dtype, spec.dtype))


# Journal, ledger, sequences, leases, runs


def _journal() -> Parser:
    store = DictStore()
    base = torch.arange(12.0).reshape(3, 4)
    backward = {"non_finite": [0], "losses": [0.5], "loss": 1.0, "finite": True}
    sent = [
        (EntryKey("forward", 1, 0), Sent({"h": base, "t": base.T}, {"finite": True})),
        (EntryKey("backward", 1, 1), Sent({"m": base > 2}, backward)),
        (EntryKey("update", 1, 0), Sent({}, {"non_finite": [], "decision": Decision().to_json()})),
    ]
    segment = write_segment(store, "p", 7, 1, [encode(key, one) for key, one in sent])
    path = f"{segment.path}/zarr.json"
    right = json.loads(store.objects[path])

    def hostile(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return document(right, rng)
        # What zarr doesn't read: the index.
        attributes = mutated(right["attributes"], rng)
        return json.dumps({**right, "attributes": attributes}).encode()

    def read(text: bytes) -> Any:
        changed = store.with_object(path, text)
        return [
            read_sent(changed, found, key)
            for found in read_segments(changed, "p", 7)
            for key in found.facts
        ]

    return Parser("journals", json.dumps(right).encode(), hostile, read, STORED, 1)


def _ledger() -> Parser:
    record = StepRecord(
        4,
        (
            Microbatch(4, 0, 0.5, (("s0", 8),), (("w.0", [0.5, 1.0]),)),
            Microbatch(4, 1, 0.5, (("s0", 8),)),
        ),
        0.9,
        Decision(1.0, 0.5, True, 2.0, 3, 0),
        {"fingerprint": "00ff00ff", "epoch": 0},
    )
    path = "ledger/part-00000004.jsonl"

    def read(text: bytes) -> Any:
        rows = RowLog(DictStore({path: text}), "ledger")
        SeenBatches().learn(rows.read(skip_damaged=True))
        return [StepRecord.from_json(row) for row in rows.read()], rows.last()

    return _of_documents("ledgers", record.to_json(), read, STORED, 8)


def _sequences() -> Parser:
    rows: list[dict[str, Any]] = [
        {
            "step": 0,
            "kind": "answer",
            "model": "m",
            "begun": 1.0,
            "request": {
                "prompt": [1, 2],
                "max_new_tokens": 4,
                "sampling": {"temperature": 0.5, "logit_bias": {"3": 1.0}},
                "stop": ["."],
                "ends": [2],
                "logprobs": 1,
            },
            "format_version": 1,
        },
        {"step": 1, "at": 0, "tokens": [5, 6], "details": [[-0.1, 5, -0.1], [-0.2, 6, -0.2]]},
        {"step": 2, "at": 2, "tokens": [7], "details": [[-0.3, 7, -0.3]], "end": "length"},
    ]
    path = "sessions/a/part-00000000.jsonl"

    def text(rows: Any, rng: random.Random | None = None) -> bytes:
        lines = []
        for row in rows if isinstance(rows, list) else [rows]:
            if isinstance(row, dict):
                row = {**row, "crc32c": row_checksum(row)}
            lines.append(json.dumps(row).encode())
        if rng is not None and rng.random() < 0.1:
            lines[rng.randrange(len(lines))] = document(rows, rng)
        return b"\n".join(lines)

    def hostile(rng: random.Random) -> bytes:
        return text(mutated(rows, rng) or [{}], rng)

    def read(data: bytes) -> Any:
        found = SequenceLog(DictStore({path: data}), "a").read()
        with kept._whole("an answer"):
            kept.Request.from_json(found.head["request"], "a")
        return kept._chosen(found)

    return Parser("sequences", text(rows), hostile, read, STORED, 6)


def _lease() -> Parser:
    store = DictStore()
    with hold_lease(store):
        pass
    name = "epoch-00000001.json"
    right = json.loads(store.objects[f"lease/{name}"])
    beat = f"beat-00000001-{right['nonce']}.json"
    both = {"holder": right, "beat": json.loads(store.objects[f"lease/{beat}"])}

    def hostile(rng: random.Random) -> tuple[bytes, bytes]:
        return document(both["holder"], rng), document(both["beat"], rng)

    def read(texts: tuple[bytes, bytes]) -> Any:
        files = _LeaseFiles(DictStore({f"lease/{name}": texts[0], f"lease/{beat}": texts[1]}))
        holder = files.read(1)
        # Its beat lies under its nonce; that it is read at all is what is tried here.
        return holder.process.has_ended(), files.read_beat(holder), str(holder)

    whole = (json.dumps(both["holder"]).encode(), json.dumps(both["beat"]).encode())
    return Parser("leases", whole, hostile, read, STORED, 5)


def _run() -> Parser:
    store = DictStore()
    run = RunDirectory(store)
    run.create({"model": {"parameters": {"w": "float32[3]"}}, "seed": 1}, {"tied": {}})
    run.write_programs("p", ["{}", "{}"])
    files = {"run": json.loads(store.objects["run.json"])}
    files["programs"] = json.loads(store.objects["programs/p/programs.json"])

    def read(texts: tuple[bytes, bytes]) -> Any:
        changed = RunDirectory(
            store.with_object("run.json", texts[0]).with_object(
                "programs/p/programs.json", texts[1]
            )
        )
        return changed.settings(), changed.facts(), changed.run_id, changed.read_programs("p")

    def hostile(rng: random.Random) -> tuple[bytes, bytes]:
        return document(files["run"], rng), document(files["programs"], rng)

    right = (store.objects["run.json"], store.objects["programs/p/programs.json"])
    return Parser("run.json", right, hostile, read, STORED, 5)


def _token_data() -> Parser:
    store = DictStore()
    write_tokens(store, np.arange(5000, dtype=np.int64) % 1000, attributes={"vocabulary": 1000})
    right = json.loads(store.objects["zarr.json"])

    def read(text: bytes) -> Any:
        tokens = TokenArray(store.with_object("zarr.json", text))
        starts = np.asarray([0, min(9, max(0, len(tokens) - 4))])
        if len(tokens) < 16:
            return None
        return tokens.read(starts, 4), tokens.attributes

    return _of_documents("data of tokens", right, read, STORED, 1)


# Programs


def _program() -> Parser:
    x, y = ValueSpec("x", "float32", ("s0", 3)), ValueSpec("y", "float32", ("s0", 2))
    nodes = (
        Node("t", "aten.t.default", ({"ref": "w"},)),
        Node("m", "aten.mm.default", ({"ref": "x"}, {"ref": "t"})),
        Node("y", "aten.add.Tensor", ({"ref": "m"}, {"ref": "c"}), {"alpha": 2}),
        Node("z", "aten.expand.default", ({"ref": "y"}, [["mul", "s0", 1], 2]), {}, "a.b"),
    )
    program = StageProgram(
        0,
        2,
        ("s0",),
        (StageInput(x, None),),
        (StageOutput(y, (1,), True),),
        (ParameterUse("w", "layer.weight", "float32", (2, 3), True, 0),),
        (BufferUse("b", "layer.mean", "float32", (2,), False, 0),),
        (Constant.of("c", torch.ones(2)),),
        nodes,
        None,
    )

    def read(text: bytes) -> Any:
        found = StageProgram.from_json(text.decode(errors="surrogateescape"))
        return [constant.tensor() for constant in found.constants], found.to_json()

    right = json.loads(program.to_json())
    return _of_documents("programs", right, read, (ProgramInvalid,), 5)


# Models, in the store and in folders


def _model() -> Parser:
    store = DictStore()
    specs = [ArraySpec("w", "weight", "float32", (2, 3))]
    arrays = write_arrays(store, "weights/a-1", specs, lambda n: np.ones((2, 3), np.float32))
    right = {
        "format": "dagflow-model",
        "config": {"vocab_size": 100},
        "max_tokens": 64,
        "groups": [{"path": "weights/a-1", "arrays": [array.to_json() for array in arrays]}],
        "end_tokens": [2],
        "generation": {"top_k": 5},
        "tokenizer_files": ["tokenizer.json"],
        "notes": ["n"],
    }

    def read(text: bytes) -> Any:
        model = Model.open(store.with_object("models/m/model.json", text), "m")
        return model.config, model.max_tokens, model.end_tokens, model.notes, model.has_tokenizer

    return _of_documents("model.json", right, read, STORED, 6)


class _Folder:
    """A folder of this process, whose files each input replaces."""

    def __init__(self, **files: bytes) -> None:
        parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.path = Path(tempfile.mkdtemp(prefix="dagflow-fuzz-", dir=parent))
        for name, data in files.items():
            self.write(name.replace("__", "."), data)

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)

    def __del__(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _index() -> Parser:
    tensors = save_safetensors({"w": torch.ones(2), "v": torch.ones(3)})
    folder = _Folder(a__safetensors=tensors)
    right = {
        "metadata": {"total_size": 20},
        "weight_map": {"w": "a.safetensors", "v": "a.safetensors"},
    }

    def read(text: bytes) -> Any:
        folder.write("model.safetensors.index.json", text)
        files = WeightFiles(folder.path)
        return [files.read(name) for name in files.names()]

    return _of_documents("index of weights", right, read, (SettingsInvalid,), 2)


def _safetensors() -> Parser:
    data = save_safetensors(
        {"w": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "m": torch.ones(3) > 0}
    )
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    folder = _Folder()

    def hostile(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return broken(data, rng)
        text = document(header, rng)
        size = len(text) if rng.random() < 0.95 else rng.choice((0, 2**31, 2**63, 2**64 - 1))
        return size.to_bytes(8, "little") + text + body

    def read(content: bytes) -> Any:
        folder.write("model.safetensors", content)
        files = WeightFiles(folder.path)
        return [files.read(name) for name in files.names()]

    return Parser("safetensors", data, hostile, read, (SettingsInvalid,), 2)


def _configuration() -> Parser:
    right = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": 2,
    }
    folder = _Folder()

    def read(text: bytes) -> Any:
        folder.write("config.json", text)
        return _config(folder.path, 12)

    return _of_documents("config.json", right, read, (SettingsInvalid,), 0.2)


def _generation() -> Parser:
    right = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    folder = _Folder()

    def read(text: bytes) -> Any:
        folder.write("generation_config.json", text)
        return read_generation(None, folder.path)

    return _of_documents("generation_config.json", right, read, (SettingsInvalid,), 0.2)


def _tokenizer() -> Parser:
    vocabulary = {word: n for n, word in enumerate(["<s>", "a", "b", "ab", "c"])}
    right = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": None},
    }
    beside = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()

    def read(text: bytes) -> Any:
        files = {"tokenizer.json": text, "tokenizer_config.json": beside}
        return open_tokenizer("m", files)("a ab c")

    return _of_documents("tokenizer.json", right, read, (SettingsInvalid,), 0.05)


PARSERS: Mapping[str, Callable[[], Parser]] = {
    make.__name__.removeprefix("_"): make
    for make in (
        _json,
        _tensors,
        _results,
        _chunk,
        _metadata,
        _manifest,
        _journal,
        _ledger,
        _sequences,
        _lease,
        _run,
        _token_data,
        _program,
        _model,
        _index,
        _safetensors,
        _configuration,
        _generation,
        _tokenizer,
    )
}
