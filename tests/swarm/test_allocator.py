"""Worker processes get a memory allocator that works, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library

import pytest

from dagflow.swarm import allocator
from dagflow.swarm.allocator import allocator_path, with_allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the dynamic linker is Linux's")


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    allocator_path.cache_clear()
    yield
    allocator_path.cache_clear()


def mapped(environment: dict[str, str]) -> str:
    """Return the files that a process with these variables has in memory."""
    code = "print(open('/proc/self/maps').read())"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_process_has_the_allocator_that_was_found() -> None:
    found = allocator_path()
    assert found is not None  # mimalloc comes with dagflow
    assert os.path.basename(found) in mapped(with_allocator(os.environ))
    assert os.path.basename(found) not in mapped(dict(os.environ))


def test_without_jemalloc_it_is_what_dagflow_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    assert "libmimalloc" in mapped(with_allocator(os.environ))


@pytest.mark.parametrize("library", ["libjemalloc.so.nowhere", os.path.abspath(__file__)])
def test_a_library_that_does_not_load_is_passed_over(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "find_library", lambda name: library)
    assert "libmimalloc" in str(allocator_path())


def test_without_any_the_environment_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    monkeypatch.setattr(allocator, "_packaged", lambda package, library: None)
    assert with_allocator({"A": "1"}) == {"A": "1"}


def test_who_sets_a_variable_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    monkeypatch.setenv("MIMALLOC_PURGE_DELAY", "77")
    environment = with_allocator({"LD_PRELOAD": "libother.so", "THP_MEM_ALLOC_ENABLE": "0"})
    assert environment == {
        "MIMALLOC_PURGE_DELAY": "77",
        "THP_MEM_ALLOC_ENABLE": "0",
        "LD_PRELOAD": f"{allocator_path()} libother.so",
    }


@pytest.mark.skipif(find_library("jemalloc") is None, reason="mimalloc takes what it is given")
def test_an_option_that_jemalloc_does_not_know_is_told_and_costs_nobody_jemalloc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_CONF", "nonsense:1")
    with pytest.warns(UserWarning, match=r"MALLOC_CONF='nonsense:1' is not understood: <jemalloc>"):
        environment = with_allocator({})
    assert "jemalloc" in environment["LD_PRELOAD"]
    assert environment["MALLOC_CONF"] == "nonsense:1"
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:77")  # warnings are errors
    assert with_allocator({})["MALLOC_CONF"] == "dirty_decay_ms:77"


FAULTS_BY_THREAD = """
import resource, sys, threading
from dagflow.swarm.allocator import keep_freed_memory

def faults():
    for number in range(21):
        if number == 1:
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        bytearray(16 << 20)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

keep_freed_memory()
faults()
threading.Thread(target=faults).start()
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_large_tensors_keep_their_pages_in_every_thread(
    is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_there:
        monkeypatch.setattr(allocator, "find_library", lambda name: None)
    command = [sys.executable, "-c", FAULTS_BY_THREAD]
    done = subprocess.run(
        command, env=with_allocator(os.environ), capture_output=True, text=True, check=True
    )
    # 20 of 4096 pages each, were they given back.
    assert max(map(int, done.stdout.split())) < 20 * 4096 / 10, (allocator_path(), done.stdout)
