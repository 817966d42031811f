"""Has transformers' layers of experts multiply by groups while they are traced, where they loop eagerly.

A loop over the experts that were hit has as many rounds as the data says, which no graph holds. Most
families take the other way by themselves; some loop by default, and any may be told to.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def experts_by_groups() -> Iterator[None]:
    """While a model is traced: layers of experts in fp32 compute the same sums without a loop."""
    integration = sys.modules.get("transformers.integrations.moe")
    if integration is None:
        yield
        return
    interface, thread = integration.ExpertsInterface, threading.get_ident()
    original = interface.get_interface

    def get_interface(functions: Any, implementation: Any, loop: Callable[..., Any]) -> Any:
        chosen = original(functions, implementation, loop)
        is_ours = chosen is loop and threading.get_ident() == thread
        return _by_groups(functions["grouped_mm"], loop) if is_ours else chosen

    with patch.object(interface, "get_interface", get_interface):
        yield


def _by_groups(grouped: Callable[..., Any], loop: Callable[..., Any]) -> Callable[..., Any]:
    def experts(module: torch.nn.Module, *args: Any, **more: Any) -> Any:
        # In half precision a loop may add in another dtype than products of groups do.
        is_exact = all(p.dtype == torch.float32 for p in module.parameters())
        return (grouped if is_exact and not more else loop)(module, *args, **more)

    return experts
