"""What commands take and how they fail: kinds of values that click doesn't know, and errors in a line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from dagflow.errors import DagflowError

PRECISION = click.Choice(["fp32", "bf16", "fp16"])


def number_or_auto(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.") from error


def num_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
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


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
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


def scheduler_address(_: click.Context, __: click.Parameter, value: str) -> str:
    from dagflow.swarm.join import scheduler_endpoint

    try:
        scheduler_endpoint(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}.") from error
    return value


def origins(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(origin.lower().rstrip("/") for origin in value)
    for origin in found:
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise click.BadParameter(f"{origin!r} is no origin, such as https://example.org.")
    return found


def seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    from dask.utils import parse_timedelta

    try:
        return None if value is None else float(parse_timedelta(value))
    except (ValueError, KeyError) as error:
        raise click.BadParameter(f"{value!r} is no time, like '90 s' or '2 hours'.") from error


def model_options(command: Callable[..., None]) -> Callable[..., None]:
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
            callback=number_or_auto,
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
