"""What `import dagflow` gives, and what it leaves unloaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dagflow


def test_every_name_is_there() -> None:
    assert sorted(dagflow.__all__) == sorted(dagflow._HOME_OF)
    for name in dagflow.__all__:
        assert getattr(dagflow, name) is not None
        assert name in dir(dagflow)
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = dagflow.nonsense  # type: ignore[attr-defined]


def test_commands_that_compute_nothing_load_no_torch() -> None:
    modules = "dagflow.cli, dagflow.swarm.allocator, dagflow.runs.listing"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
