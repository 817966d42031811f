"""The memory allocator of worker processes that dagflow starts: jemalloc or mimalloc, where there is one.

A training step allocates and frees tensors of a few sizes over and over. glibc's allocator either
gives their pages back each time (dask sets it so: a fifth of the throughput goes into page faults)
or keeps holes between them that nothing fits: a third more memory at the peak. These do neither.
jemalloc comes with the system (Debian's ``libjemalloc2``) and takes the least; mimalloc comes with
dagflow. They must be there before a process starts, so they are for processes we start; others have
glibc's, of which `keep_freed_memory` makes the best.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from ctypes.util import find_library
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from typing import Any

_PRELOAD = "LD_PRELOAD"
# glibc's own limits for its adaptive thresholds (malloc.c, DEFAULT_MMAP_THRESHOLD_MAX).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 2 * _MMAP_THRESHOLD_BYTES
# Variables for each; who sets one themselves is obeyed.
# Freed pages are given back over five seconds: the next micro-batches need most of them again. By the
# default threshold those that have grown together to 8 MiB go back at once (`keep_freed_memory`).
# One arena for all threads would keep memory down while snapshots are written (tasks go on in a new thread,
# see `save_behind`), and cost a tenth of the throughput.
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
    for name in wanted.keys() & os.environ.keys():
        if said := _said(path, (name, os.environ[name])):
            warnings.warn(f"{name}={os.environ[name]!r} is not understood: {said}", stacklevel=2)
    return {**options, **environment, _PRELOAD: f"{path} {present}".strip()}


def keep_freed_memory() -> None:
    """Have this process keep freed memory for what comes next, whatever allocator it runs on.

    In glibc's this undoes dask's ``MALLOC_TRIM_THRESHOLD_``, with which every freed tensor goes back
    to the system and every new one is faulted in again, page by page: a fifth of the throughput.
    The values are those that glibc would reach by itself.

    In jemalloc it does so for the first arena, of our workers the only one: that is made before the
    options are read (5.3) and keeps the default threshold, from which on freed memory goes back at once.
    """
    if not sys.platform.startswith("linux"):
        return
    process = ctypes.CDLL(None)
    if (mallopt := getattr(process, "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
    if (mallctl := getattr(process, "mallctl", None)) is not None:
        never = ctypes.c_size_t(1 << (8 * ctypes.sizeof(ctypes.c_size_t) - 2))
        # A jemalloc without that setting says so, and is as it was.
        mallctl(
            b"arena.0.oversize_threshold", None, None, ctypes.byref(never), ctypes.sizeof(never)
        )


def _packaged(package: str, library: str) -> str | None:
    try:
        found = [file for file in files(package) or () if file.name == library]
    except PackageNotFoundError:
        return None
    return str(found[0].locate()) if found else None


def _loads(library: str) -> bool:
    """Whether a process starts with it: one built for pages of another size ends at once."""
    return not _said(library)


@cache
def _said(library: str, *variables: tuple[str, str]) -> str:
    """Return what an allocator complains of when a process starts with these variables."""
    # Those that a user has set may be wrong, which isn't the library's fault.
    others = {n: v for n, v in os.environ.items() if n not in _JEMALLOC.keys() | _MIMALLOC.keys()}
    environment = {**others, **dict(variables), _PRELOAD: library}
    command = [sys.executable, "-S", "-E", "-c", ""]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # The linker goes on without a library that it can't load, and complains.
    return tried.stderr.strip() or ("" if tried.returncode == 0 else f"status {tried.returncode}")
