"""Takes `torch.vmap` apart while a model is traced: operators on whole batches stand in the graph.

torch.export records a mapped function's operators as they see one row, between marks that only
functorch understands. Here the mapped function is traced by itself, beneath functorch, and what it
does to the whole batch is then done in the model's trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch._functorch import apis
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils._python_dispatch import _disable_current_modes

from dagflow.errors import CaptureFailed

_mapped: Any = apis.vmap_impl  # type: ignore[attr-defined]


@contextmanager
def unmapped(module: Callable[[], str]) -> Iterator[None]:
    """While a model is traced: have `torch.vmap` and `torch.func.vmap` record whole operators.

    Parameters
    ----------
    module
        Says in which module the trace is.
    """

    def vmap(function: Any, in_dims: Any, out_dims: Any, *options: Any, **kwargs: Any) -> Any:
        randomness, chunk_size, *args = options
        leaves, form = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        forms: list[Any] = []

        def on(*tensors: torch.Tensor) -> list[Any]:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            given, named = pytree.tree_unflatten(filled, form)
            found = _mapped(function, in_dims, out_dims, randomness, chunk_size, *given, **named)
            flat, found_form = pytree.tree_flatten(found)
            forms.append(found_form)
            return flat

        tensors = [leaves[place] for place in places]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return _mapped(function, in_dims, out_dims, *options, **kwargs)
        graph = _traced(on, tensors, module)
        return pytree.tree_unflatten(graph(*tensors), forms[-1])

    with patch.object(apis, "vmap_impl", vmap):
        yield


def _traced(
    function: Callable[..., list[Any]], tensors: list[torch.Tensor], module: Callable[[], str]
) -> torch.fx.GraphModule:
    fake_mode = next(t.fake_mode for t in tensors if isinstance(t, FakeTensor))
    with ExitStack() as outside:
        for _ in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            outside.enter_context(_pop_mode_temporarily())
        outside.enter_context(_disable_current_modes())
        outside.enter_context(patch.object(apis, "vmap_impl", _mapped))
        outside.enter_context(_Watch(module))
        with fake_mode:
            copies = [tensor.detach() for tensor in tensors]
        try:
            graph = make_fx(function, _allow_non_fake_inputs=True)(*copies)
        except RuntimeError as error:
            if "not tracked with proxy" not in str(error):
                raise
            raise CaptureFailed(
                f"Module {module()!r} maps a function with vmap that uses a tensor from outside of "
                "it, whose sizes are open. What to do: pass it as an argument that isn't mapped: "
                "vmap(lambda w, x: x @ w, in_dims=(0, None))(weights, x)."
            ) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class _Watch(TorchFunctionMode):
    """Refuses what a mapped function does and its graph wouldn't show."""

    def __init__(self, module: Callable[[], str]) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            raise CaptureFailed(
                f"Module {self._module()!r} switches gradients off inside of vmap, which a graph "
                "wouldn't show. What to do: use detach() there, or switch them off around vmap."
            )
        return func(*args, **(kwargs or {}))
