"""What all tests need: one thread for torch (they compare bits, and run side by side), and Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers and schedulers that wait for their tests look after themselves fifty times a second otherwise: a
# percent of a core each, and there are twenty at a time.
os.environ.setdefault("DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL", "1s")
os.environ.setdefault("DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL", "2s")

import once
import pytest
import torch

once.share()
pytest_plugins = ["s3_server"]
# A shell's background job ignores Ctrl-C, and hands that down to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
pytest.register_assert_rewrite("inline")


# Modules that take half a minute or more begin, so that nobody waits for one of them at the end: those
# that wait more than they compute in turn with those that compute all the time.
LONGEST = (
    "test_chaos",
    "test_cut_equals_uncut",
    "test_join",
    "test_s3",
    "test_capture_equals_eager",
    "test_interrupt",
    "test_zoo",
    "test_workers",
    "test_training",
    "test_models",
    "test_http",
    "test_quantised",
    "test_takeover",
    "test_decoder_stage",
    "test_data",
    "test_drafts",
    "test_resume",
    "test_generate",
    "test_driver_killed",
    "test_swarm",
    "test_taking_over",
    "test_first_batch",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector a million objects of imported modules, at each of its rounds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _torch_seed() -> None:
    torch.manual_seed(0)


warnings.filterwarnings("ignore", message=".*requires_grad=True to a scalar.*")
