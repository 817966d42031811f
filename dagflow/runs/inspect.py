"""Shows runs and program files to people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dagflow.errors import DamagedData, NotFound, ProgramInvalid
from dagflow.graph.dag import FORMAT as DAG_FORMAT
from dagflow.graph.dag import OperatorDag, dtype_bytes
from dagflow.graph.show import amount
from dagflow.runs.listing import open_store
from dagflow_storage import RunDirectory, Snapshot, Store, list_snapshots, shown_url
from dagflow_storage.place.bounded_json import load_json
from dagflow_tasks.program.stage_program import StageProgram

_BARS = "▁▂▃▄▅▆▇█"
_CHART_WIDTH = 60
_NUM_EVENTS = 8


def describe_run(url: str) -> str:
    """Return a run's settings, progress and snapshots as text.

    Raises
    ------
    NotFound
        If there is no run.
    DamagedData
        If its run.json or metrics aren't those of one.
    """
    store = open_store(url)
    run = RunDirectory(store)
    if not run.exists():
        raise NotFound(f"{shown_url(url)} holds no run of dagflow: there is no run.json.")
    settings = run.settings()
    metrics = run.read_metrics()
    steps = list_snapshots(store)
    try:
        lines = [f"run {run.run_id} in {store}", *_settings_lines(settings)]
        if metrics:
            lines += _progress_lines(metrics)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedData(
            f"run.json or the metrics of {store!r} lack what a run's have: {type(error).__name__}: {error}"
        ) from error
    lines.append(f"snapshots: {', '.join(map(str, steps)) or 'none'}")
    lines += [_snapshot_line(store, step) for step in steps]
    lines += _event_lines(run.events.read(skip_damaged=True))
    return "\n".join(lines)


def _settings_lines(settings: dict[str, Any]) -> list[str]:
    optimizer = settings["optimizer"]
    options = ", ".join(f"{key}={value}" for key, value in optimizer["options"].items())
    model = settings["model"]
    names = list(model["parameters"])
    return [
        f"model: {model['num_trainable']:,} trainable parameters in {len(names)} tensors "
        f"({names[0]} ... {names[-1]}), {model['num_operators']} operators",
        f"optimizer: {optimizer['name']}({options}), schedule {settings['schedule']['kind']}, "
        f"{settings['num_microbatches']} micro-batches, {settings['precision']}, seed {settings['seed']}",
    ]


def _event_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the last events that concern workers and stages, a line each."""
    rows = [row for row in rows if row.get("event") != "noted"][-_NUM_EVENTS:]
    lines = ["what happened last:"] if rows else []
    for row in rows:
        known = ("number", "time", "event", "worker")
        left = {k: v for k, v in row.items() if k not in known and v not in ("", None, [])}
        facts = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in left.items()
        )
        when = datetime.fromtimestamp(float(row["time"])).strftime("%Y-%m-%d %H:%M:%S")
        lines.append(f"  {when}  {row['event']:<18} {facts}")
    return lines


def _progress_lines(metrics: Sequence[dict[str, Any]]) -> list[str]:
    losses = [row["loss"] for row in metrics]
    seconds = sorted(row["seconds"] for row in metrics)
    rate = metrics[-1]["amount"] / seconds[len(seconds) // 2]
    return [
        f"steps: {metrics[-1]['step']}, median {seconds[len(seconds) // 2]:.3g} s a step, "
        f"{rate:,.0f} {metrics[-1]['unit']}/s",
        f"loss: {losses[0]:.4f} {chart(losses)} {losses[-1]:.4f}",
    ]


def chart(values: Sequence[float]) -> str:
    """Draw values as a line of bars, averaged to fit.

    >>> chart([4, 3, 2, 1, 0])
    '█▆▄▂▁'
    """
    width = min(_CHART_WIDTH, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[int((mean - low) * scale)] for mean in means)


def _snapshot_line(store: Store, step: int) -> str:
    try:
        snapshot = Snapshot.open(store, step)
        total = sum(s.num_elements * dtype_bytes(s.dtype) for s in snapshot.arrays.values())
    except (DamagedData, ProgramInvalid) as error:
        return f"  step {step}: DAMAGED, {error}"
    stored = sum(found.size_bytes for found in snapshot.objects.values())
    roles = ", ".join(f"{len(snapshot.names(role))} {role}" for role in snapshot.roles)
    loss = snapshot.meta.get("loss")
    shown = f", loss {loss:.4f}" if isinstance(loss, float) else ""
    packed = f" in {amount(stored, 'B')}" if stored else ""
    return f"  step {step}{shown}: {amount(total, 'B')}{packed} ({roles})"


def describe_file(path: Path, dot: str | None) -> str:
    """Return an operator DAG or a stage program as text; `dot` names a file for the picture.

    Raises
    ------
    ProgramInvalid
        If the file is neither.
    """
    try:
        body = load_json(path)
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ProgramInvalid(f"{path} isn't JSON: {error}.") from error
    if isinstance(body, dict) and body.get("format") == DAG_FORMAT:
        dag = OperatorDag.from_json(text)
        if dot is not None:
            Path(dot).write_text(dag.to_graphviz(), encoding="utf-8")
            return f"{dag}\nwritten: {dot} (draw it with: dot -Tsvg {dot} -o dag.svg)"
        return str(dag)
    return describe_program(StageProgram.from_json(text))


def describe_program(program: StageProgram) -> str:
    """Return a stage program's ends and operators as text."""
    inputs = [
        f"{i.value.name} ({'batch' if i.source is None else f'stage {i.source}'})"
        for i in program.inputs
    ]
    outputs = [f"{o.value.name} (to {', '.join(map(str, o.readers))})" for o in program.outputs]
    lines = [
        f"stage {program.stage} of {program.num_stages}: {len(program.nodes)} operators, "
        f"{len(program.owned_parameters)} parameters",
        f"inputs: {', '.join(inputs) or 'none'}",
        f"outputs: {', '.join(outputs) or 'none'}{f', loss {program.loss}' if program.loss else ''}",
    ]
    lines += [f"  {node.name:<28} {node.op:<44} {node.module}" for node in program.nodes]
    return "\n".join(lines)
