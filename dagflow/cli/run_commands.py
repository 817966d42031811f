"""``dagflow runs``: what is done with runs that are in a store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import click

from dagflow.cli.options import clear_errors


@click.group()
def runs() -> None:
    """List, check, clean up and export runs.

    \b
    dagflow runs ls runs
    dagflow runs verify s3://bucket/run
    dagflow runs export runs/demo --format safetensors --to model.safetensors
    """


@runs.command("ls")
@click.argument("root", default="runs")
@clear_errors
def list_runs(root: str) -> None:
    """List the runs below a folder or URL: steps, loss, snapshots, size.

    \b
    dagflow runs ls
    dagflow runs ls s3://bucket
    """
    from rich.console import Console

    from dagflow.runs.listing import runs_table, summarise_runs
    from dagflow_storage import shown_url

    with Console(stderr=True).status("") as status:
        found = summarise_runs(root, status.update)
    click.echo(runs_table(found) if found else f"There are no runs below {shown_url(root)}.")


@runs.command()
@click.argument("store")
@clear_errors
def show(store: str) -> None:
    """Show a run: settings, progress, snapshots.

    \b
    dagflow runs show runs/demo
    """
    from dagflow.runs.inspect import describe_run

    click.echo(describe_run(store))


@runs.command()
@click.argument("store")
@clear_errors
def verify(store: str) -> None:
    """Read every object of every snapshot, and say what is damaged. Status 1 if anything is.

    \b
    dagflow runs verify runs/demo
    """
    from dagflow.runs.listing import num_objects, verify_run

    with _progress("objects", num_objects(store)) as advance:
        report = verify_run(store, advance)
    click.echo(str(report))
    sys.exit(0 if report.is_whole else 1)


@runs.command()
@click.argument("store")
@click.option("--dry-run", is_flag=True, help="Delete nothing, and only tell.")
@click.option("--idle", is_flag=True, help="Nobody trains here: delete what is young, too.")
@clear_errors
def gc(store: str, dry_run: bool, idle: bool) -> None:
    """Delete what crashes left behind and nobody needs. Safe while the run goes on.

    \b
    dagflow runs gc runs/demo --dry-run
    """
    from dagflow.runs.listing import collect, describe_garbage

    report = collect(
        store,
        nobody_writes=lambda: idle,
        dry_run=dry_run,
        on_delete=lambda garbage: click.echo(f"deleted {garbage.path}"),
    )
    click.echo(describe_garbage(report, dry_run=dry_run))


@runs.command()
@click.argument("store")
@click.option("--step", type=int, help="Only this step, counted from 0.")
@clear_errors
def samples(store: str, step: int | None) -> None:
    """Say which samples went into which step: one JSON object a line, from the run's ledger.

    \b
    dagflow runs samples runs/demo --step 17
    """
    from dagflow.runs.listing import samples_of

    for row in samples_of(store, step):
        click.echo(json.dumps(row))


@runs.command()
@click.argument("store")
@click.option("--step", type=int, help="Whose weights; the newest snapshot's by default.")
@click.option("--format", type=click.Choice(["safetensors", "hf", "torch"]), required=True)
@click.option("--to", required=True, type=click.Path(), help="New file, or folder for hf.")
@click.option("--config", type=click.Path(), help="For hf: folder with the model's config.json.")
@clear_errors
def export(
    store: str,
    step: int | None,
    format: Literal["safetensors", "hf", "torch"],
    to: str,
    config: str | None,
) -> None:
    """Write a run's weights as safetensors, as a Hugging Face folder, or for torch.load.

    \b
    dagflow runs export runs/demo --format safetensors --to model.safetensors
    dagflow runs export runs/tune --step 400 --format hf --config ./gpt2 --to ./tuned
    """
    from dagflow.runs.export import export as export_weights
    from dagflow.runs.export import num_tensors

    with _progress("tensors", num_tensors(store, step)) as advance:
        done = export_weights(store, to, format=format, step=step, config=config, on_tensor=advance)
    click.echo(f"{done.path}: {done.num_tensors} tensors of step {done.step}")
    if done.note:
        click.echo(done.note, err=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr if somebody looks; yield what to call for each thing done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, label=what, file=sys.stderr) as bar:
        yield lambda _: bar.update(1)
