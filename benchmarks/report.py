"""What was measured: checked for the same losses, printed as a table, written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from workload import Timing, Workload

# bf16 rounds to 3 digits, and who adds what first differs between the contestants.
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 3e-2}

Rounds = Mapping[str, Sequence[Timing]]


class LossesDiffer(Exception):
    """Contestants that don't compute the same thing can't be compared."""


def largest_difference(rounds: Rounds) -> float:
    """Return by how much the losses of two contestants differ at most, in nats.

    Raises
    ------
    LossesDiffer
        If they didn't make the same number of steps.
    """
    curves = [timing.losses for timings in rounds.values() for timing in timings]
    if len({len(curve) for curve in curves}) > 1:
        raise LossesDiffer(f"steps made: {sorted(len(curve) for curve in curves)}")
    return float(np.ptp(np.array(curves), axis=0).max())


def check_losses(workload: Workload, rounds: Rounds) -> float:
    """Return the largest difference of losses, if it is small enough to compare speeds."""
    difference, allowed = largest_difference(rounds), LARGEST_DIFFERENCE[workload.precision]
    if not difference <= allowed:
        curves = {name: timings[0].losses for name, timings in rounds.items()}
        raise LossesDiffer(f"by {difference:.2e}, allowed are {allowed:.0e}: {curves}")
    return difference


def summary(workload: Workload, rounds: Rounds, reference: str) -> dict[str, dict[str, Any]]:
    """Return tokens per second by contestant, and how they compare with the reference.

    Medians are over the steps of a round, then over rounds. A ratio is taken within its round,
    since a shared machine is faster in one minute than in another.
    """
    rates = {
        name: [workload.tokens_per_step / median(timing.seconds) for timing in timings]
        for name, timings in rounds.items()
    }
    baseline = rates.get(reference, [])
    return {
        name: {
            "tokens_per_second": median(of_rounds),
            "tokens_per_second_of_rounds": of_rounds,
            # The mean sees what a median of steps hides: a pause every few steps.
            "tokens_per_second_by_mean": median(
                workload.tokens_per_step * len(t.seconds) / sum(t.seconds) for t in rounds[name]
            ),
            "ratio": median(a / b for a, b in zip(of_rounds, baseline, strict=True))
            if baseline
            else None,
            "ratio_of_rounds": [a / b for a, b in zip(of_rounds, baseline, strict=False)],
        }
        for name, of_rounds in rates.items()
    }


def table(results: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """Format a summary, a line for each contestant."""
    lines = [f"{'':10} {'tokens/s':>9} {'by mean':>9} {'of ' + reference:>9}  by round"]
    for name, result in results.items():
        ratio = "-" if result["ratio"] is None else f"{result['ratio']:.3f}"
        by_round = " ".join(f"{rate:.0f}" for rate in result["tokens_per_second_of_rounds"])
        rates = f"{result['tokens_per_second']:9.0f} {result['tokens_per_second_by_mean']:9.0f}"
        lines.append(f"{name:10} {rates} {ratio:>9}  {by_round}")
    return "\n".join(lines)
