"""The zoo's groups of models; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from .case import Case

GROUPS = {
    "causal": "causal",
    "idioms": "idioms",
    "others": "others",
    "timm": "vision_timm",
}


def cases_of(group: str) -> list[Case]:
    """Return a group's cases."""
    found: list[Case] = import_module(f".{GROUPS[group]}", __package__).cases()
    return found
