"""Lets a forward cast its modules to what they are already, while it is traced.

``self.router = self.router.to(torch.float32)`` does nothing in a model of float32, but a trace can't put
parameters into modules, not even the same ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@contextmanager
def needless_casts() -> Iterator[None]:
    """While a model is traced: casts and moves of modules that change nothing do nothing."""
    thread = threading.get_ident()

    def casting(name: str) -> Callable[..., Any]:
        original = getattr(torch.nn.Module, name)

        def cast(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            wanted = (_DTYPES[name],) if name in _DTYPES else args
            if threading.get_ident() == thread and _is_so(module, *wanted, **kwargs):
                return module
            return original(module, *args, **kwargs)

        return cast

    with ExitStack() as stack:
        for name in ("to", *_DTYPES):
            stack.enter_context(patch.object(torch.nn.Module, name, casting(name)))
        yield


def _is_so(module: torch.nn.Module, *args: Any, **kwargs: Any) -> bool:
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    tensors = [*module.parameters(), *module.buffers()]
    return memory_format is None and all(
        (device is None or _alike(tensor.device, device))
        and (dtype is None or tensor.dtype == dtype or not _is_cast(tensor))
        for tensor in tensors
    )


def _is_cast(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _alike(found: torch.device, wanted: torch.device) -> bool:
    return found.type == wanted.type and wanted.index in (None, found.index)
