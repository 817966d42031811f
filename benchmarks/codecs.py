"""What lossless compression gains, and what it costs, for each role of tensor in training.

    python benchmarks/codecs.py [--steps 100]

Trains a GPT on Python's own sources, takes its weights, gradients, AdamW moments, the activations
at the blocks' borders and the tokens, in fp32 and rounded to bf16, and packs and unpacks them in
chunks as the store does. The last column is the speed of a link, in Mbit/s, up to which packing,
sending and unpacking one after the other beat sending the raw bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import blosc2
import numpy as np
import torch
from common import write_results
from workload import Workload

from dagflow_storage.arrays.arrays import CHUNK_BYTES
from dagflow_storage.arrays.codec import NUM_THREADS

SETTINGS: dict[str, tuple[blosc2.Codec, int, blosc2.Filter]] = {
    "lz4-1 shuffle": (blosc2.Codec.LZ4, 1, blosc2.Filter.SHUFFLE),
    "lz4-1 bitshuffle": (blosc2.Codec.LZ4, 1, blosc2.Filter.BITSHUFFLE),
    "zstd-1 shuffle": (blosc2.Codec.ZSTD, 1, blosc2.Filter.SHUFFLE),
    "zstd-1 bitshuffle": (blosc2.Codec.ZSTD, 1, blosc2.Filter.BITSHUFFLE),
    "zstd-5 shuffle": (blosc2.Codec.ZSTD, 5, blosc2.Filter.SHUFFLE),
    "zstd-1 noshuffle": (blosc2.Codec.ZSTD, 1, blosc2.Filter.NOFILTER),
}
NUM_REPETITIONS = 5
CHUNKS_PER_ROLE = 4


def trained(workload: Workload) -> dict[str, list[torch.Tensor]]:
    """The tensors of the last step, by role."""
    torch.manual_seed(0)
    model = workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate)
    activations: list[torch.Tensor] = []
    blocks = [m for m in model.modules() if type(m).__name__ == "Block"]
    for block in blocks:
        block.register_forward_hook(lambda *args: activations.append(args[2].detach()))
    tokens: list[torch.Tensor] = []
    for batch in workload.batches():
        activations.clear()
        optimizer.zero_grad()
        out = model(**batch)
        loss = out["loss"] if isinstance(out, dict) else out
        loss.backward()
        optimizer.step()
        tokens.append(batch["input_ids"])
    states = list(optimizer.state.values())
    print(f"loss {float(loss.detach()):.2f} after {workload.num_steps} steps")
    return {
        "weights": [p.detach() for p in model.parameters()],
        "first moments": [state["exp_avg"] for state in states],
        "second moments": [state["exp_avg_sq"] for state in states],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "activations": list(activations),
        "tokens": tokens,
    }


def chunks(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[np.ndarray]:
    """The tensors end to end, as the store cuts them."""
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    raw = flat.view(torch.uint8).numpy()
    limit = CHUNKS_PER_ROLE * CHUNK_BYTES
    return [
        raw[i : min(i + CHUNK_BYTES, limit)] for i in range(0, min(raw.size, limit), CHUNK_BYTES)
    ]


def measure(pieces: list[np.ndarray], itemsize: int, setting: str) -> dict[str, float]:
    codec, level, shuffle = SETTINGS[setting]
    options = {
        "codec": codec,
        "clevel": level,
        "typesize": itemsize,
        "filters": [blosc2.Filter.NOFILTER] * 5 + [shuffle],
        "nthreads": NUM_THREADS,
    }
    num_bytes = sum(piece.nbytes for piece in pieces)
    packing, unpacking = [], []
    for _ in range(NUM_REPETITIONS):
        begin = time.perf_counter()
        packed = [blosc2.compress2(piece, **options) for piece in pieces]
        middle = time.perf_counter()
        for piece, found in zip(pieces, packed, strict=True):
            blosc2.decompress2(found, dst=np.empty_like(piece), nthreads=NUM_THREADS)
        packing.append(middle - begin)
        unpacking.append(time.perf_counter() - middle)
    ratio = num_bytes / sum(len(piece) for piece in packed)
    pack, unpack = num_bytes / median(packing), num_bytes / median(unpacking)
    saved = max(0.0, 1 - 1 / ratio)
    return {
        "ratio": ratio,
        "pack_bytes_per_second": pack,
        "unpack_bytes_per_second": unpack,
        "pays_up_to_mbit_per_second": 8e-6 * saved / (1 / pack + 1 / unpack),
    }


def roles(
    found: Mapping[str, list[torch.Tensor]],
) -> Iterator[tuple[str, str, list[np.ndarray], int]]:
    for role, tensors in found.items():
        if role == "tokens":
            yield role, "uint16", chunks(tensors, torch.uint16), 2
        else:
            yield role, "fp32", chunks(tensors, torch.float32), 4
            yield role, "bf16", chunks(tensors, torch.bfloat16), 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    workload = Workload(num_layers=4, width=256, num_heads=4, num_warmup_steps=0,
                        num_timed_steps=options.steps)  # fmt: skip
    rows: list[dict[str, Any]] = []
    print(
        f"{'':16}{'':8}{'':20}{'ratio':>7}{'pack GB/s':>11}{'unpack GB/s':>13}{'pays to Mbit/s':>16}"
    )
    for role, dtype, pieces, itemsize in roles(trained(workload)):
        for setting in SETTINGS:
            row = {"role": role, "dtype": dtype, "setting": setting,
                   **measure(pieces, itemsize, setting)}  # fmt: skip
            rows.append(row)
            print(f"{role:16}{dtype:8}{setting:20}{row['ratio']:7.3f}"
                  f"{row['pack_bytes_per_second'] / 1e9:11.2f}"
                  f"{row['unpack_bytes_per_second'] / 1e9:13.2f}"
                  f"{row['pays_up_to_mbit_per_second']:16.0f}")  # fmt: skip
    measured = {
        "num_steps": workload.num_steps,
        "num_threads": NUM_THREADS,
        "chunk_bytes": CHUNK_BYTES,
        "rows": rows,
    }
    write_results("codecs", measured)


if __name__ == "__main__":
    main()
