"""One run under a script of faults against the same run without, and everything that must hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chaos import accounting, warm
from chaos.driving import VOCABULARY, Recipe, undisturbed
from chaos.faults import ENABLED, Fault, Incident, script
from chaos.harness import Harness, Outcome
from dagflow import TokenDataset
from dagflow_storage import RunDirectory, Store, collect_garbage

NUM_FAULTS = 28


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes
    ----------
    incidents : sequence of Incident
        The script.
    outcome : Outcome
    failures : list of str
        What doesn't hold; empty if all is well.
    """

    incidents: Sequence[Incident]
    outcome: Outcome
    failures: list[str]


def recipe_for(seed: int, folder: Path) -> Recipe:
    """Return what a seed trains: batches or tokens, clipped or not."""
    recipe = Recipe(clip_grad_norm=1.0 if seed % 2 else None)
    if seed % 3 != 1:
        return recipe
    url = str(folder / "tokens")
    tokens = torch.randint(0, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(3))
    TokenDataset.write(url, tokens.numpy())
    return replace(recipe, tokens=url)


def hold_trial(
    seed: int, folder: Path, count: int = NUM_FAULTS, kinds: Collection[Fault] = ENABLED
) -> Trial:
    """Run a seed's script of faults, and compare with the undisturbed run."""
    recipe = recipe_for(seed, folder)
    return hold_script(script(seed, recipe.extent, count, kinds), recipe, folder, seed)


def hold_script(
    incidents: Sequence[Incident], recipe: Recipe, folder: Path, seed: int = 0
) -> Trial:
    """Run a script of faults, and compare with the undisturbed run."""
    wanted = folder / "wanted.pt"
    warm.start(undisturbed, folder / "undisturbed.log", recipe, wanted).join()
    run = folder / "disturbed"
    run.mkdir()
    harness = Harness(run, recipe, incidents, seed=seed)
    outcome = harness.run()
    failures = [
        *different(torch.load(harness.final), torch.load(wanted)),
        *miscounted(RunDirectory(Store(f"{run}/run")), recipe),
        *unaccounted(outcome, recipe),
        *orphaned(Store(f"{run}/run")),
    ]
    unfired = [str(i) for i in incidents if i not in outcome.fired]
    if unfired:
        failures.append(f"never happened: {'; '.join(unfired)}")
    return Trial(incidents, outcome, failures)


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Say in which losses and weights two runs differ, by a single bit."""
    said = []
    for step, (a, b) in enumerate(zip(found["losses"], wanted["losses"], strict=True), start=1):
        if a != b:
            said.append(f"the loss of step {step} is {a!r} instead of {b!r}")
    weights, others = found["weights"], wanted["weights"]
    if sorted(weights) != sorted(others):
        said.append(f"other weights: {sorted(weights)} instead of {sorted(others)}")
    unequal = [name for name in others if not torch.equal(weights[name], others[name])]
    return said + [f"{name} differs" for name in unequal]


def miscounted(run: RunDirectory, recipe: Recipe) -> list[str]:
    """Say which steps and samples the ledger doesn't have exactly once."""
    rows = run.ledger.read()
    steps = [row["step"] for row in rows]
    wanted = list(range(recipe.extent.num_steps))
    said = [] if steps == wanted else [f"the ledger has the steps {steps}"]
    if not recipe.tokens:
        seen = [(row["samples"]["epoch"], row["samples"]["batch"]) for row in rows]
        if seen != [(0, step) for step in wanted]:
            said.append(f"the ledger has the batches {seen}")
    sizes = {sum(m[0] for m in row["microbatches"]) for row in rows}
    return said + ([] if sizes == {1.0} else [f"micro-batches weigh {sizes} in all"])


def unaccounted(outcome: Outcome, recipe: Recipe) -> list[str]:
    """Say which tasks nobody did, or somebody did again though no fault gave reason to."""
    extent = recipe.extent
    absent = accounting.missing(
        outcome.executions, range(extent.num_steps), extent.num_stages, extent.num_microbatches
    )
    again = outcome.unexplained()
    return [*(f"never done: {place}" for place in absent), *again]


def orphaned(store: Store) -> list[str]:
    """Say what tidying up leaves in the store that nothing refers to."""
    collect_garbage(store, nobody_writes=lambda: True)
    folders = store.list("snapshots")
    return [
        f"snapshots/{name} was never finished"
        for name in folders
        if not store.exists(f"snapshots/{name}/manifest.json")
    ]


def summary(trial: Trial) -> dict[str, Any]:
    """Return a line of the table."""
    outcome = trial.outcome
    times = accounting.times_executed(outcome.executions)
    return {
        "faults": len(outcome.fired),
        "kinds": len({incident.fault for incident in outcome.fired}),
        "overlapping": _overlapping(outcome),
        "seconds": round(outcome.seconds, 1),
        "steps_repeated": outcome.steps_repeated,
        "tasks": sum(times.values()),
        "tasks_again": sum((n - 1) * count for n, count in times.items()),
        "replayed": sum(e.place[0] == "replay" for e in outcome.executions),
        "useful": round(accounting.useful_share(outcome.executions), 3),
        "reruns": len(outcome.reruns),
        "moved": outcome.num_moved,
        "failures": len(trial.failures),
    }


def _overlapping(outcome: Outcome) -> int:
    """Count the faults that came while another was being recovered from: no step lies between."""
    done = Counter(sum(t < hit.begin for t in _step_times(outcome)) for hit in outcome.hits)
    return sum(count for count in done.values() if count > 1)


def _step_times(outcome: Outcome) -> list[float]:
    last = [e for e in outcome.executions if e.place[0] == "update" and e.place[2] == 0]
    return sorted(e.end for e in last if e.end is not None)
