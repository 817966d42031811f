"""Looks after the runs in a store: lists them, tells whether they are whole, cleans up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagflow.errors import DagflowError, DamagedData, NotFound, SettingsInvalid
from dagflow.graph.show import amount
from dagflow_storage import (
    Damage,
    Garbage,
    GarbageReport,
    RunDirectory,
    Snapshot,
    Store,
    collect_garbage,
    differences,
    list_snapshots,
    shown_url,
    size_bytes,
    verify_snapshot,
)


@dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs.

    Attributes
    ----------
    name : str
    step : int
        Of the last metrics; 0 before the first.
    loss : float | None
    snapshots : tuple of int
    size_bytes : int
    problem : str | None
        Why the rest isn't known.
    """

    name: str
    step: int = 0
    loss: float | None = None
    snapshots: tuple[int, ...] = ()
    size_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What was found damaged: of the run itself, and by step of its snapshots."""

    run: tuple[Damage, ...]
    snapshots: Mapping[int, tuple[Damage, ...]]

    @property
    def whole(self) -> list[int]:
        """The steps whose snapshots are whole."""
        return [step for step, damages in self.snapshots.items() if not damages]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.run and len(self.whole) == len(self.snapshots)

    def __str__(self) -> str:
        lines = [f"run: {_state(self.run)}", *_listed(self.run)]
        for step, damages in self.snapshots.items():
            lines += [f"snapshot of step {step}: {_state(damages)}", *_listed(damages)]
        lines.append(f"whole snapshots: {', '.join(map(str, self.whole)) or 'none'}")
        return "\n".join(lines)


def summarise_runs(root: str, on_run: Callable[[str], None] = lambda _: None) -> list[RunSummary]:
    """Return what is known of each run directly below a folder or URL, or at it.

    A run that can't be read is listed with what is wrong with it.
    """
    store = open_store(root)
    if _is_run(store):
        return [_summary(store, root)]
    summaries = []
    for name in store.list():
        child = store.child(name)
        on_run(name)
        if _is_run(child):
            summaries.append(_summary(child, name))
    return summaries


def runs_table(summaries: Sequence[RunSummary]) -> str:
    """Return the summaries as text, one line a run."""
    rows = [("run", "steps", "last loss", "snapshots", "size")]
    for summary in summaries:
        loss = "" if summary.loss is None else f"{summary.loss:.4f}"
        last = summary.problem or _some(summary.snapshots)
        size = amount(summary.size_bytes, "B")
        rows.append((summary.name, str(summary.step), loss, last, size))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 2, 4}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def num_objects(url: str) -> int:
    """Return how many objects `verify_run` will read."""
    store = open_store(url)
    total = 0
    for step in list_snapshots(store):
        try:
            total += len(Snapshot.open(store, step).objects)
        except DamagedData:
            continue
    return total


def verify_run(url: str, on_object: Callable[[str], None] = lambda _: None) -> VerifyReport:
    """Read every object of every snapshot of a run, and return what is damaged.

    Raises
    ------
    NotFound
        If there is nothing of a run.
    FormatTooNew
        If a newer dagflow wrote it.
    """
    store = open_store(url)
    if not _is_run(store):
        raise NotFound(
            f"{shown_url(url)} holds no run of dagflow: there is neither run.json nor a snapshot."
        )
    run = RunDirectory(store)
    damages, settings, run_id = _verify_run_file(run)
    try:
        run.read_metrics()
    except DamagedData as error:
        damages.append(Damage("metrics", str(error)))
    snapshots = {}
    for step in list_snapshots(store):
        try:
            found = verify_snapshot(store, step, on_object)
            found = found or foreign(Snapshot.open(store, step), settings, run_id)
        except NotFound:
            continue
        # The run may go on meanwhile, and delete what is old: that isn't damage.
        if not found or step in list_snapshots(store):
            snapshots[step] = tuple(found)
    return VerifyReport(tuple(damages), snapshots)


def foreign(snapshot: Snapshot, settings: Mapping[str, Any], run_id: str | None) -> list[Damage]:
    """Return why a snapshot isn't this run's: made by another run, or of another model.

    Parameters
    ----------
    settings, run_id
        As in the run's ``run.json``; empty and None if they aren't known.
    """
    theirs = snapshot.meta.get("run_id")
    if theirs is not None and run_id is not None and theirs != run_id:
        return [Damage(f"step {snapshot.step}", f"of run {theirs}, and this is run {run_id}")]
    from dagflow_tasks.train.state import PARAMETER  # with torch, which listing runs does without

    model = settings.get("model")
    wanted = model.get("parameters") if isinstance(model, dict) else None
    return differences(snapshot, PARAMETER, wanted) if isinstance(wanted, dict) else []


def collect(
    url: str,
    *,
    nobody_writes: Callable[[], bool],
    dry_run: bool,
    on_delete: Callable[[Garbage], None] = lambda _: None,
) -> GarbageReport:
    """Delete what a run left behind; see `dagflow_storage.collect_garbage`.

    Raises
    ------
    NotFound
        If there is no run: what isn't known to be one is left alone.
    """
    store = open_store(url)
    if not RunDirectory(store).exists():
        raise NotFound(
            f"{shown_url(url)} holds no run of dagflow: there is no run.json. Nothing was deleted."
        )
    return collect_garbage(store, nobody_writes=nobody_writes, dry_run=dry_run, on_delete=on_delete)


def describe_garbage(report: GarbageReport, *, dry_run: bool) -> str:
    """Return how much was deleted, or what would be, as text."""
    lines = [f"{amount(g.size_bytes, 'B'):>8}  {g.path}  ({g.why})" for g in report.garbage]
    lines = lines if dry_run else []
    verb = "would be deleted" if dry_run else "deleted"
    lines.append(f"{verb}: {_counted(report.garbage)}")
    if report.spared:
        lines.append(
            f"spared, because somebody may be at work on it: {_counted(report.spared)}. With --idle "
            "it goes, too; only if nobody trains here."
        )
    return "\n".join([*lines, *report.notes])


def samples_of(url: str, step: int | None = None) -> list[dict[str, Any]]:
    """Return which samples of the data were in the batch of every step, or of one.

    A step that was taken up again is there once: what counts is what its weights were made of.

    Raises
    ------
    NotFound
        If the ledger doesn't know the step.
    """
    rows = [
        {"step": row["step"], **(row["samples"] if isinstance(row.get("samples"), dict) else {})}
        for row in RunDirectory(open_store(url)).ledger.read()
    ]
    if step is None:
        return rows
    found = [row for row in rows if row["step"] == step]
    if not found:
        known = f"steps {rows[0]['step']} to {rows[-1]['step']}" if rows else "no step"
        raise NotFound(
            f"the ledger of {shown_url(url)} knows nothing of step {step}: it has {known}"
        )
    return found


def open_store(url: str) -> Store:
    """Return the store at a folder or URL.

    Raises
    ------
    SettingsInvalid
        If it is no URL that fsspec knows.
    """
    try:
        return Store(url)
    except ValueError as error:
        raise SettingsInvalid(f"{error}.") from error


def _counted(garbage: Sequence[Garbage]) -> str:
    size = sum(item.size_bytes for item in garbage)
    return f"{sum(item.num_objects for item in garbage)} objects, {amount(size, 'B')}"


def _is_run(store: Store) -> bool:
    return RunDirectory(store).exists() or bool(store.list("snapshots"))


def _summary(store: Store, name: str) -> RunSummary:
    try:
        run = RunDirectory(store)
        run.settings()
        row = run.read_last_metrics() or {}
        return RunSummary(
            name,
            int(row.get("step", 0)),
            row.get("loss"),
            tuple(list_snapshots(store)),
            size_bytes(store),
        )
    except NotFound:
        problem = "no run.json: copied by half?"
    except DagflowError as error:
        problem = f"{type(error).__name__}: {error}"
    return RunSummary(name, size_bytes=size_bytes(store), problem=problem)


def _verify_run_file(run: RunDirectory) -> tuple[list[Damage], dict[str, Any], str | None]:
    try:
        return [], run.settings(), run.run_id
    except NotFound:
        what = "missing, while there are snapshots: was the run's directory copied by half?"
        return [Damage("run.json", what)], {}, None
    except DamagedData as error:
        return [Damage("run.json", str(error))], {}, None


def _some(steps: Sequence[int]) -> str:
    if len(steps) > 4:
        return f"{steps[0]}, ... {steps[-2]}, {steps[-1]} ({len(steps)})"
    return ", ".join(map(str, steps)) or "none"


def _state(damages: Sequence[Damage]) -> str:
    return f"DAMAGED, {len(damages)} found" if damages else "whole"


def _listed(damages: Sequence[Damage]) -> list[str]:
    return [f"  {damage}" for damage in damages]
