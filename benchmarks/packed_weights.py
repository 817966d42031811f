"""What linear layers gain from weights in oneDNN's order: microseconds a call, torch's own against ours.

    python benchmarks/packed_weights.py [--rounds 7]

One thread. Every call takes another weight, 150 MB of them in turn, as the layers of a model do: none
is in a cache when its turn comes. Packed and plain alternate; medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from common import write_results
from torch.nn import functional

from dagflow_tasks.kernels.onednn import linear_packed, pack, packs

SHAPES = [(512, 512), (2048, 512), (512, 2048), (2048, 2048), (4096, 4096)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (1, 2, 4, 8, 32, 128)
BYTES = 150e6


def microseconds(shape: Sequence[int], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Return, for each number of rows, what a call takes either way."""
    count = max(2, int(BYTES / (shape[0] * shape[1] * dtype.itemsize)))
    plain = [torch.randn(*shape).to(dtype) for _ in range(count)]
    packed = [pack(weight) for weight in plain if packs(weight)]
    if not packed:
        return []
    found = []
    for rows in ROWS:
        x = torch.randn(1, rows, shape[1]).to(dtype)
        times: dict[str, list[float]] = {"plain": [], "packed": []}
        for _ in range(rounds):
            begin = time.perf_counter()
            for weight in plain:
                functional.linear(x, weight)
            between = time.perf_counter()
            for weight in packed:
                linear_packed(x, weight)
            times["plain"].append((between - begin) / count * 1e6)
            times["packed"].append((time.perf_counter() - between) / count * 1e6)
        medians = {name: round(median(values), 1) for name, values in times.items()}
        gain = round(medians["plain"] / medians["packed"], 2)
        found.append({"shape": list(shape), "rows": rows, **medians, "plain_of_packed": gain})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = {}
    for name, dtype in DTYPES.items():
        print(f"\n{name}: plain / packed (us), by rows")
        measured[name] = []
        for shape in SHAPES:
            with torch.inference_mode():
                rows = microseconds(shape, dtype, options.rounds)
            measured[name] += rows
            cells = [
                f"{r['plain']:7.0f}/{r['packed']:5.0f} {r['plain_of_packed']:.2f}" for r in rows
            ]
            print(f"{shape[0]:5d} x {shape[1]:<5d}", " ".join(cells) or "is not packed here")
    print("rows:", *ROWS)
    write_results("packed_weights", measured)


if __name__ == "__main__":
    main()
