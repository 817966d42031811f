"""Notes the regions of autocast that a model opens for another kind of device than its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def devices_of(model: torch.nn.Module) -> set[str]:
    """Return the kinds of device that a model may be meant for; the meta device tells nothing."""
    devices = {parameter.device.type for parameter in model.parameters()} or {"cpu"}
    return devices | ({"cpu", "cuda"} if "meta" in devices else set())


@contextmanager
def watch_autocasts(model: torch.nn.Module, line: Callable[[], str]) -> Iterator[dict[str, str]]:
    """Collect the lines that ask for autocast on a device where the model isn't, with the device.

    There it does nothing, in torch as here.

    Parameters
    ----------
    line
        Returns the line of the model that runs.
    """
    found: dict[str, str] = {}
    devices, thread = devices_of(model), threading.get_ident()
    plain, enter = torch.autocast.__init__, torch.autocast.__enter__

    def note(device: Any) -> None:
        if device not in devices and threading.get_ident() == thread:
            found.setdefault(line(), str(device))

    def made(self: Any, device_type: str, *given: Any, **named: Any) -> None:
        if named.get("enabled", given[1] if len(given) > 1 else True):
            note(device_type)
        plain(self, device_type, *given, **named)

    def entered(self: Any) -> Any:
        if getattr(self, "_enabled", False):
            note(self.device)
        return enter(self)  # type: ignore[no-untyped-call]

    with (
        patch.object(torch.autocast, "__init__", made),
        patch.object(torch.autocast, "__enter__", entered),
    ):
        yield found
