"""A run's directory: created, or found to hold this run and no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dagflow.errors import StoreHoldsAnotherRun
from dagflow.graph.dag import OperatorDag
from dagflow.runs.export import model_facts
from dagflow.swarm.events import EventStream
from dagflow.training.initial_weights import trained_weights
from dagflow.training.settings import Config, Mathematics
from dagflow_storage import (
    DamagedData,
    NotFound,
    RunDirectory,
    Snapshot,
    Store,
    list_snapshots,
    newest_whole_snapshot,
    settings_diff,
)


def open_run(
    store: Store,
    dag: OperatorDag,
    mathematics: Mathematics,
    weights: str | None,
    first_batch: str,
    names: Sequence[str],
    config: Config,
    events: EventStream,
) -> RunDirectory:
    """Create the run's directory, or check that it holds this run.

    Raises
    ------
    StoreHoldsAnotherRun
        If settings differ that change the mathematics; lists them.
    """
    run = RunDirectory(store)
    wanted = {
        "model": {**_model_settings(dag), **({"initial_weights": weights} if weights else {})},
        "data": {"first_batch": first_batch},
        **mathematics.to_json(),
    }
    wanted = json.loads(json.dumps(wanted))
    if not run.exists():
        facts = model_facts(names, alias_names(dag))
        run.create(wanted, {**facts, "origin": dict(config.origin) if config.origin else None})
        events.note(f"Writing to {store}.")
        return run
    difference = _differences(run.settings(), wanted, dag, store)
    if difference and not config.force:
        raise StoreHoldsAnotherRun(
            f"{store} holds a run with other settings, which change what is computed:\n  "
            + "\n  ".join(difference)
            + "\nUse another store=, the old settings, or Config(force=True) to go on regardless."
        )
    newest = (list_snapshots(store) or [0])[-1]
    events.note(f"Resuming {store} from the snapshot of step {newest}.")
    return run


def _differences(
    known: dict[str, Any], wanted: dict[str, Any], dag: OperatorDag, store: Store
) -> list[str]:
    """Say how a run's settings differ from those in the store, a line each.

    A model has the weights that the run began with, or those of its newest snapshot: whoever has
    loaded the result goes on from it.
    """
    begun, given = known.get("model"), wanted["model"]
    begun = begun if isinstance(begun, dict) else {}
    if "initial_weights" not in begun or "initial_weights" not in given:
        # Begun by an older dagflow, or unknown now.
        begun.pop("initial_weights", None)
        given.pop("initial_weights", None)
    elif begun["initial_weights"] != given["initial_weights"]:
        try:
            newest = Snapshot.open(store, newest_whole_snapshot(store))
            if trained_weights(dag, newest) == given["initial_weights"]:
                given["initial_weights"] = begun["initial_weights"]
        except (NotFound, DamagedData):  # nothing that the weights could be of
            pass
    return [
        f"{line} (neither the weights that the run began with nor those of its newest snapshot)"
        if line.startswith("model.initial_weights:")
        else line
        for line in settings_diff(known, wanted)
    ]


def alias_names(dag: OperatorDag) -> dict[str, str]:
    """Return the first name of each tied parameter by its further names."""
    return {alias: p.name for p in dag.parameters for alias in p.aliases}


def _model_settings(dag: OperatorDag) -> dict[str, Any]:
    parameters = {p.name: f"{p.dtype}{list(p.shape)}" for p in dag.parameters}
    trainable = sum(p.num_elements for p in dag.parameters if p.trainable)
    return {
        "parameters": parameters,
        "num_trainable": trainable,
        "num_operators": len(dag.nodes),
    }
