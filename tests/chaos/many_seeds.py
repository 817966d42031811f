"""Runs many seeds' scripts of faults, and prints a table.

python tests/chaos/many_seeds.py --seeds 10 [--first 0] [--faults 28] [--kind KILL --kind ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

from chaos.faults import ENABLED, Fault
from chaos.harness import Stuck
from chaos.trial import NUM_FAULTS, hold_trial, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--faults", type=int, default=NUM_FAULTS)
    parser.add_argument("--kind", action="append", choices=[f.name for f in Fault])
    options = parser.parse_args()
    kinds = {Fault[name] for name in options.kind} if options.kind else ENABLED
    bad = 0
    for seed in range(options.first, options.first + options.seeds):
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
        try:
            trial = hold_trial(seed, folder, options.faults, kinds)
        except Stuck as error:
            bad += 1
            print(f"seed {seed}: {error}")
            continue
        line = summary(trial)
        print(f"seed {seed:2}  " + "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
        if trial.failures:
            bad += 1
            print(f"  in {folder}:")
            print(*(f"  {failure}" for failure in trial.failures[:12]), sep="\n", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
