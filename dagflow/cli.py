"""The command line: ``dagflow train | join | demo | inspect``, also as ``dask dagflow ...``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from dagflow.errors import DagflowError

_PRECISION = click.Choice(["fp32", "bf16", "fp16"])


def _number_or_auto(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.") from error


def _clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show dagflow's own errors as one message, without a traceback; Ctrl-C ends with 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DagflowError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        except KeyboardInterrupt:
            sys.exit(130)

    return run


@click.group("dagflow", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dagflow")
def main() -> None:
    """Train torch models on machines nobody controls, as a dask graph of stages."""


@main.command()
@click.argument("files", nargs=-1)
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="Hugging Face folder.")
@click.option("--layers", default=4, show_default=True, help="Size of the GPT, without --model.")
@click.option("--width", default=192, show_default=True, help="Size of the GPT, without --model.")
@click.option("--steps", default=200, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Rows a step.")
@click.option("--sequence-length", default=128, show_default=True, help="Tokens a row.")
@click.option("--lr", default=1e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--microbatches", default=8, show_default=True)
@click.option(
    "--stages",
    default="auto",
    show_default=True,
    callback=_number_or_auto,
    help="Number of stages, or auto.",
)
@click.option("--precision", type=_PRECISION, default="fp32", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--store", default="runs/train", show_default=True, help="Folder or fsspec URL.")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@_clear_errors
def train(files: tuple[str, ...], **options: Any) -> None:
    """Train a language model on text FILES (default: the Python library's own sources).

    \b
    dagflow train                                   a small GPT on Python's sources
    dagflow train notes/*.txt --steps 500
    dagflow train --model ./gpt2 book.txt --lr 5e-5 --store s3://bucket/run
    dagflow train --scheduler tcp://10.0.0.1:8786 --store s3://bucket/run

    Called again with the same store it goes on where it stopped.
    """
    from dagflow.demo.language import train_language_model

    train_language_model(files, **options)


def _scheduler_address(_: click.Context, __: click.Parameter, value: str) -> str:
    from dagflow.run.join import scheduler_endpoint

    try:
        scheduler_endpoint(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}.") from error
    return value


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    from dask.utils import parse_timedelta

    try:
        return None if value is None else float(parse_timedelta(value))
    except (ValueError, KeyError) as error:
        raise click.BadParameter(f"{value!r} is no time, like '90 s' or '2 hours'.") from error


@main.command()
@click.argument("scheduler", callback=_scheduler_address)
@click.option("--torch-threads", type=int, help="Threads inside an operator; all cores by default.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, ... or auto.")
@click.option("--name", help="What the roster and the dashboard call this worker.")
@click.option("--memory-limit", default="auto", show_default=True, help="Memory for stages.")
@click.option("--lifetime", callback=_seconds, help="Leave after this long, e.g. '2 hours'.")
@click.option("--wait", callback=_seconds, help="Give up after this long without a scheduler.")
@click.option("--once", is_flag=True, help="End when the scheduler goes away, like dask worker.")
@_clear_errors
def join(
    scheduler: str,
    torch_threads: int | None,
    device: str,
    name: str | None,
    memory_limit: str,
    lifetime: float | None,
    wait: float | None,
    once: bool,
) -> None:
    """Lend this machine to the dask SCHEDULER at an address: it becomes a worker.

    \b
    dagflow join tcp://10.0.0.1:8786
    dagflow join tcp://10.0.0.1:8786 --device cuda:0 --name attic

    It comes back when the scheduler was away, and starts again after a crash. Ctrl-C leaves: what
    only this machine has is handed over first; a second Ctrl-C leaves at once.
    Whoever runs the scheduler can run code here: join swarms of people you trust.
    """
    worker = [sys.executable, "-m", "dask", "worker", scheduler]
    worker += ["--nthreads", "1", "--nworkers", "1", "--memory-limit", memory_limit]
    worker += ["--name", name] if name else []
    worker += ["--lifetime", f"{lifetime} s"] if lifetime and once else []
    threads = torch_threads or os.cpu_count() or 1
    worker += ["--preload-nanny", "dagflow.nanny", "--preload", "dagflow.worker"]
    worker += ["--torch-threads", str(threads), "--device", device]
    # The parent replaces this process, which has loaded more than it needs. Not from the folder it
    # is in, where anything may lie.
    ends = ["" if seconds is None else str(seconds) for seconds in (wait, lifetime)]
    parent = [sys.executable, "-P", "-m", "dagflow.run.join", scheduler, *ends, *worker]
    if not once:
        os.execv(sys.executable, parent)
    from dagflow.run.allocator import with_allocator

    os.execve(sys.executable, worker, with_allocator(os.environ))


@main.command()
@click.option("--fresh", is_flag=True, help="Forget the demo's earlier run.")
@click.option("--folder", default="runs/demo", show_default=True, help="Folder or URL of the run.")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@_clear_errors
def demo(fresh: bool, folder: str, scheduler: str | None) -> None:
    """Train a small GPT on Python's own sources, with a worker a core, and let it write.

    \b
    dagflow demo
    dagflow demo --fresh
    """
    from dagflow.demo.run import run_demo

    run_demo(folder, fresh=fresh, client=scheduler)


@main.command()
@click.argument("path")
@click.option("--dot", type=click.Path(dir_okay=False), help="Write an operator DAG as Graphviz.")
@_clear_errors
def inspect(path: str, dot: str | None) -> None:
    """Show what is at PATH: a run's directory or URL, an operator DAG's or a stage's JSON file.

    \b
    dagflow inspect runs/demo
    dagflow inspect s3://bucket/run
    dagflow inspect dag.json --dot dag.dot
    """
    from dagflow.run.inspect import describe_file, describe_run

    file = Path(path)
    text = describe_file(file, dot) if file.is_file() else describe_run(path)
    click.echo(text)


if __name__ == "__main__":
    main()
