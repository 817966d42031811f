"""Kills the driver at many moments of one run, and tells whether it ended as if nothing had happened.

python tests/chaos/many_drivers.py --moments 50 [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

from chaos.driving import Recipe
from chaos.faults import Fault, moments_in_task
from chaos.trial import hold_script, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="drivers-"))
    recipe = Recipe()
    kills = moments_in_task(
        options.seed, recipe.extent, options.moments, Fault.DRIVER_KILLED_IN_TASK
    )
    trial = hold_script(kills, recipe, folder, options.seed)
    print("  ".join(f"{name} {value}" for name, value in summary(trial).items()))
    print(*trial.failures[:20], f"in {folder}", sep="\n")
    return len(trial.failures)


if __name__ == "__main__":
    sys.exit(main())
