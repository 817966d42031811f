"""Scripts whose workers would begin them again: one sentence instead of a storm of tracebacks.

Worker processes import the script that starts them. If it trains as soon as it is imported, so does
every worker, and none ever begins to work.
"""

from __future__ import annotations

import ast
import multiprocessing
import sys
from pathlib import Path
from types import FrameType

import dask

from dagflow.errors import SettingsInvalid

_WHAT_TO_DO = (
    "worker processes import the script that starts them, and would run that line again. Put it "
    "under `if __name__ == '__main__':`."
)


def refuse_unguarded_main() -> None:
    """Refuse to start worker processes from a script that they would run again.

    Raises
    ------
    SettingsInvalid
        In the process that the user started, naming the line.
    SystemExit
        In a worker that is just beginning and has run into that line.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise SystemExit(f"dagflow: {_WHAT_TO_DO}")
    if dask.config.get("distributed.worker.multiprocessing-method") == "fork":
        return
    line = _unguarded_line()
    if line is not None:
        raise SettingsInvalid(f"{line[0]}, line {line[1]}: {_WHAT_TO_DO}")


def _unguarded_line() -> tuple[str, int] | None:
    """Return the line of the main script that runs now, if importing the script would run it, too."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    name = getattr(getattr(main, "__spec__", None), "name", "")
    if path is None or name.endswith("__main__"):  # interactive, or a package: nobody imports it
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is vars(main) and frame.f_code.co_name == "<module>":
            return None if _is_guarded(path, frame.f_lineno) else (path, frame.f_lineno)
        frame = frame.f_back
    return None


def _is_guarded(path: str, line: int) -> bool:
    """Tell whether a line is under an `if` that asks for the module's name."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return True
    return any(
        isinstance(node, ast.If)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        and any(
            isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
        )
        for node in ast.walk(tree)
    )
