"""Lets attention take a question about sizes for a flag: ``is_causal=mask is None and q.shape[2] > 1``.

While a model is traced with open sizes such a question has no answer yet, and torch's function takes
nothing but a bool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from dagflow.graph.sizes import Decision, decided


@contextmanager
def flags_of_sizes(decisions: list[Decision], line: Callable[[], str]) -> Iterator[None]:
    """Answer such questions while a model is traced, as the example batch does.

    Parameters
    ----------
    decisions
        Gets each answer, with the line of the model's code that `line` returns: what every batch must meet.
    """
    thread, attention = threading.get_ident(), functional.scaled_dot_product_attention

    def with_flags(*args: Any, **kwargs: Any) -> torch.Tensor:
        flag = kwargs.get("is_causal")
        if isinstance(flag, torch.SymBool) and threading.get_ident() == thread:
            kwargs["is_causal"], decision = decided(flag, line())
            decisions.append(decision)
        return attention(*args, **kwargs)

    with patch.object(functional, "scaled_dot_product_attention", with_flags):
        yield
