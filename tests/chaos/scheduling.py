"""The scheduler's process."""

from __future__ import annotations

from distributed.cli.dask_scheduler import main as dask_scheduler


def scheduler(port: int) -> None:
    """Run ``dask scheduler`` on a port of this machine."""
    dask_scheduler(["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show"])
