"""Where in the model an operator comes from, and errors that name the place."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from dagflow.errors import CaptureFailed
from dagflow.graph.trace import OWN_FILES


@dataclass(frozen=True)
class Origin:
    """Where in the model's code an operator comes from."""

    module: str
    source: str
    op: str

    def __str__(self) -> str:
        module = self.module or "the model itself"
        return f"Module: {module!r}. Source: {self.source or 'unknown'}. Operator: {self.op}."


def not_allowed(op: str, origin: Origin) -> CaptureFailed:
    return CaptureFailed(
        f"The model calls {op}, which is not on the allow-list of operators that workers "
        f"run. {origin} What to do: write it with public functions of torch that return new "
        "tensors; if it is one, it belongs into dagflow_tasks/program/allowed_operators.toml."
    )


def depends_on_data(number: str, origin: Origin) -> CaptureFailed:
    return CaptureFailed(
        f"The number {number} depends on the data, not on the batch's shape. {origin} "
        "What to do: use masks instead of selecting by value (nonzero, boolean "
        "indexing), and tensors instead of .item()."
    )


def origin_of(node: torch.fx.Node, op: str) -> Origin:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = re.sub(r"^L\['self'\]\.?", "", path).removeprefix("model").removeprefix(".")
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [line for line in lines if line[0] not in OWN_FILES] or lines
    source = f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""
    return Origin(path, source, op)


def _place(node: torch.fx.Node) -> tuple[str, str]:
    """Return the module and the line that a node comes from."""
    origin = origin_of(node, "")
    return origin.module, origin.source
