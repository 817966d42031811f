"""Speed of writing and reading a snapshot against what else there is for the same bytes.

    python benchmarks/store_speed.py [--megabytes 300] [--rounds 9] [--s3]

On a folder: torch.distributed.checkpoint and safetensors. Both sync their files to disk here, as a
snapshot does (safetensors doesn't by itself). On S3: s3fs' own put and get of one object of that
size. The contestants take turns; a ratio is taken within its round. Reading ends with every tensor
in memory of its own; files are in the page cache. Before each read free memory goes back to the
system: a process that reads its first snapshot has none to spare, either. ``--s3`` starts Ceph's
radosgw on this machine (root, `make s3-server`), which shares its cores with the contestants.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import s3fs
import torch
import torch.distributed.checkpoint as dcp
from common import peak_extra_bytes, radosgw, write_results
from safetensors.torch import load_file, save_file

from dagflow_storage import ArraySpec, Snapshot, Store, commit_snapshot, write_shard

# As in a GPT: most bytes in matrices, most tensors small.
WIDTH = 512


def tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """Weights and AdamW's moments as they are distributed in training, fp32."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    block = {"attn": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH),
             "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,), "bias": (4 * WIDTH,)}  # fmt: skip
    layer = 0
    while sum(t.nbytes for t in found.values()) < megabytes * 1e6:
        for name, shape in block.items():
            for kind, scale in {"weight": 0.02, "m": 1e-4, "v": 1e-4}.items():
                values = torch.randn(shape, generator=generator) * scale
                found[f"{layer}.{name}.{kind}"] = values.square() if kind == "v" else values
        layer += 1
    return found


class Contestant(ABC):
    """Writes and reads the same tensors, each time to a new place."""

    @abstractmethod
    def write(self, state: dict[str, torch.Tensor]) -> None: ...

    @abstractmethod
    def read(self) -> dict[str, Any]: ...

    @abstractmethod
    def clean(self) -> None:
        """Remove what was written."""


class Dagflow(Contestant):
    """A committed snapshot, checksums included."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._step = 0

    def write(self, state: dict[str, torch.Tensor]) -> None:
        self._step += 1
        specs = [ArraySpec(n, "parameter", "float32", tuple(t.shape)) for n, t in state.items()]
        record = write_shard(self._store, self._step, "s", specs, lambda n: state[n].numpy())
        commit_snapshot(self._store, self._step, [record], {})

    def read(self) -> dict[str, Any]:
        snapshot = Snapshot.open(self._store, self._step)
        return snapshot.read("parameter", snapshot.names("parameter"))

    def clean(self) -> None:
        self._store.delete("snapshots")


class Folder(Contestant):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = folder

    def new_place(self) -> Path:
        self._place = self._folder / uuid.uuid4().hex
        self._place.mkdir(parents=True)
        return self._place

    def clean(self) -> None:
        shutil.rmtree(self._place)


class DistributedCheckpoint(Folder):
    def write(self, state: dict[str, torch.Tensor]) -> None:
        dcp.save(state, checkpoint_id=self.new_place(), no_dist=True)

    def read(self) -> dict[str, Any]:
        metadata = dcp.FileSystemReader(self._place).read_metadata().state_dict_metadata
        state = {name: torch.empty(found.size) for name, found in metadata.items()}
        dcp.load(state, checkpoint_id=self._place, no_dist=True)
        return state


class Safetensors(Folder):
    def write(self, state: dict[str, torch.Tensor]) -> None:
        path = self.new_place() / "state.safetensors"
        save_file(state, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def read(self) -> dict[str, Any]:
        return {n: t.clone() for n, t in load_file(self._place / "state.safetensors").items()}


class S3fs(Contestant):
    """One object of as many bytes, put and got as s3fs does by default."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._s3 = s3fs.S3FileSystem(**options)
        self._path = f"{url}/raw"
        self._blob = b""

    def write(self, state: dict[str, torch.Tensor]) -> None:
        if not self._blob:  # made before the clock runs, by the warm-up
            self._blob = b"".join(t.numpy().tobytes() for t in state.values())
        self._s3.pipe_file(self._path, self._blob)

    def read(self) -> dict[str, Any]:
        return {"raw": self._s3.cat_file(self._path)}

    def clean(self) -> None:
        self._s3.rm(self._path)


def measure(
    contestants: dict[str, Contestant], state: dict[str, torch.Tensor], rounds: int
) -> dict[str, Any]:
    """Return bytes per second and peak memory of each, and its ratio to dagflow's."""
    num_bytes = sum(t.nbytes for t in state.values())
    rates: dict[str, dict[str, list[float]]] = {n: {"write": [], "read": []} for n in contestants}
    peaks: dict[str, dict[str, list[int]]] = {n: {"write": [], "read": []} for n in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            begin = time.perf_counter()
            with peak_extra_bytes() as writing:
                contestant.write(state)
            middle = time.perf_counter()
            give_back_memory()
            begin_read = time.perf_counter()
            with peak_extra_bytes() as reading:
                found = contestant.read()
            end = time.perf_counter()
            if number == 0:
                check(state, found)
            else:  # the first round warms up
                rates[name]["write"].append(num_bytes / (middle - begin))
                rates[name]["read"].append(num_bytes / (end - begin_read))
                peaks[name]["write"] += writing
                peaks[name]["read"] += reading
            del found
            contestant.clean()
    return {
        name: {
            what: {
                "bytes_per_second": median(rates[name][what]),
                "dagflow_is_times_as_fast": median(
                    ours / theirs
                    for ours, theirs in zip(rates["dagflow"][what], rates[name][what], strict=True)
                ),
                "peak_extra_bytes": max(peaks[name][what]),
                "bytes_per_second_of_rounds": rates[name][what],
            }
            for what in ("write", "read")
        }
        for name in contestants
    }


def give_back_memory() -> None:
    """Return free memory to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check(state: dict[str, torch.Tensor], found: dict[str, Any]) -> None:
    """A contestant that doesn't return what it was given has no speed."""
    if "raw" in found:
        assert len(found["raw"]) == sum(t.nbytes for t in state.values())
        return
    for name, tensor in state.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor.numpy())


def show(title: str, results: dict[str, Any], num_bytes: int) -> None:
    """Print a line for each contestant."""
    print(f"\n{title}, {num_bytes / 1e6:.0f} MB")
    print(f"{'':24}{'write MB/s':>11}{'dagflow ×':>11}{'read MB/s':>11}{'dagflow ×':>11}"
          f"{'extra write MB':>16}{'extra read MB':>15}")  # fmt: skip
    for name, result in results.items():
        cells = [f"{name:24}"]
        for what in ("write", "read"):
            cells.append(f"{result[what]['bytes_per_second'] / 1e6:11.0f}")
            cells.append(f"{result[what]['dagflow_is_times_as_fast']:11.2f}")
        cells.append(f"{result['write']['peak_extra_bytes'] / 1e6:16.0f}")
        cells.append(f"{result['read']['peak_extra_bytes'] / 1e6:15.0f}")
        print("".join(cells))


@contextlib.contextmanager
def s3_contestants() -> Iterator[dict[str, Contestant]]:
    with radosgw() as server:
        store = server.new_store()
        yield {"dagflow": Dagflow(store), "s3fs": S3fs(store.url, server.options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", default=None, help="where to write; a temporary folder if not given"
    )
    parser.add_argument("--s3", action="store_true", help="on a radosgw started here, too")
    options = parser.parse_args()
    state = tensors(options.megabytes)
    num_bytes = sum(t.nbytes for t in state.values())
    measured: dict[str, Any] = {"num_bytes": num_bytes, "num_tensors": len(state)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        local: dict[str, Contestant] = {
            "dagflow": Dagflow(Store(f"{folder}/dagflow")),
            "torch.distributed.checkpoint": DistributedCheckpoint(Path(folder, "dcp")),
            "safetensors": Safetensors(Path(folder, "safetensors")),
        }
        measured["folder"] = measure(local, state, options.rounds)
    show("A folder", measured["folder"], num_bytes)
    if options.s3:
        with s3_contestants() as remote:
            measured["s3"] = measure(remote, state, options.rounds)
        show("S3 (radosgw on this machine)", measured["s3"], num_bytes)
    write_results("store_speed", measured)


if __name__ == "__main__":
    main()
