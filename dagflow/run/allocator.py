"""The memory allocator of worker processes that dagflow starts: jemalloc or mimalloc, where there is one.

A training step allocates and frees tensors of a few sizes over and over. glibc's allocator either
gives their pages back each time (dask sets it so: a fifth of the throughput goes into page faults)
or keeps holes between them that nothing fits: a third more memory at the peak. These do neither.
jemalloc comes with the system (Debian's ``libjemalloc2``) and takes the least; mimalloc comes with
dagflow. They must be there before a process starts, so they are for processes we start; others get
`dagflow.run.workers.keep_freed_memory`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from typing import Any

_PRELOAD = "LD_PRELOAD"
# Variables for each; who sets one themselves is obeyed.
# Freed pages are given back over five seconds: the next micro-batches need most of them again. Without
# the threshold those of 8 MiB and more would be given back at once (`keep_large_tensors`).
_JEMALLOC = {
    "MALLOC_CONF": (
        "background_thread:true,dirty_decay_ms:5000,muzzy_decay_ms:0,oversize_threshold:0"
    )
}
# After five seconds, all at once: sooner costs 8 % of the time. torch asks for large tensors in whole
# pages then: mimalloc rounds what is aligned to less up by a sixteenth to an eighth.
_MIMALLOC = {"MIMALLOC_PURGE_DELAY": "5000", "THP_MEM_ALLOC_ENABLE": "1"}


@cache
def allocator_path() -> str | None:
    """Return the allocator's shared library as the dynamic linker takes it, or None."""
    if not sys.platform.startswith("linux"):
        return None
    found = (find_library("jemalloc"), _packaged("cmeel-mimalloc", "libmimalloc.so"))
    return next((library for library in found if library and _loads(library)), None)


def with_allocator(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment in which a new process uses the allocator, if there is one."""
    path = allocator_path()
    if path is None:
        return dict(environment)
    present = environment.get(_PRELOAD, os.environ.get(_PRELOAD, ""))
    wanted = _JEMALLOC if "jemalloc" in os.path.basename(path) else _MIMALLOC
    options = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return {**options, **environment, _PRELOAD: f"{path} {present}".strip()}


def keep_large_tensors() -> None:
    """Have jemalloc, where this process runs on it, treat the main thread's tensors like the others'.

    That thread's arena is made before the options are read (jemalloc 5.3): it keeps the default
    threshold, from which on freed memory goes back at once. Messages are received there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is None:
        return
    never = ctypes.c_size_t(1 << (8 * ctypes.sizeof(ctypes.c_size_t) - 2))
    # A jemalloc without that setting says so, and is as it was.
    mallctl(b"arena.0.oversize_threshold", None, None, ctypes.byref(never), ctypes.sizeof(never))


def _packaged(package: str, library: str) -> str | None:
    try:
        found = [file for file in files(package) or () if file.name == library]
    except PackageNotFoundError:
        return None
    return str(found[0].locate()) if found else None


def _loads(library: str) -> bool:
    """Whether a process starts with it: one built for pages of another size ends at once."""
    # The linker goes on without a library that it can't load, and complains.
    command = [sys.executable, "-S", "-E", "-c", ""]
    environment = {**os.environ, _PRELOAD: library}
    tried = subprocess.run(command, env=environment, capture_output=True, check=False)
    return tried.returncode == 0 and not tried.stderr
