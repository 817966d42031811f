"""The device that this worker process computes on."""

from __future__ import annotations

import torch

_chosen: torch.device | None = None


def choose_device(name: str = "auto") -> torch.device:
    """Set the process's device: `auto` takes the first GPU if there is one, the CPU otherwise."""
    global _chosen
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    _chosen = torch.device(name)
    return _chosen


def current_device() -> torch.device:
    """Return the process's device, choosing one on first use."""
    return _chosen if _chosen is not None else choose_device()
