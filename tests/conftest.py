"""What all tests need: one thread for torch (they compare bits, and run side by side), and Ctrl-C."""

from __future__ import annotations

import os
import signal
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest_plugins = ["s3_server"]
# A shell's background job ignores Ctrl-C, and hands that down to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
pytest.register_assert_rewrite("inline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _torch_seed() -> None:
    torch.manual_seed(0)


warnings.filterwarnings("ignore", message=".*requires_grad=True to a scalar.*")
