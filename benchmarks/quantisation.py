"""What weights in fewer bits cost and save: a byte model of Python's own sources, in four precisions.

    python benchmarks/quantisation.py [--seconds 60]

Trains a Llama of four layers (hidden 128) on bytes of the standard library's modules with plain torch,
loads it in every precision, and measures perplexity on modules it hasn't seen, bytes in the store,
bytes of weights on a worker, and how long one linear layer (2048 x 2048) takes.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from common import write_results
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import dagflow
from dagflow.models.model import Model, read_weights
from dagflow.plan.partition import partition
from dagflow_tasks.decode.decoder_stage import ALL, DecoderStage, Part
from dagflow_tasks.kernels.quantised import linear_int4, linear_int8, quantise_int4, quantise_int8

CPU = torch.device("cpu")
LENGTH, ROWS, HELD_OUT_ROWS = 128, 8, 128
WIDTH, NUM_ROWS = 2048, (1, 16, 64)


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standard library's modules as bytes: nine in ten, and the others."""
    kept, held_out = bytearray(), bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tenth = blake2b(path.name.encode(), digest_size=1).digest()[0] % 10
        (held_out if tenth == 0 else kept).extend(path.read_bytes())
    return torch.frombuffer(kept, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def trained(data: torch.Tensor, seconds: float) -> tuple[LlamaForCausalLM, int]:
    """Return a model after some seconds of training, and the number of its steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 20) * (1.0 - 0.9 * passed / seconds)
        starts = torch.randint(0, len(data) - LENGTH, (ROWS,)).tolist()
        rows = torch.stack([data[start : start + LENGTH] for start in starts]).long()
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return model.eval(), steps


def perplexity(stage: DecoderStage, rows: torch.Tensor) -> float:
    """Return a model's perplexity (a byte) over rows of equal length."""
    total = 0.0
    for number, row in enumerate(rows.long()):
        part = Part(str(number), 0, 0, len(row) - 1, 0, ALL)
        _, found = stage.run([part], {"in.tokens": row[:-1]})
        total += float(functional.cross_entropy(found["logits"], row[1:], reduction="sum"))
        stage.close(str(number))
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def measured(model: LlamaForCausalLM, weights: str, rows: torch.Tensor) -> dict[str, Any]:
    """Load a model in one precision; return its sizes and perplexity."""
    with tempfile.TemporaryDirectory() as folder:
        loaded: Model = dagflow.load(model, store=folder, weights=weights)
        program = partition(loaded.dag, 1)[0]
        read = read_weights(loaded.ref, program, CPU)
        stored = sum(f.stat().st_size for f in Path(folder).rglob("weights/**/*") if f.is_file())
    layers = sum(tensor.nbytes for name, tensor in read.items() if ".layers." in name)
    return {
        "weights": weights,
        "perplexity": perplexity(DecoderStage(program, CPU, read), rows),
        "stored_bytes": stored,
        "worker_bytes": sum(tensor.nbytes for tensor in read.values()),
        "layer_bytes": layers,
    }


def linear_seconds() -> dict[str, dict[int, float]]:
    """Return how long a linear layer takes, by kind of weight and number of rows."""
    weight = torch.randn(WIDTH, WIDTH)
    half = weight.bfloat16()
    eight, four = quantise_int8(weight), quantise_int4(weight)
    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fp32": lambda x: functional.linear(x.float(), weight),
        "bf16": lambda x: functional.linear(x, half),
        "int8": lambda x: linear_int8(x, *eight),
        "int4": lambda x: linear_int4(x, *four),
    }
    found: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for name, layer in layers.items():
            found[name] = {n: _best(layer, torch.randn(n, WIDTH).bfloat16()) for n in NUM_ROWS}
    return found


def _best(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    times = []
    for _ in range(100):
        begin = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out = sources()
    model, steps = trained(data, arguments.seconds)
    rows = held_out[: HELD_OUT_ROWS * LENGTH].reshape(HELD_OUT_ROWS, LENGTH)
    found = [measured(model, weights, rows) for weights in ("fp32", "bf16", "int8", "int4")]
    seconds = linear_seconds()
    first = found[0]["perplexity"]
    print(
        "| weights | perplexity | change | in the store | on the worker | of that, layers |", end=""
    )
    print("".join(f" {n} row{'s' if n > 1 else ''} |" for n in NUM_ROWS))
    print("|---" * (6 + len(NUM_ROWS)) + "|")
    for row in found:
        sizes = [f"{row[k] / 1e6:.2f} MB" for k in ("stored_bytes", "worker_bytes", "layer_bytes")]
        times = [f"{seconds[row['weights']][n] * 1e3:.2f} ms" for n in NUM_ROWS]
        change = f"{100 * (row['perplexity'] / first - 1):+.2f} %"
        cells = [row["weights"], f"{row['perplexity']:.4f}", change, *sizes, *times]
        print(f"| {' | '.join(cells)} |")
    measured = {
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "training_seconds": arguments.seconds,
        "training_steps": steps,
        "models": found,
        "linear_width": WIDTH,
        "linear_seconds": seconds,
    }
    write_results("quantisation", measured)


if __name__ == "__main__":
    main()
