"""Finds the module at which a captured graph and its model part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dagflow.graph.dag import OperatorDag

# Coarser than the check itself: which module is to blame, not whether one is.
_CLOSE = 1e-3


def first_different_module(
    dag: OperatorDag, values: Mapping[str, Any], results: Mapping[str, torch.Tensor]
) -> str | None:
    """Return the path of the first module none of whose operators computes the module's result.

    Parameters
    ----------
    values
        What the graph's operators have computed, by name.
    results
        What the model's modules have returned, by path, in the order in which they returned.
    """
    for path, result in results.items():
        inside = [
            n.name for n in dag.nodes if f"{n.module}.".startswith(f"{path}." if path else "")
        ]
        if inside and not any(_is_close(values.get(name), result) for name in inside):
            return path
    return None


def watch_modules(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Note what modules return from here on; return it, by path, and what ends the watch."""
    results: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():

        def note(_: Any, __: Any, output: Any, path: str = path) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, torch.Tensor) and path:
                results.setdefault(path, first.detach().clone())

        handles.append(module.register_forward_hook(note))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return results, end


def _is_close(value: Any, result: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != result.dtype:
        return False
    if value.shape != result.shape:
        return False
    if not result.is_floating_point() or not result.numel():
        return True
    near = _CLOSE * float(result.abs().max())
    return torch.allclose(value.detach(), result, rtol=_CLOSE, atol=near, equal_nan=True)
