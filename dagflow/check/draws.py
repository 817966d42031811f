"""Random numbers in the check against the eager model: the same on both sides, or none.

A model draws from torch's generator in one stream; a program draws by address. Both draw through the
same few operators, which these modes see below autograd, whatever `dropout` or attention they are
part of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dagflow_tasks.program.nodes import Node
from dagflow_tasks.program.operators import draws_random_numbers

Draw = tuple[Any, torch.Tensor]
"""What was drawn (operator and shapes), and the generator's state before."""


class RecordDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the generator's state before each draw, and leaves everything else as it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _draws(func):
            self.draws.append((_described(func, args), torch.get_rng_state()))
        return func(*args, **(kwargs or {}))


class RepeatDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws what was recorded, in the same order; what is drawn without use in between is skipped."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = deque(draws)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _draws(func):
            wanted = _described(func, args)
            if any(what == wanted for what, _ in self._draws):
                while (draw := self._draws.popleft())[0] != wanted:
                    pass
                torch.set_rng_state(draw[1])
        return func(*args, **(kwargs or {}))


class ExpectedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws nothing: a row's result doesn't depend on its place in the batch.

    Dropout is the identity, uniform numbers are a half, normal ones too, whole numbers are all the
    same. Batch normalisation takes its running statistics.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if "native_batch_norm" in name and len(args) > 5 and args[3] is not None:
            return func(*args[:5], False, *args[6:], **keywords)
        if not _draws(func):
            return func(*args, **keywords)
        drawn = func(*args, **keywords)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(drawn[1])
        if not isinstance(drawn, torch.Tensor):  # fused attention, whose dropout is off on CPUs
            return drawn
        if name == "randperm":
            return drawn.copy_(torch.arange(drawn.numel()))
        if name.startswith("bernoulli") and len(args) > 1 and args[1] is not None:
            return (
                drawn.copy_(args[1]) if isinstance(args[1], torch.Tensor) else drawn.fill_(args[1])
            )
        if name == "bernoulli":
            return args[0].clone()
        return drawn.fill_(0.5) if drawn.is_floating_point() else drawn.fill_(drawn.reshape(-1)[0])


def has_draws(nodes: Iterable[Node]) -> bool:
    """Tell whether operators draw random numbers, dropout that is off aside."""
    return any(draws_random_numbers(node.op) and not _is_off(node) for node in nodes)


def _is_off(node: Node) -> bool:
    if node.op == "aten.scaled_dot_product_attention.default":
        given = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(given == 0.0)
    return "dropout" in node.op and len(node.args) > 2 and node.args[2] is False


def _draws(func: Any) -> bool:
    return bool(torch.Tag.nondeterministic_seeded in func.tags)


def _described(func: Any, args: Sequence[Any]) -> Any:
    """Name a draw so that it is found again: operator, shapes, probabilities."""
    return (
        str(func),
        str([tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]),
    )
