"""A volunteer's worker, started by ``dagflow join``: looks who it is to work for, then is ``dask worker``.

Whatever is wrong is one line and an exit status that `dagflow.swarm.supervision` knows.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import click
import psutil
from dask.system import CPU_COUNT
from dask.utils import format_bytes
from distributed.cli.dask_worker import main as dask_worker

from dagflow.swarm.dask_internals import MEMORY_LIMIT, who_answers
from dagflow.swarm.join import FAREWELL_VARIABLE
from dagflow.swarm.supervision import EXIT_REFUSED, EXIT_UNHEARD

_ANSWER_SECONDS = 5.0
_PARENT, _SELF = "dagflow.swarm.join", "dagflow.swarm.volunteer"


@click.command()
@click.argument("scheduler")
@click.option("--torch-threads", type=int)
@click.option("--device", default="auto")
@click.option("--name")
@click.option("--memory-limit", default="auto")
@click.option("--lifetime")
@click.option("--verbose", is_flag=True)
def main(
    scheduler: str,
    torch_threads: int | None,
    device: str,
    name: str | None,
    memory_limit: str,
    lifetime: str | None,
    verbose: bool,
) -> None:
    """Work for a scheduler until it goes away."""
    try:
        refusal = asyncio.run(_refusal(scheduler, name))
    except (OSError, TimeoutError) as error:
        if FAREWELL_VARIABLE not in os.environ:  # there is no parent that says so, and tries again
            _say(f"No dask scheduler answers at {scheduler} ({error or 'nothing came'}).")
        sys.exit(EXIT_UNHEARD)
    if refusal is not None:
        _say(refusal)
        sys.exit(EXIT_REFUSED)
    others = _others_here()
    share = 1 + len(others)
    memory = memory_limit if memory_limit != "auto" else str(MEMORY_LIMIT // share)
    threads = torch_threads or max(1, CPU_COUNT // share)
    if memory_limit == "auto" or torch_threads is None:
        _say(_offer(memory, threads, others))
    options = ["--nthreads", "1", "--nworkers", "1", "--memory-limit", memory]
    # The scheduler's dashboard shows all workers; one of its own takes half a second and 17 MB.
    options += ["--no-dashboard"]
    options += ["--name", name] if name else []
    options += ["--lifetime", lifetime] if lifetime else []
    options += ["--preload-nanny", "dagflow.nanny", "--preload", "dagflow.worker"]
    options += ["--torch-threads", str(threads), "--device", device]
    try:
        dask_worker([scheduler, *options], standalone_mode=False)
    except Exception as error:
        if verbose:
            raise
        _say(f"{type(error).__name__}: {_root(error)}")
        sys.exit(1)


async def _refusal(address: str, name: str | None) -> str | None:
    """Return why a machine of a name can't join at an address, or None.

    Raises
    ------
    OSError, TimeoutError
        If nobody answers.
    """
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            found = await who_answers(address)
    except (OSError, TimeoutError):
        raise
    except Exception as error:  # bytes that aren't dask's can fail in any way
        return f"What answers at {address} is no dask scheduler ({type(error).__name__})."
    if found.get("type") != "Scheduler":
        return f"What answers at {address} is no dask scheduler but a {found.get('type')}."
    taken = [worker for worker, info in found["workers"].items() if str(info["name"]) == name]
    if taken:
        return (
            f"The name {name!r} is taken at {address}, by the worker {taken[0]}: choose another with "
            "--name, or leave it out."
        )
    return None


def _others_here() -> list[int]:
    """Return the process numbers of the other ``dagflow join`` on this machine."""
    parents, workers = set(), dict[int, int]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            match process.cmdline()[1:4]:
                case ["-P", "-m", module] if module == _PARENT:
                    parents.add(process.pid)
                case ["-m", module, *_] if module == _SELF:
                    workers[process.pid] = process.ppid()
    alone = {pid for pid, parent in workers.items() if parent not in parents}
    return sorted((parents | alone) - {os.getpid(), os.getppid()})


def _offer(memory: str, threads: int, others: Sequence[int]) -> str:
    room = format_bytes(int(memory)) if memory.isdigit() else memory
    offer = f"Offering {room} and {threads} {'thread' if threads == 1 else 'threads'}"
    if not others:
        return f"{offer}: all of this machine."
    return (
        f"{offer}, one of {1 + len(others)} shares of this machine: others join from it, too "
        f"({'process' if len(others) == 1 else 'processes'} {', '.join(map(str, others))}). Who began "
        "alone offers all of it until started again; --memory-limit and --torch-threads say how much."
    )


def _root(error: BaseException) -> BaseException:
    """Return what an error came from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _say(text: str) -> None:
    print(f"dagflow join: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
