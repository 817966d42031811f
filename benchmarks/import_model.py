"""Speed and memory of importing a Hugging Face folder, against copying its files.

    python benchmarks/import_model.py [--megabytes 1000] [--rounds 5] [--weights fp32]

A Llama of about that size with random weights is written to a temporary folder, in several shards,
and imported into a folder store with `dagflow.load`. The other contestant is a plain Python loop
that reads the same files and writes them again, 4 MiB at a time. Both end with everything on disk:
dagflow syncs each chunk of 4 MiB as it is written, and so does the loop; a second loop syncs each
file once, at its end. They take turns, each import in a fresh process, and ratios are taken within
a round. Files are in the page cache.

Bars: 0.7 of the loop's speed, and no more memory than twice the largest tensor and 200 MB beyond
what the process takes once it has imported a tiny model of the same kind. The time that capturing
the model takes is shown apart, because it depends on the number of operators and not on the bytes.
The comparison with transformers is left out: it reads the whole model where memory has room for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import peak_extra_bytes, write_results
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dagflow
from dagflow.models import loading

PIECE_BYTES = 4 * 2**20
SHARD_BYTES = 256 * 10**6
# What a deleted file took is written to again at once, if at once; a virtual machine gives it back to
# its host after two seconds, and who writes then takes several times the processor's time.
SETTLE_SECONDS = 5.0
SPEED_BAR = 0.7
MEMORY_BAR_BYTES = 200 * 10**6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(num_layers: int, width: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def config_of(num_bytes: int, dtype: torch.dtype) -> LlamaConfig:
    """Return a model of about so many bytes."""
    width, vocabulary = 1024, 32000
    of_layer = (4 * width**2 + 3 * width * (11 * width // 4)) * dtype.itemsize
    num_layers = round((num_bytes - 2 * width * vocabulary * dtype.itemsize) / of_layer)
    return config(max(1, num_layers), width, vocabulary)


def write_folder(folder: Path, wanted: LlamaConfig, dtype: torch.dtype) -> None:
    """Write a model as transformers does, one shard at a time."""
    folder.mkdir()
    wanted.save_pretrained(folder)
    with dagflow.empty_weights():
        shapes = {n: t.shape for n, t in LlamaForCausalLM(wanted).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(s.numel() for s in shards[-1].values()) * dtype.itemsize > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            n: torch.empty(s).normal_(0, 0.02, generator=generator) for n, s in shard.items()
        }
        save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    body = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))


def copy_files(folder: Path, to: Path, *, sync_pieces: bool) -> float:
    """Return the seconds that copying takes."""
    to.mkdir()
    begin = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with (
            open(file, "rb", buffering=0) as source,
            open(to / file.name, "wb", buffering=0) as target,
        ):
            while piece := source.read(PIECE_BYTES):
                target.write(piece)
                if sync_pieces:
                    os.fsync(target.fileno())
            os.fsync(target.fileno())
    return time.perf_counter() - begin


def import_in_this_process(folder: Path, store: Path, weights: str) -> dict[str, float]:
    """Return seconds, those of capturing, and bytes of extra memory."""
    tiny = store.with_name("tiny")
    write_folder(tiny, config(1, 64, 100), DTYPES[weights])
    dagflow.load(tiny, store=store.with_name("tiny-store"), weights=weights)
    capturing: list[float] = []
    loading.capture_decoder = _timed(loading.capture_decoder, capturing)
    with peak_extra_bytes() as extra:
        begin = time.perf_counter()
        dagflow.load(folder, store=store, weights=weights, check=False)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "capture_seconds": capturing[0], "extra_bytes": extra[0]}


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - begin)

    return timed


def import_in_a_process(folder: Path, store: Path, weights: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", folder, "--into", store, "--weights", weights]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, rounds: int, weights: str) -> list[dict[str, float]]:
    """Return what each round took, in seconds and bytes."""
    found = []
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            place = Path(temporary)
            time.sleep(SETTLE_SECONDS)
            row = {"loop": copy_files(folder, place / "loop", sync_pieces=True)}
            shutil.rmtree(place / "loop")
            time.sleep(SETTLE_SECONDS)
            row |= import_in_a_process(folder, place / "store", weights)
            shutil.rmtree(place / "store")
            time.sleep(SETTLE_SECONDS)
            row["loop_synced_once"] = copy_files(folder, place / "once", sync_pieces=False)
        if number:  # the first round warms up
            found.append(row)
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return found


def summary(
    rows: list[dict[str, float]], num_bytes: int, largest_bytes: int
) -> dict[str, dict[str, float]]:
    """Return medians and the bars."""
    speeds = {
        "dagflow, weights": [num_bytes / (r["seconds"] - r["capture_seconds"]) for r in rows],
        "dagflow, with capture": [num_bytes / r["seconds"] for r in rows],
        "loop, synced by piece": [num_bytes / r["loop"] for r in rows],
        "loop, synced by file": [num_bytes / r["loop_synced_once"] for r in rows],
    }
    ours = speeds["dagflow, weights"]
    results: dict[str, dict[str, float]] = {
        name: {
            "bytes_per_second": median(of_rounds),
            "dagflow_is_times_as_fast": median(a / b for a, b in zip(ours, of_rounds, strict=True)),
        }
        for name, of_rounds in speeds.items()
    }
    results["memory"] = {
        "extra_bytes": max(row["extra_bytes"] for row in rows),
        "bar_bytes": 2 * largest_bytes + MEMORY_BAR_BYTES,
        "largest_tensor_bytes": largest_bytes,
    }
    results["capture"] = {"seconds": median(row["capture_seconds"] for row in rows)}
    return results


def show(results: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':24}{'MB/s':>8}{'dagflow ×':>11}")
    for name, result in results.items():
        if "bytes_per_second" in result:
            ratio = result["dagflow_is_times_as_fast"]
            print(f"{name:24}{result['bytes_per_second'] / 1e6:8.0f}{ratio:11.2f}")
    memory, ratio = results["memory"], results["loop, synced by piece"]["dagflow_is_times_as_fast"]
    print(f"\nspeed: {ratio:.2f} of the loop's, bar {SPEED_BAR}")
    print(
        f"extra memory: {memory['extra_bytes'] / 1e6:.0f} MB, bar {memory['bar_bytes'] / 1e6:.0f} MB "
        f"(largest tensor {memory['largest_tensor_bytes'] / 1e6:.0f} MB)"
    )
    print(f"capturing, in addition: {results['capture']['seconds']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into is not None:
        print(json.dumps(import_in_this_process(options.folder, options.into, options.weights)))
        return
    dtype = DTYPES[options.weights]
    wanted = config_of(options.megabytes * 10**6, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        write_folder(folder, wanted, dtype)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        rows = measure(folder, options.rounds, options.weights)
    largest_bytes = wanted.vocab_size * wanted.hidden_size * dtype.itemsize
    results = summary(rows, num_bytes, largest_bytes)
    show(results)
    measured = {
        "weights": options.weights,
        "num_bytes": num_bytes,
        "results": results,
        "rounds": rows,
    }
    write_results("import_model", measured, f"import_model_{options.weights}")


if __name__ == "__main__":
    main()
