"""Captured once a test run, whichever of its processes asks: capturing is most of what many tests compute."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dagflow.graph.dag import OperatorDag

_VARIABLE = "DAGFLOW_TESTS_CAPTURED"
_KNOWN: dict[str, OperatorDag] = {}


def share() -> None:
    """Make a folder for what is captured; processes that this one starts use it, too."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="dagflow-captured-")
        atexit.register(shutil.rmtree, os.environ[_VARIABLE], ignore_errors=True)


def once(key: str, capture: Callable[[], OperatorDag]) -> OperatorDag:
    """Return a DAG that was captured under this key in this run of the tests, or capture it now."""
    if key not in _KNOWN:
        _KNOWN[key] = _from_file(key, capture)
    return _KNOWN[key]


def _from_file(key: str, capture: Callable[[], OperatorDag]) -> OperatorDag:
    share()
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(os.environ[_VARIABLE]) / name
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            dag = capture()
            text = dag.to_json()
            assert OperatorDag.from_json(text) == dag
            file.write(text)
    return OperatorDag.from_json(text)


_where_it_was = re.compile(r'"_name_or_path": ".*"')


def what_a_dag_follows_from(model: torch.nn.Module) -> Any:
    """Classes and settings, tensors' forms and which of them are one, and constants."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in reversed(parameters)}
    return (
        type(model),
        str(model),
        _where_it_was.sub("", str(getattr(model, "config", ""))),
        tuple(
            (name, str(t.dtype), tuple(t.shape), t.requires_grad, first[id(t)])
            for name, t in parameters
        ),
        tuple((name, str(t.dtype), tuple(t.shape), str(t)) for name, t in model.named_buffers()),
        # RWKV's, which divides its hidden states once it has divided its weights.
        any(getattr(module, "layers_are_rescaled", False) for module in model.modules()),
    )
