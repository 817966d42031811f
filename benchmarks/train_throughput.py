"""Training throughput: dagflow on 2 workers, torch's 1F1B on 2 ranks, plain torch on 2 threads.

::

    python benchmarks/train_throughput.py                       # fp32, 2 stages, 8 micro-batches
    python benchmarks/train_throughput.py --precision bf16
    python benchmarks/train_throughput.py --stages 4 --microbatches 32
    python benchmarks/train_throughput.py --device cuda --precision bf16 --only torch --only dagflow

All train the same GPT from the same weights on the same bytes, each in fresh processes, one after
the other in several rounds; their losses must agree before a speed is quoted. The vocabulary is
256 (bytes), so that the blocks are what is measured, and stages of equally many blocks balance.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import report
import torch
from common import write_results
from torch_pipeline import train_1f1b, train_plain
from workload import Timing, Workload

import dagflow

NUM_CORES = 2
# What each contestant's user gets without setting anything: glibc's malloc as it is. Only the
# number of threads is pinned, and the device hidden that isn't measured.
NUM_THREADS = {"torch": NUM_CORES}


@dataclass
class _Steps:
    """A callback that keeps the losses, and the clock at the end of each step."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def on_step(self, event: dagflow.StepEvent) -> None:
        self.losses.append(event.loss)
        self.ends.append(time.perf_counter())


def train_dagflow(workload: Workload) -> Timing:
    """Train as a user does who gives a model and batches, and no cluster."""
    steps = _Steps()
    with tempfile.TemporaryDirectory() as folder:
        dagflow.train(
            workload.model(),
            list(workload.batches()),
            optimizer=dagflow.Optimizer("AdamW", **workload.optimizer_options()),
            num_stages=workload.num_stages,
            num_microbatches=workload.num_microbatches,
            precision=workload.precision,
            store=f"{folder}/run",
            progress=False,
            callbacks=[steps],
            config=_config(),
        )
    return Timing.from_ends(workload, steps.losses, steps.ends)


def _config() -> dagflow.Config | None:
    """Return None, the default, where that is 2 workers of one thread; else ask for them."""
    if os.cpu_count() == NUM_CORES:
        return None
    return dagflow.Config(cluster=dagflow.ClusterSettings(NUM_CORES, num_torch_threads=1))


CONTESTANTS: dict[str, Callable[[Workload], Timing]] = {
    "dagflow": train_dagflow,
    "1f1b": train_1f1b,
    "torch": train_plain,
}


def measure(workload: Workload, contestants: list[str], num_rounds: int) -> report.Rounds:
    """Run the contestants in turn, so that a slow minute of the machine hits all alike."""
    rounds: dict[str, list[Timing]] = {name: [] for name in contestants}
    for number in range(num_rounds):
        for name in contestants:
            begin = time.perf_counter()
            rounds[name].append(_in_fresh_process(name, workload))
            seconds = time.perf_counter() - begin
            print(f"round {number + 1} of {num_rounds}: {name} took {seconds:.0f} s", flush=True)
    return rounds


def _in_fresh_process(name: str, workload: Workload) -> Timing:
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "OMP_", "MKL_", "DASK_"))
    }
    environment["OMP_NUM_THREADS"] = str(NUM_THREADS.get(name, 1))
    if workload.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if name == "dagflow":
        del environment["OMP_NUM_THREADS"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timing.json")
        command = [sys.executable, __file__, "--run", name, workload.to_json(), str(path)]
        subprocess.run(command, env=environment, check=True)
        return Timing.load(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", type=int, default=2, help="2, or 4 on the same 2 workers")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="sequences a micro-batch")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=3, help="steps that aren't timed")
    parser.add_argument("--steps", type=int, default=8, help="steps that are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=sorted(CONTESTANTS))
    parser.add_argument(
        "--unfused", action="store_true", help="AdamW as torch builds it by default, in all"
    )
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.run:
        name, workload_json, path = arguments.run
        CONTESTANTS[name](Workload.from_json(workload_json)).save(Path(path))
        return
    workload = Workload(
        num_layers=arguments.layers,
        width=arguments.width,
        num_heads=arguments.heads,
        context=arguments.context,
        vocab_size=arguments.vocabulary,
        num_stages=arguments.stages,
        num_microbatches=arguments.microbatches,
        rows_per_microbatch=arguments.rows,
        precision=arguments.precision,
        device=arguments.device,
        fused_optimizer=not arguments.unfused,
        num_warmup_steps=arguments.warmup,
        num_timed_steps=arguments.steps,
    )
    contestants = [name for name in CONTESTANTS if name in (arguments.only or CONTESTANTS)]
    reference = "1f1b" if "1f1b" in contestants else "torch"
    print(f"torch {torch.__version__}, {workload.tokens_per_step} tokens a step, {workload}")
    rounds = measure(workload, contestants, arguments.rounds)
    difference = report.check_losses(workload, rounds)
    results = report.summary(workload, rounds, reference)
    print(report.table(results, reference))
    print(f"losses differ by {difference:.1e} at most")
    measured = {
        "workload": asdict(workload),
        "largest_difference_of_losses": difference,
        "results": results,
        "rounds": {name: [asdict(t) for t in timings] for name, timings in rounds.items()},
    }
    write_results("train_throughput", measured, f"train_throughput_{_label(workload)}")


def _label(workload: Workload) -> str:
    return (
        f"{workload.device}_{workload.precision}_{workload.num_layers}x{workload.width}"
        f"_{workload.num_stages}stages_{workload.num_microbatches}microbatches"
    )


if __name__ == "__main__":
    main()
