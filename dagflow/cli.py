"""The command line: ``dagflow train | serve | chat | join | ...``, also as ``dask dagflow ...``."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import click

from dagflow.errors import DagflowError

_PRECISION = click.Choice(["fp32", "bf16", "fp16"])
_API_KEYS = "DAGFLOW_API_KEYS"


def _number_or_auto(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.") from error


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from dask.utils import parse_bytes

    try:
        found = int(parse_bytes(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no amount of memory, such as 4GB.") from error
    if found < 1:
        raise click.BadParameter(f"{value!r} is no room for anything.")
    return found


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


def _origins(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(origin.lower().rstrip("/") for origin in value)
    for origin in found:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise click.BadParameter(f"{origin!r} is no origin, such as https://example.org.")
    return found


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    from dask.utils import parse_timedelta

    try:
        return None if value is None else float(parse_timedelta(value))
    except (ValueError, KeyError) as error:
        raise click.BadParameter(f"{value!r} is no time, like '90 s' or '2 hours'.") from error


@main.command()
@click.argument("store")
@click.option("--scheduler", help="Address of a dask scheduler; a local cluster by default.")
@_clear_errors
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
    import dask

    from dagflow.run.join import TEMPORARY_VARIABLE, with_private_folder

    # Where dask keeps its files, if the user's configuration says so; else a folder of our own.
    if (configured := dask.config.get("temporary-directory", None)) is not None:
        os.environ.setdefault(TEMPORARY_VARIABLE, str(configured))
    worker = [sys.executable, "-m", "dask", "worker", scheduler]
    worker += ["--nthreads", "1", "--nworkers", "1", "--memory-limit", memory_limit]
    # The scheduler's dashboard shows all workers; one of its own takes half a second and 17 MB.
    worker += ["--no-dashboard"]
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

    # Nobody is left to delete it: an empty folder stays.
    folder = tempfile.mkdtemp(prefix="dagflow-join-")
    environment = with_private_folder(with_allocator(os.environ), folder)
    os.execve(sys.executable, worker, environment)


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


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which model runs where."""
    for option in (
        click.option(
            "--draft",
            help="Folder or name of a small model of the same vocabulary, which guesses on this machine.",
        ),
        click.option("--workers", type=click.IntRange(1), help="Size of the local cluster."),
        click.option(
            "--stages",
            default="auto",
            show_default=True,
            callback=_number_or_auto,
            help="Number of stages, or auto: one a worker. Workers beyond are spares.",
        ),
        click.option(
            "--weights",
            type=click.Choice(["fp32", "bf16", "int8", "int4"]),
            help="fp32 by default.",
        ),
        click.option(
            "--check/--no-check",
            default=True,
            show_default=True,
            help="Compare a folder's model with transformers before it is served.",
        ),
        click.option(
            "--scheduler", help="Address of a dask scheduler; a local cluster by default."
        ),
        click.option(
            "--store", default="models", show_default=True, help="Folder or fsspec URL for models."
        ),
        click.option(
            "--model", required=True, help="Hugging Face folder, or name of a model in the store."
        ),
    ):
        command = option(command)
    return command


@main.command()
@_model_options
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
    callback=_origins,
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
    callback=_bytes,
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
@_clear_errors
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
@_model_options
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
@_clear_errors
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


@main.group()
def runs() -> None:
    """List, check, clean up and export runs.

    \b
    dagflow runs ls runs
    dagflow runs verify s3://bucket/run
    dagflow runs export runs/demo --format safetensors --to model.safetensors
    """


@runs.command("ls")
@click.argument("root", default="runs")
@_clear_errors
def list_runs(root: str) -> None:
    """List the runs below a folder or URL: steps, loss, snapshots, size.

    \b
    dagflow runs ls
    dagflow runs ls s3://bucket
    """
    from rich.console import Console

    from dagflow.run.runs import runs_table, summarise_runs
    from dagflow_storage import shown_url

    with Console(stderr=True).status("") as status:
        found = summarise_runs(root, status.update)
    click.echo(runs_table(found) if found else f"There are no runs below {shown_url(root)}.")


@runs.command()
@click.argument("store")
@_clear_errors
def show(store: str) -> None:
    """Show a run: settings, progress, snapshots.

    \b
    dagflow runs show runs/demo
    """
    from dagflow.run.inspect import describe_run

    click.echo(describe_run(store))


@runs.command()
@click.argument("store")
@_clear_errors
def verify(store: str) -> None:
    """Read every object of every snapshot, and say what is damaged. Status 1 if anything is.

    \b
    dagflow runs verify runs/demo
    """
    from dagflow.run.runs import num_objects, verify_run

    with _progress("objects", num_objects(store)) as advance:
        report = verify_run(store, advance)
    click.echo(str(report))
    sys.exit(0 if report.is_whole else 1)


@runs.command()
@click.argument("store")
@click.option("--dry-run", is_flag=True, help="Delete nothing, and only tell.")
@click.option("--idle", is_flag=True, help="Nobody trains here: delete what is young, too.")
@_clear_errors
def gc(store: str, dry_run: bool, idle: bool) -> None:
    """Delete what crashes left behind and nobody needs. Safe while the run goes on.

    \b
    dagflow runs gc runs/demo --dry-run
    """
    from dagflow.run.runs import collect, describe_garbage

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
@_clear_errors
def samples(store: str, step: int | None) -> None:
    """Say which samples went into which step: one JSON object a line, from the run's ledger.

    \b
    dagflow runs samples runs/demo --step 17
    """
    from dagflow.run.runs import samples_of

    for row in samples_of(store, step):
        click.echo(json.dumps(row))


@runs.command()
@click.argument("store")
@click.option("--step", type=int, help="Whose weights; the newest snapshot's by default.")
@click.option("--format", type=click.Choice(["safetensors", "hf", "torch"]), required=True)
@click.option("--to", required=True, type=click.Path(), help="New file, or folder for hf.")
@click.option("--config", type=click.Path(), help="For hf: folder with the model's config.json.")
@_clear_errors
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
    from dagflow.run.export import export as export_weights
    from dagflow.run.export import num_tensors

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


if __name__ == "__main__":
    main()
