"""Named tensors, as tasks and sessions send them."""

from __future__ import annotations

import torch


class TensorDict(dict[str, torch.Tensor]):
    """Named tensors as a task's result or argument, a type of its own so that they travel well."""
