"""The command line: ``dagflow train | serve | chat | join | ...``, also as ``dask dagflow ...``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from dagflow.cli.options import (
    PRECISION,
    clear_errors,
    model_options,
    num_bytes,
    number_or_auto,
    origins,
    scheduler_address,
    seconds,
)
from dagflow.cli.run_commands import runs

_API_KEYS = "DAGFLOW_API_KEYS"


@click.group("dagflow", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dagflow")
def main() -> None:
    """Train and serve torch models on machines nobody controls, as a dask graph of stages."""


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
    callback=number_or_auto,
    help="Number of stages, or auto.",
)
@click.option("--precision", type=PRECISION, default="fp32", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--store", default="runs/train", show_default=True, help="Folder or fsspec URL.")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@clear_errors
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


@main.command()
@click.argument("store")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@clear_errors
def resume(store: str, scheduler: str | None) -> None:
    """Go on with a run that `dagflow train` or `dagflow demo` began, whatever ended it.

    \b
    dagflow resume runs/train
    dagflow resume s3://bucket/run --scheduler tcp://10.0.0.1:8786

    A run that a Python program began goes on when that program calls dagflow.train with the same
    store again: only it knows the data.
    """
    from dagflow.demo.language import resume_run

    resume_run(store, scheduler)


@main.command()
@click.argument("scheduler", callback=scheduler_address)
@click.option(
    "--torch-threads",
    type=int,
    help="Threads inside an operator; this machine's share of its cores by default.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0, ... or auto.")
@click.option("--name", help="What the roster and the dashboard call this worker.")
@click.option("--memory-limit", default="auto", show_default=True, help="As 4GB; auto offers all.")
@click.option("--lifetime", callback=seconds, help="Leave after this long, e.g. '2 hours'.")
@click.option("--wait", callback=seconds, help="Give up after this long without a scheduler.")
@click.option("--once", is_flag=True, help="End when the scheduler goes away, like dask worker.")
@click.option("--verbose", is_flag=True, help="Show all that dask says, tracebacks included.")
@clear_errors
def join(
    scheduler: str,
    lifetime: float | None,
    wait: float | None,
    once: bool,
    verbose: bool,
    **offered: Any,
) -> None:
    """Lend this machine to the dask SCHEDULER at an address: it becomes a worker.

    \b
    dagflow join tcp://10.0.0.1:8786
    dagflow join tcp://10.0.0.1:8786 --device cuda:0 --name attic

    It offers all memory and cores; several on one machine share them. It comes back when the
    scheduler was away, and starts again after a crash. Ctrl-C leaves: what only this machine has is
    handed over first; a second Ctrl-C leaves at once.
    Whoever runs the scheduler can run code here: join swarms of people you trust.
    """
    import dask

    from dagflow.swarm.join import TEMPORARY_VARIABLE, hush_dask, with_private_folder

    # Where dask keeps its files, if the user's configuration says so; else a folder of our own.
    if (configured := dask.config.get("temporary-directory", None)) is not None:
        os.environ.setdefault(TEMPORARY_VARIABLE, str(configured))
    if not verbose:
        hush_dask(os.environ)
    worker = [sys.executable, "-m", "dagflow.swarm.volunteer", scheduler]
    for option, value in offered.items():
        worker += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    worker += ["--lifetime", f"{lifetime} s"] if lifetime and once else []
    worker += ["--verbose"] if verbose else []
    # The parent replaces this process, which has loaded more than it needs. Not from the folder it
    # is in, where anything may lie.
    ends = ["" if seconds is None else str(seconds) for seconds in (wait, lifetime)]
    parent = [sys.executable, "-P", "-m", "dagflow.swarm.join", scheduler, *ends, *worker]
    if not once:
        os.execv(sys.executable, parent)
    from dagflow.swarm.allocator import with_allocator

    # Nobody is left to delete it: an empty folder stays.
    folder = tempfile.mkdtemp(prefix="dagflow-join-")
    environment = with_private_folder(with_allocator(os.environ), folder)
    os.execve(sys.executable, worker, environment)


@main.command()
@click.option("--fresh", is_flag=True, help="Forget the demo's earlier run.")
@click.option("--folder", default="runs/demo", show_default=True, help="Folder or URL of the run.")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@clear_errors
def demo(fresh: bool, folder: str, scheduler: str | None) -> None:
    """Train a small GPT on Python's own sources, with a worker a core, and let it write.

    \b
    dagflow demo
    dagflow demo --fresh
    """
    from dagflow.demo.run import run_demo

    run_demo(folder, fresh=fresh, client=scheduler)


@main.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key",
    multiple=True,
    envvar=_API_KEYS,
    help="Who has none of these is refused; may be repeated. Everybody is served by default.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    callback=origins,
    help="Web pages that may ask, as https://example.org, or * for all; may be repeated. By default "
    "only the server's own.",
)
@click.option(
    "--allow-host",
    multiple=True,
    help="Names that clients call the server by, behind a proxy for one; may be repeated, * for all. "
    "On loopback those of this machine are known, and others are refused.",
)
@click.option(
    "--max-running",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Requests answered at a time.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Requests that may wait; others are told to come back.",
)
@click.option(
    "--cache-memory",
    callback=num_bytes,
    help="What sessions' caches may take on each worker, as 4GB; by default half of what weights "
    "leave of its memory.",
)
@click.option(
    "--prefix-reuse/--no-prefix-reuse",
    default=True,
    show_default=True,
    help="Compute what prompts begin with alike only once.",
)
@click.option(
    "--answers",
    help="Folder or URL that keeps answers to requests with an Idempotency-Key, for a day: sent again, "
    "they are gone on with, also after this server has died.",
)
@clear_errors
def serve(
    api_key: tuple[str, ...],
    allow_origin: tuple[str, ...],
    allow_host: tuple[str, ...],
    max_running: int,
    max_queue: int,
    **options: Any,
) -> None:
    """Serve a language model as OpenAI's clients expect it, and a page to talk to it.

    \b
    dagflow serve --model ./SmolLM2-135M-Instruct
    dagflow serve --model ./SmolLM2-135M-Instruct --host 0.0.0.0 --api-key secret
    dagflow serve --model ./Llama --weights bf16 --scheduler tcp://10.0.0.1:8786 --store s3://bucket

    Ctrl-C ends it. Keys that the command line shouldn't show go into DAGFLOW_API_KEYS.
    """
    from dagflow.server.serve import serve as serve_model
    from dagflow.server.service import ServerSettings

    os.environ.pop(_API_KEYS, None)  # processes that are started need no keys
    settings = ServerSettings(api_key, max_running, max_queue, allow_host, allow_origin)
    serve_model(**options, settings=settings, note=click.echo)


@main.command()
@model_options
@click.option("--system", help="What the model is told before the conversation.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    help="What the model's generation_config.json says by default, or 0.7.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Longest answer.",
)
@clear_errors
def chat(**options: Any) -> None:
    """Talk to a language model in the terminal.

    \b
    dagflow chat --model ./SmolLM2-135M-Instruct
    dagflow chat --model ./SmolLM2-135M-Instruct --temperature 0 --system "Answer in one sentence."
    dagflow chat --model ./Llama --scheduler tcp://10.0.0.1:8786 --store s3://bucket

    Ctrl-C ends an answer; Ctrl-D, or Ctrl-C where it is your turn, the conversation.
    """
    from dagflow.server.terminal import chat as talk

    def write(text: str) -> None:
        click.echo(text, nl=False)

    talk(**options, write=write)


@main.command()
@click.argument("path")
@click.option("--dot", type=click.Path(dir_okay=False), help="Write an operator DAG as Graphviz.")
@clear_errors
def inspect(path: str, dot: str | None) -> None:
    """Show what is at PATH: a run's directory or URL, an operator DAG's or a stage's JSON file.

    \b
    dagflow inspect runs/demo
    dagflow inspect s3://bucket/run
    dagflow inspect dag.json --dot dag.dot
    """
    from dagflow.runs.inspect import describe_file, describe_run

    file = Path(path)
    text = describe_file(file, dot) if file.is_file() else describe_run(path)
    click.echo(text)


main.add_command(runs)
